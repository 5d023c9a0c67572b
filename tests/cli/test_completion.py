"""The scripts for shells, run by the shells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from halfstep.cli.completion import bash, fish, zsh
from halfstep.cli.verbs import VERBS
from halfstep.recipes import recipes
from halfstep.samplers import samplers

CASES = [
    (["s"], {"sample", "status", "study"}),
    (["run", "cifar"], {name for name in recipes if name.startswith("cifar")}),
    (["run", "digits", "--chain.st"], {"--chain.start-steps", "--chain.students"}),
    (["distill", "runs/digits", "--st"], {"--start"}),
    (["sample", "runs/digits", "--sampler", ""], set(samplers)),
    (["train", "digits", "--engine.precision", "b"], {"bf16"}),
    (["export", "runs/digits", "--format", "o"], {"onnx"}),
    (["ls", "samp"], {"samplers"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for name, script in (("bash", bash()), ("zsh", zsh()), ("fish", fish())):
        (folder / name).write_text(script, encoding="utf-8")
    (folder / "runs").mkdir()
    return folder


def shell(name: str, code: str, scripts: Path) -> str:
    ended = subprocess.run([name, "-c", code], cwd=scripts, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_bash_completes(words: list[str], wanted: set[str], scripts: Path) -> None:
    typed = " ".join(f"'{word}'" for word in ["halfstep", *words])
    code = (
        f"source ./bash; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _halfstep; "
        'if (( ${#COMPREPLY[@]} )); then printf "%s\\n" "${COMPREPLY[@]}"; fi'
    )
    assert set(shell("bash", code, scripts).split()) == wanted


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_files_where_nothing_else_is_meant(scripts: Path) -> None:
    code = "source ./bash; complete -p halfstep; COMP_WORDS=(halfstep sample ru); COMP_CWORD=2; _halfstep; "
    printed = shell("bash", code + "echo ${#COMPREPLY[@]}", scripts)
    assert "-o default" in printed
    assert printed.endswith("\n0\n")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_fish_completes(words: list[str], wanted: set[str], scripts: Path) -> None:
    code = f'source ./fish; complete -C "halfstep {" ".join(words)}"'
    offered = {line.split("\t")[0] for line in shell("fish", code, scripts).splitlines()}
    assert wanted <= offered
    if words[-1]:
        assert all(word.startswith(words[-1]) for word in offered)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(scripts: Path) -> None:
    code = "autoload -U compinit; compinit -u -D; source ./zsh; print ${_comps[halfstep]}"
    assert "_bash_complete" in shell("zsh", code, scripts)


def test_every_verb_is_offered(scripts: Path) -> None:
    for name in ("bash", "fish"):
        script = (scripts / name).read_text(encoding="utf-8")
        assert all(verb in script for verb in VERBS)
