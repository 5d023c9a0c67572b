"""All verbs from outside: help, examples, exit codes, and JSON for each table."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halfstep.cli import main
from halfstep.cli.completion import arguments_of, command_line
from halfstep.cli.verbs import EXIT_CODES, VERBS
from halfstep.models.folder import load
from halfstep.recipes import Recipe, build
from halfstep.run.measuring import calls_of_measuring
from halfstep.runs import RunFolder
from halfstep.runtime.files import read_sealed
from support_cli import Capture, refused
from toys import TINY_ARRAYS

ROOT = Path(__file__).parents[2]
FIRST = {"run": ["digits"], "train": ["digits"], "distill": ["MODEL"]}
"""Arguments that must precede the options."""


@pytest.fixture(scope="module")
def run(toy_run: Path) -> Path:
    return toy_run


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wide enough for one line each, but too narrow for two boxes side by side.
    monkeypatch.setenv("COLUMNS", "100")


@functools.cache
def parsers() -> dict[str, ArgumentParser]:
    """Return the parsers of the verbs, which also serve shell completion."""
    (verbs,) = [action.choices for action in command_line()._actions if isinstance(action.choices, dict)]
    return verbs


def options_of(verb: str) -> dict[str, tuple[str, ...]]:
    """Return the options of a verb with the choices of their values."""
    actions = parsers()[verb]._option_string_actions
    return {option: tuple(action.choices or ()) for option, action in actions.items() if option.startswith("--")}


def help_of(argv: list[str], capsys: Capture) -> str:
    """Return the output of a command with --help."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))


def options_in(printed: str) -> dict[str, str]:
    """Return the option headings in a help text, each with the beginning of its description."""
    lines = [line.strip("│ ") for line in printed.splitlines()]
    found = {}
    for line, after in itertools.pairwise([*lines, ""]):
        if re.match(r"--?[a-z][\w.-]*(,| |$)", line):
            head, *text = re.split(r"\s{2,}", line, maxsplit=1)
            found[head] = text[0] if text else after
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_complete_and_ends_with_examples(verb: str, capsys: Capture) -> None:
    printed = help_of([verb, "--help-all"], capsys)
    for example in VERBS[verb].examples:
        assert f"  {example}\n" in printed
    assert "exit codes: " + ", ".join(map(str, VERBS[verb].codes)) in printed
    for option, text in options_in(printed).items():
        assert re.match(r"[^(\s]", text), f"{option} is not described"
    assert "{None}|" not in printed.replace("{None}|{", "")


def test_the_help_of_train_is_its_own(capsys: Capture) -> None:
    printed = help_of(["train", "digits", "--help"], capsys)
    assert "only the teacher" in printed
    assert "runs/NAME-teacher by default" in printed


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_that_shells_complete_are_those_of_the_parser(verb: str, capsys: Capture) -> None:
    short = (
        {"--help-all"} | {"--data", "--start", "--to"}
        if verb in ("run", "train", "demo", "distill")
        else {"--help-all"}
    )
    short |= {"--help-all"} | ({"--steps"} if verb == "finish" else set())
    known = set(options_of(verb))
    parsed = set()
    for recipe in ("digits", "arrays", "cifar10_paper") if verb in ("run", "train") else ("",):
        printed = help_of([verb, *([recipe] if recipe else []), "--help-all"], capsys)
        # Only headings, because descriptions mention options of other verbs too.
        parsed |= set().union(*(flags_in(head) for head in options_in(printed)))
    assert parsed <= known
    # A recipe's help lists its own options; the completion lists those of all recipes.
    others = {flag for flag in known if flag.startswith(("--network.", "--facts."))} if short else set()
    assert known - parsed <= short | others


def commands() -> list[str]:
    """Return the command lines in the overview of verbs; test_pastable.py tests those of the pages."""
    return sorted({example for verb in VERBS.values() for example in verb.examples})


@pytest.mark.parametrize("command", commands())
def test_options_in_examples_exist(command: str) -> None:
    _, verb, *rest = shlex.split(command.partition(" > ")[0])
    known = options_of(verb)
    for token in rest:
        if token.startswith("--"):
            assert token in known
    for option, value in itertools.pairwise(rest):
        if known.get(option):
            assert value in known[option]


def test_every_verb_is_known_everywhere() -> None:
    for verb in VERBS.values():
        assert dataclasses.is_dataclass(arguments_of(verb))
        assert set(verb.codes) <= set(EXIT_CODES)
        assert verb.examples


def test_the_overview_lists_verbs_and_codes_without_torch(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    printed = help_of([], capsys)
    for name in VERBS:
        assert re.search(rf"^  {name}\b", printed, re.MULTILINE)
    for code in EXIT_CODES:
        assert re.search(rf"^ +{code}  ", printed, re.MULTILINE)
    assert help_of(["help"], capsys) == printed
    assert help_of(["help", "status"], capsys) == help_of(["status", "--help"], capsys)
    assert re.fullmatch(r"halfstep \d+\.\d+\.\d+\S*\n", help_of(["--version"], capsys))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("distill", "finish")])
def test_a_mistyped_option_suggests_the_nearest_one(verb: str, capsys: Capture) -> None:
    said = refused([verb, *FIRST.get(verb, []), "--hlep"], capsys)
    assert "unknown option '--hlep'; did you mean '--help'?" in said


@pytest.mark.parametrize(("typed", "meant"), [("--dta", "--data"), ("--strat", "--start")])
def test_short_names_of_recipe_options_are_suggested_too(typed: str, meant: str, capsys: Capture) -> None:
    assert f"did you mean {meant!r}?" in refused(["run", "digits", typed, "3"], capsys)


def test_a_mistyped_option_of_distill_too(run: Path, capsys: Capture) -> None:
    assert "did you mean '--to'?" in refused(["distill", str(run), "--tp", "4"], capsys)


def document(argv: list[str], capsys: Capture) -> dict:  # type: ignore[type-arg]
    """Return the single JSON document on stdout."""
    capsys.readouterr()
    main(argv)
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_run_ends_with_its_status_as_json(run: Path, toy_npy: Path, tmp_path: Path, capsys: Capture) -> None:
    data = str(toy_npy)
    argv = ["run", "arrays", "--data", data, "--out", str(run), *TINY_ARRAYS, "--json"]
    status = document(argv, capsys)
    assert status == document(["status", str(run), "--json"], capsys)
    assert status["state"] == "finished"
    assert [stage["stage"] for stage in status["stages"]] == ["00-denoise", "01-halve-0002", "02-halve-0001"]
    plan = document(
        ["run", "arrays", "--data", data, "--out", str(tmp_path / "x"), *TINY_ARRAYS, "--dry-run", "--json"], capsys
    )
    assert [(s["stage"], s["num_updates"]) for s in plan["stages"]] == [
        (s["stage"], s["num_updates"]) for s in status["stages"]
    ]
    assert sum(s["estimated_seconds"] for s in plan["stages"]) == pytest.approx(plan["estimated_seconds"])
    assert plan["estimated_seconds_of_measuring"] > 0
    assert not (tmp_path / "x").exists()


def test_a_plan_states_how_often_measuring_calls_the_network(run: Path) -> None:
    """The number is that of a finished run, whether its teacher is trained or given."""
    folder = RunFolder(run)
    recipe = Recipe.model_validate(folder.recipe()["recipe"])
    results = [result for stage in folder.stages() if (held := stage.metrics()) for result in held.results]
    calls = sum(result.num_evals for result in results)
    teacher = load(folder.stages()[0].path)
    quiet = recipe.model_copy(update={"evaluation": replace(recipe.evaluation, enabled=False)})
    assert calls_of_measuring(build(recipe)) == calls > 0
    assert calls_of_measuring(build(recipe, what="chain", teacher=teacher)) == calls
    assert calls_of_measuring(build(quiet)) == 0


def test_samples_and_figures_as_json(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "s.npz"
    drawn = document(["sample", str(run), "--num-samples", "5", "--seed", "2", "--out", str(out), "--json"], capsys)
    assert [drawn["num_samples"], *drawn["shape"]] == list(np.load(out)["arr_0"].shape)
    assert (drawn["first_seed"], drawn["num_steps"], drawn["model"]) == (2, 1, "02-halve-0001")
    listed = document(["ls", "samplers", "--json"], capsys)
    assert "ddim" in listed["samplers"]
    assert list(listed) == ["samplers"]
    cells = document(["study", "steps", "--dry-run", "--json", "--out", str(tmp_path / "st")], capsys)
    assert len(cells["cells"]) > 1
    assert not (tmp_path / "st").exists()


def test_evaluate_prints_its_files(run: Path, tmp_path: Path, capsys: Capture) -> None:
    figures = document(["evaluate", str(run), "--num-steps", "4", "--out", str(tmp_path / "e"), "--json"], capsys)
    assert figures == read_sealed(tmp_path / "e" / "evaluation.json")


def test_the_page_of_commands_is_the_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/commands.py writes the page; rerun it after a change of the verbs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import commands as page  # type: ignore[import-not-found]

    assert (ROOT / "docs" / "pages" / "commands.md").read_text(encoding="utf-8") == page.text()
