"""The completion scripts, run by the shells."""

import shutil
import subprocess
from pathlib import Path

import pytest
import shtab

from halfstep.cli.completion import command_line
from halfstep.cli.verbs import VERBS
from halfstep.recipes import recipes
from halfstep.samplers import samplers
from halfstep.studies import studies

SHELLS = ("bash", "zsh", "fish", "tcsh")
CASES = [
    (["s"], {"sample", "status", "study"}),
    (["run", "cifar"], {name for name in recipes if name.startswith("cifar")}),
    (["run", "digits", "--chain.st"], {"--chain.start-steps", "--chain.students"}),
    (["run", "digits", "--network.d"], {"--network.depth"}),
    (["distill", "runs/digits", "--st"], {"--start"}),
    (["sample", "runs/digits", "--sampler", ""], set(samplers)),
    (["train", "digits", "--engine.precision", "b"], {"bf16"}),
    (["export", "runs/digits", "--format", "o"], {"onnx"}),
    (["ls", "samp"], {"samplers"}),
    (["study", "table"], {name for name in studies if name.startswith("table")}),
    (["help", "rep"], {"report"}),
    (["report", "ru"], {"runs"}),
    (["sample", "runs/digits", "--out", "ba"], {"bash"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    line = command_line()
    for name in SHELLS:
        (folder / name).write_text(shtab.complete(line, name), encoding="utf-8")
    (folder / "_halfstep").write_text((folder / "zsh").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "runs").mkdir()
    return folder


def shell(name: str, code: str, scripts: Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    ended = subprocess.run([name, "-c", code], cwd=scripts, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_bash_completes(words: list[str], wanted: set[str], scripts: Path) -> None:
    typed = " ".join(f"'{word}'" for word in ["halfstep", *words])
    code = (
        f"source ./bash; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_halfstep; "
        'if (( ${#COMPREPLY[@]} )); then printf "%s\\n" "${COMPREPLY[@]}"; fi'
    )
    assert set(shell("bash", code, scripts).split()) == wanted


@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_fish_completes(words: list[str], wanted: set[str], scripts: Path) -> None:
    code = f'source ./fish; complete -C "halfstep {" ".join(words)}"'
    offered = {line.split("\t")[0].rstrip("/") for line in shell("fish", code, scripts).splitlines()}
    assert wanted <= offered
    if words[-1]:
        assert all(word.startswith(words[-1]) for word in offered)


def test_zsh_and_tcsh_take_their_scripts(scripts: Path) -> None:
    code = "fpath=($PWD $fpath); autoload -U compinit; compinit -u -D; print ${_comps[halfstep]}; zsh -n ./zsh"
    assert shell("zsh", code, scripts) == "_halfstep\n"
    assert shell("tcsh", "source ./tcsh; complete halfstep", scripts).count("--sampler") >= 1


@pytest.mark.parametrize("name", SHELLS)
def test_every_verb_is_offered_and_no_key_starts_python(name: str, scripts: Path) -> None:
    script = (scripts / name).read_text(encoding="utf-8")
    assert all(verb in script for verb in VERBS)
    assert "python" not in script
