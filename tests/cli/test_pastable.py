"""All commands and code in README, CONTRIBUTING and the documentation run, at a tiny size."""

import functools
import importlib
import itertools
import os
import re
import shlex
import shutil
import tomllib
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import halfstep
from halfstep.cli import main
from halfstep.cli.completion import command_line
from halfstep.objectives import objectives
from halfstep.recipes import recipes
from halfstep.registry import Registry
from support_google_pd import TINY as GOOGLE
from support_google_pd import checkpoint_bytes, params
from support_pages import BLOCKS, PAGES, ROOT, Block, arguments_of, inline_commands, lines_of
from support_pipelines import save_ddpm, save_dit, save_sd
from toys import TINY_DEMO

ONLY_PARSED: Final = {
    "explore": "serves until Ctrl-C; tests/report/test_explorer.py calls its three views",
    "--push-to-hub": "uploads",
    "inception": "its weights are a download; tests/behaviour/test_extractors.py",
    "google/": "a name on the Hub",
    "resnet20": "its weights are downloaded",
    "web": "needs onnxruntime-web; tests/cli/test_web_page.py",
    "my-wan": "a large pipeline; tests/anchors/test_autoencoders.py encodes its videos",
    "my-audio": "a large pipeline; tests/anchors/test_autoencoders.py encodes its sounds",
    "NAME": "a placeholder",
    "RUN": "a placeholder",
    "RECIPE": "a placeholder",
    "MODEL": "a placeholder",
    "SUBJECT": "a placeholder",
}
"""Words of commands that are not run here, with the reason. Their options are checked."""

DRY: Final = ("cifar10", "fashion_mnist", "imagenet64", "cifar10_paper", "imagenet64_paper", "table1", "roads")
"""Recipes and studies without local data or with a smallest run of minutes: only their plan is printed."""

BUDGET: Final = {
    "--teacher.num-updates": "4",
    "--teacher.warmup-updates": "1",
    "--teacher.batch-size": "8",
    "--matching.num-updates": "2",
    "--matching.batch-size": "4",
    "--chain.num-updates": "2",
    "--chain.batch-size": "8",
    "--chain.warmup-updates": "0",
    "--chain.updates-at": "None",
    "--chain.learning-rate-at": "None",
    "--finish.num-updates": "4",
    "--finish.updates-at": "None",
    "--finish.batch-size": "8",
    "--finish.lead-updates": "1",
    "--evaluation.num-samples": "24",
    "--evaluation.num-compared": "8",
    "--evaluation.num-shown": "4",
    "--evaluation.teacher-steps": "4",
    "--evaluation.teacher-heun-steps": "2",
    "--engine.precision": "float32",
    "--engine.threads": "1",
}
"""Options with which a run takes a second; they replace those of a command."""
UNET_TINY: Final = {
    "--network.block-out-channels": "8 16",
    "--network.attention-head-dim": "8",
    "--network.norm-num-groups": "8",
    "--network.layers-per-block": "1",
    "--network.attention": "False True",
}
MLP_TINY: Final = {"--network.width": "16", "--network.depth": "1"}


class Toy(nn.Module):
    """A network with a few weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(torch.cat([x_t, time[:, None]], dim=1))
        return output


def names() -> dict[str, Any]:
    """Return the names that the pages explain but do not define."""
    my_data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    teacher = halfstep.NetworkDenoiser(Toy(), halfstep.VPCosine(), halfstep.V())
    return {
        "teacher": teacher,
        "my_network": Toy(),
        "network": Toy(),
        "my_data": my_data,
        "batches": my_data,
        "shape": (2,),
        "noise": my_data[:4],
        "x_t": my_data[:5],
        "denoiser": halfstep.GaussianDenoiser(halfstep.VPCosine()),
    }


def run_python(block: Block, given: dict[str, Any]) -> None:
    """Run a block, with few updates if it trains; `given` receives its names."""
    code = block.code
    if re.search(r"\b(distill|fit)\(", code):
        code = re.sub(r"\bnum_updates=[\d_]+", "num_updates=3", code)
    exec(compile("\n" * block.line + code, block.page, "exec"), given)


@functools.cache
def parsers() -> dict[str, ArgumentParser]:
    """Return the parsers of the verbs, which also serve shell completion."""
    (verbs,) = [action.choices for action in command_line()._actions if isinstance(action.choices, dict)]
    return verbs


def options_of(verb: str) -> dict[str, tuple[str, ...]]:
    """Return the options of a verb with the choices of their values."""
    actions = parsers()[verb]._option_string_actions
    return {option: tuple(action.choices or ()) for option, action in actions.items()}


def check(arguments: list[str]) -> None:
    """Check the verb, its options and values with choices against the parser."""
    if not arguments or arguments[0].startswith("--"):
        return
    verb, *rest = arguments
    known = options_of(verb)
    for option, value in itertools.pairwise([*rest, "--"]):
        if option.startswith("--") and option != "--" and rest != ["--help"]:
            assert option in known, f"{verb} has no option {option}"
            if known[option] and not value.startswith("--"):
                assert value in known[option], f"{option} {value}"


def shell_lines() -> list[tuple[str, str]]:
    """Return (place, line) of all shell blocks except the Slurm script, which test_operations runs."""
    return [
        (f"{block.page}:{block.line}", line)
        for block in BLOCKS
        if block.language == "bash" and not block.code.startswith("#!")
        for line in lines_of(block)
    ]


def test_every_block_has_a_language_that_is_run() -> None:
    assert {block.language for block in BLOCKS} <= {"", "bash", "python", "yaml"}
    # A block without a language is a diagram.
    for block in BLOCKS:
        if not block.language:
            assert "halfstep " not in block.code.replace("halfstep/", ""), f"{block.page}:{block.line}"


def test_every_command_of_the_pages_is_valid() -> None:
    shown = [(place, arguments_of(line)) for place, line in shell_lines()]
    shown += [(page, arguments_of(line)) for page, line in inline_commands()]
    found = 0
    for place, arguments in shown:
        if arguments is None or "VERB" in arguments:
            continue
        found += 1
        try:
            check(arguments)
        except Exception as error:
            error.add_note(f"{place}: halfstep {shlex.join(arguments)}")
            raise
    assert found > 100


def test_other_commands_refer_to_existing_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    launch = importlib.import_module("accelerate.commands.launch").launch_command_parser()
    # `make demo` creates it, too.
    made = {".venv"}
    for place, line in shell_lines():
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, place
        elif words[0] == "pip":
            assert set(re.findall(r"\w+", words[-1].partition("[")[2])) <= set(extras), place
        elif words[0] == "torchrun":
            importlib.import_module("torch.distributed.run").parse_args(words[1:])
        elif words[0] == "accelerate":
            launch.parse_args(words[2:])
        elif words[:3] == ["python", "-m", "venv"]:
            made.add(words[3])
        elif words[0] == "source":
            assert words[1].removesuffix("/bin/activate") in made, place
        elif words[:2] == ["python", "-c"]:
            compile(words[2], place, "exec")
        elif words[0] == "python":
            script = ROOT / words[1]
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in script.read_text() or option[2:] in script.read_text(), f"{place}: {option}"
        else:
            assert words[0] == "halfstep" or "curl" in line, f"{place}: {line}"


@pytest.fixture
def here(tmp_path: Path, demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a home and working folder with the finished run, photos, arrays and samples that the pages use."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("digits", "cifar10"):
        shutil.copytree(demo_run, tmp_path / "runs" / name)
    random = np.random.default_rng(0)
    np.save(tmp_path / "actions.npy", random.normal(size=(64, 2)).astype(np.float32))
    for index in range(32):
        picture = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        for folder in ("photos", "captioned", f"classes/{index % 2}", "samples"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / f"{index}.png")
        (tmp_path / "captioned" / f"{index}.txt").write_text("a b"[index % 3])
    (tmp_path / "prompts.txt").write_text("a\nb a\n")
    return tmp_path


def pipelines(folder: Path) -> None:
    """Save the tiny pipelines and the checkpoint that the pages use."""
    save_ddpm(folder / "my-ddpm")
    save_dit(folder / "my-dit")
    save_sd(folder / "my-sd", folder / "tokens")
    config = GOOGLE.model_copy(update={"num_classes": 0})
    (folder / "cifar_8.msgpack").write_bytes(checkpoint_bytes(params(config)))
    (folder / "cifar10.json").write_text(config.model_dump_json())
    main(["encode", "my-sd", "--data", "captioned", "--out", "latents"])


def with_options(arguments: list[str], options: dict[str, str]) -> list[str]:
    """Return a command with options replaced or added if its verb supports them."""
    known = options_of(arguments[0])
    kept: list[str] = []
    skipping = False
    for word in arguments:
        if word.startswith("--"):
            skipping = word in options
        if not skipping:
            kept.append(word)
    added = {option: value for option, value in options.items() if option in known}
    return kept + [word for option, value in added.items() for word in (option, *value.split())]


def tiny(arguments: list[str]) -> list[str] | None:
    """Return a command at a size that takes seconds, or None if it is only parsed."""
    verb, *rest = arguments
    if any(word == verb or any(word in given for given in rest) for word in ONLY_PARSED):
        return None
    rest = [os.path.expanduser(word) for word in rest]
    options: dict[str, str] = {}
    if verb in ("run", "train", "demo", "distill", "finish"):
        parts = {"distill": ("--matching", "--chain", "--engine"), "finish": ("--finish",)}.get(verb, ("--",))
        options |= {name: value for name, value in BUDGET.items() if name.startswith(parts)}
    if verb == "demo" or (verb == "run" and rest in (["digits"], ["digits", "--out", "runs/digits"])):
        # Resume the finished run of the fixture.
        return [verb, *rest, *TINY_DEMO]
    if verb in ("run", "train"):
        options |= MLP_TINY if rest[:1] == ["arrays"] else UNET_TINY
    if "--data.image-size" in rest or rest[:1] in (["images"], ["images_tiny"]):
        # The Frechet distance of more pixels takes seconds.
        options["--data.image-size"] = "8"
    if verb in ("run", "train", "study") and rest and rest[0] in DRY and "--dry-run" not in rest:
        rest.append("--dry-run")
    if rest[:1] in (["cifar10"], ["fashion_mnist"]) and "--data" not in rest:
        rest += ["--data", "digits"]
    if not {"--start", "--chain.start-steps", "--chain.students"} & {*rest} and (
        (verb == "distill" and rest[:1] != ["cifar-8"]) or (verb == "run" and rest[:1] == ["images"])
    ):
        # Two students of a default chain to four steps, instead of eight. The teacher cifar-8 takes 8 steps.
        options["--chain.start-steps"] = "16"
    if verb == "distill":
        # Other pages test measurements.
        rest.append("--evaluation.no-enabled")
    if verb == "evaluate":
        options |= {"--num-samples": "24", "--seeds": "1", "--search-gamma": "2"}
        options = {name: value for name, value in options.items() if name == "--num-samples" or name in rest}
    if verb == "sample":
        options |= {"--num-samples": "24"}
    if verb == "import":
        rest = ["cifar10.json" if word == "cifar10" else word for word in rest]
    return with_options([verb, *rest], options)


def run_shell(block: Block) -> None:
    """Run the halfstep commands of a block."""
    for line in lines_of(block):
        arguments = arguments_of(line)
        if arguments is None or (given := tiny(arguments)) is None:
            continue
        try:
            main(given)
        except SystemExit as end:
            if end.code not in (0, None):
                raise AssertionError(f"{block.page}:{block.line}: {line}: exit code {end.code} of {given}") from end
        except BaseException as error:
            error.add_note(f"{block.page}:{block.line}: {line}\nrun as: halfstep {shlex.join(given)}")
            raise


def blocks_on(page: Path) -> list[Block]:
    return [block for block in BLOCKS if block.page == page.relative_to(ROOT).as_posix()]


PYTHON: Final = [
    page
    for page in PAGES
    if page.name not in ("CONTRIBUTING.md", "tutorial.md", "pipelines.md")
    and any(block.language == "python" for block in blocks_on(page))
]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, here: Path) -> None:
    given = names()
    for block in blocks_on(page):
        if block.language == "python":
            run_python(block, given)


SHELL: Final = [
    page
    for page in PAGES
    if any(block.language == "bash" and not block.code.startswith("#!") for block in blocks_on(page))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page: Path, here: Path) -> None:
    """Run commands and Python in the order of the page. The fast tests above parse the commands and run the Python."""
    if "my-" in page.read_text(encoding="utf-8"):
        pipelines(here)
    given = names()
    for block in blocks_on(page):
        if block.language == "python" and page.name != "CONTRIBUTING.md":
            run_python(block, given)
        elif block.language == "bash" and not block.code.startswith("#!"):
            run_shell(block)


def test_the_manifest_runs_a_command_that_exists() -> None:
    (block,) = (block for block in BLOCKS if block.language == "yaml")
    (container,) = yaml.safe_load(block.code)["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "halfstep"
    check(container["command"][1:])


def test_the_classes_of_contributing_can_be_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Define the templates with the names that their files import and with separate registries."""
    for name in ("my_method", "my_recipe"):
        for registry in (objectives, recipes):
            # The templates' members are removed again after the test.
            monkeypatch.setitem(registry, name, None)
            monkeypatch.delitem(registry, name)
    given: dict[str, Any] = {}
    for module in ("halfstep.samplers", "halfstep.objectives", "halfstep.core.prediction", "dataclasses", "typing"):
        given |= vars(importlib.import_module(module))
    given |= {"samplers": Registry("a"), "objectives": Registry("b"), "STUDENT": "student", "Mapping": Mapping}
    for block in blocks_on(ROOT / "CONTRIBUTING.md"):
        if block.language == "python":
            exec(compile(block.code, block.page, "exec"), given)
    defined = given["MyMethod"](num_steps=4)
    assert defined.outcome.num_steps == 4
    assert set(defined.evals) == {"student", "teacher"}


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = (ROOT / "docs" / "pages" / "reference").glob("*.md")
    found = [name for page in pages for name in re.findall(r"^::: halfstep\.([\w.]+)$", page.read_text(), re.MULTILINE)]
    assert len(found) == len(set(found))
    assert set(halfstep.__all__) - {"objectives"} == {name for name in found if "." not in name}
