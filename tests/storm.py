"""Random damage to any file of a run folder must never change a result silently.

`Storm` copies a finished or interrupted run, damages one file or folder of the copy, runs all readers on it, and runs
the same plan again. The run must either end with the weights, figures and samples of the undamaged run, or fail with
exit code 2 and one line that names one of its files and a remedy.
"""

import itertools
import json
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from markupsafe import Markup

import teams
import torture
from halfstep.cli.reporting import make_report
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import X0
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import MemoryData
from halfstep.models.folder import load
from halfstep.nets import UNet2D, own_state, unet2d_config
from halfstep.objectives import Matching, Plan, Training
from halfstep.report import figures, read_run
from halfstep.run.events import Notice, Progress
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.runs import RunFolder, read_status
from halfstep.runtime.files import DamagedFile
from halfstep.runtime.processes import FailedElsewhere
from halfstep.runtime.storage import exit_code
from toys import finish, points, toy_plan, toy_spec, weights

Seen = TypeVar("Seen")
REMEDY: Final = re.compile("restore|remove|choose another|start a new run|again", re.I)
"""Words of a remedy; every error must contain one."""


def other_spec() -> RunSpec:
    """Run `torture.spec` with another seed."""
    spec = torture.spec()
    return toy_spec(plan=spec.plan, evaluation=spec.evaluation, seed=1, recipe={"name": "toy", "seed": 1})


def lora_spec() -> RunSpec:
    """Return a run of a teacher and two LoRA students."""

    def network() -> UNet2D:
        config = unet2d_config(
            size=(4, 4), in_channels=1, out_channels=1, num_classes=0, block_out_channels=[8], layers_per_block=1,
            attention=[True], mid_attention=False, attention_head_dim=8, norm_num_groups=8,
        )  # fmt: skip
        return UNet2D(config, num_train_timesteps=64)

    return toy_spec(
        recipe={"name": "lora"},
        plan=toy_plan(6, 6),
        data=MemoryData("toy", points(160).reshape(20, 1, 4, 4)),
        network=network,
        lora_rank=2,
        evaluation=torture.spec().evaluation,
    )


def matched_spec() -> RunSpec:
    """Return a run of a teacher that is matched to x0 on another clock, and two students of the match."""
    plan = toy_plan(6, 6).stages
    training = Training(6, 1e-3, 16, ema_decay=0.5)
    match = Plan.of(Matching(16, prediction=X0(), process=VPCosine(-12, 12)), training)
    return toy_spec(
        recipe={"name": "matched"},
        plan=Plan(plan[:1]) + match + Plan(plan[1:]),
        evaluation=torture.spec().evaluation,
    )


def cut(spec: RunSpec, path: Path, stage: str, update: int) -> Path:
    """Run until this update of a stage, then abandon the run."""
    events = run(spec, path)
    next(e for e in events if isinstance(e, Progress) and e.name == stage and e.window.update >= update)
    events.close()  # type: ignore[attr-defined]
    return path


def _tried(call: Callable[[], Seen]) -> tuple[Seen | None, str]:
    """Return a reader's result, or None and its one-line message if it fails."""
    try:
        return call(), ""
    except ValueError as error:
        text = str(error)
    assert "\n" not in text, text
    return None, text


@contextmanager
def _each_figure_drawn_once(drawn: dict[str, Markup]) -> Iterator[None]:
    """Within it, `drawn` keeps a report's figures by all that is drawn: most faults leave most figures as they were."""
    draw_figure = figures._figure

    def kept(name: str, height: float, draw: Any, panels: Sequence[float] = (1.0,)) -> Markup:
        key = repr((name, height, panels, draw.__code__, [cell.cell_contents for cell in draw.__closure__]))
        if key not in drawn:
            drawn[key] = draw_figure(name, height, draw, panels)
        return drawn[key]

    figures._figure = kept
    try:
        yield
    finally:
        figures._figure = draw_figure


def samples(path: Path) -> dict[str, np.ndarray]:
    """Return the samples stored with the stages of a run, by path."""
    return {str(file.relative_to(path)): np.load(file)["arr_0"] for file in sorted(path.glob("stages/*/samples/*.npz"))}


def ended_by_two(path: str) -> tuple[list[str], str, str]:
    """Run the chain as one of two processes; write its messages, and the kind and text of its error."""
    said: list[str] = []
    try:
        said = [event.text for event in run(torture.spec(), Path(path)) if isinstance(event, Notice)]
    except (ValueError, OSError, FailedElsewhere) as error:
        return said, type(error).__name__, str(error)
    return said, "", ""


def cut_by_two(path: str) -> None:
    """Run the chain as one of two processes until an update of its second stage."""
    cut(torture.spec(), Path(path), "01-halve-0002", 10)


class Storm:
    """Random faults in copies of runs below `folder`; `ends` counts their outcomes.

    Args:
        kinds: "chain" with averages and finishes, "lora", "matched", and "pair", the chain run by two processes.
    """

    def __init__(self, folder: Path, seed: int = 0, kinds: Sequence[str] = ("chain", "lora", "matched")) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.drawn: dict[str, Markup] = {}
        chain = torture.spec()
        finish(chain, folder / "uncut")
        finish(other_spec(), folder / "other")
        cuts = [cut(chain, folder / f"cut-{name}", name, 10) for name in ("01-halve-0002", "03-finish-0002")]
        self.runs = [(chain, folder / "uncut", start) for start in (folder / "uncut", *cuts)]
        for name, spec, stage in (("lora", lora_spec(), "02-halve-0001"), ("matched", matched_spec(), "01-match")):
            if name in kinds:
                finish(spec, folder / name)
                begun = cut(spec, folder / f"cut-{name}", stage, 4)
                self.runs += [(spec, folder / name, start) for start in (folder / name, begun)]
        if "pair" in kinds:
            self.runs += [(None, folder / "pair", start) for start in self._made_by_two()]
        self.faults: dict[str, Callable[[Path], str]] = {
            name: getattr(self, name)
            for name in ("swap", "copy", "foreign", "delete", "truncate", "flip", "edit", "misplace")
        }

    def deal(self) -> None:
        """Apply each kind of fault to a copy of each run.

        Raises:
            AssertionError: naming the fault, if a result changed silently or an error has no remedy.
        """
        for number, (kind, (spec, uncut, start)) in enumerate(itertools.product(self.faults, self.runs)):
            path = self.folder / f"run-{number}"
            shutil.copytree(start, path)
            what = f"fault {number} ({start.name}): {kind} {self.faults[kind](path)}"
            try:
                self._read(path, uncut)
                self.ends[self._run(spec, path, uncut)] += 1
            except Exception as error:
                raise AssertionError(what) from error
            shutil.rmtree(path)

    def _made_by_two(self) -> list[Path]:
        """Run the chain with two processes; return the complete run and an interrupted one."""
        whole, begun = self.folder / "pair", self.folder / "cut-pair"
        for work, path in ((ended_by_two, whole), (cut_by_two, begun)):
            teams.together(2, work, self.folder / "left", str(path))
        return [whole, begun]

    def _run(self, spec: RunSpec | None, path: Path, uncut: Path) -> str:
        """Run to the end or to an error, with two processes if there is no `spec`; return the outcome."""
        said: list[str] = []
        if spec is None:
            first, second = teams.together(2, ended_by_two, self.folder / "left", str(path))
            said, kind, text = first
            assert (kind == "") == (second[1] == ""), f"one process ended well: {first}, {second}"
            if kind:
                self._check_refusal({"DamagedFile": DamagedFile}.get(kind, ValueError)(text), path)
                return "refused"
            return self._equal(path, uncut, bool(said))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HalfstepWarning)
            try:
                said += [event.text for event in run(spec, path) if isinstance(event, Notice)]
            except (ValueError, OSError) as error:
                self._check_refusal(error, path)
                return "refused"
        said += [str(warning.message) for warning in caught if issubclass(warning.category, HalfstepWarning)]
        return self._equal(path, uncut, bool(said))

    @staticmethod
    def _equal(path: Path, uncut: Path, is_said: bool) -> str:
        """Compare a run with the undamaged one."""
        for kind, of in (("weights", weights), ("figures", torture.figures), ("samples", samples)):
            own, theirs = of(path), of(uncut)
            # A foreign stage that is not in the plan is ignored.
            for name in theirs:
                assert np.array_equal(own[name], theirs[name]), f"other {kind}: {name}"
        return "equal, with a line" if is_said else "equal"

    @staticmethod
    def _check_refusal(error: ValueError | OSError, path: Path) -> None:
        text = str(error)
        assert exit_code(error) == 2, f"exit code {exit_code(error)}: {text}"
        assert "\n" not in text, text
        assert str(path) in text, text
        assert REMEDY.search(text), text

    def _read(self, path: Path, uncut: Path) -> None:
        """Run the readers: each must show the content of the undamaged run, omit it, or fail with one line."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HalfstepWarning)
            model, why = _tried(lambda: load(path))
        if model is None:
            assert path.name in why, why
        else:
            last = RunFolder(uncut).stages()[-1].name
            assert model.manifest.stage == last or any("is incomplete" in str(w.message) for w in caught)
            true = own_state(load(uncut / "stages" / model.manifest.stage).denoiser.network)
            mine = own_state(model.denoiser.network)
            assert all(np.array_equal(mine[name], true[name]) for name in true), "other weights are sampled"
        _tried(lambda: read_status(path))
        with _each_figure_drawn_once(self.drawn):
            _tried(lambda: make_report(path))
        facts, _ = _tried(lambda: read_run(path))
        if facts is None:
            return
        held = torture.figures(uncut)
        theirs = samples(uncut)
        for stage in facts.stages:
            shown = [] if stage.metrics is None else stage.metrics.model_dump(mode="json")["results"]
            assert (
                shown in ([], held[stage.name])
                or [{key: value for key, value in row.items() if key != "seconds_per_1000"} for row in shown]
                == held[stage.name]
            ), "other figures are shown"
            for steps, array in stage.samples.items():
                assert np.array_equal(array, theirs[f"stages/{stage.name}/samples/steps-{steps:04d}.npz"])

    # --- The faults: each damages one place and returns a description ---

    def _file(self, path: Path, pattern: str = "*") -> Path:
        # Small files matter as much as the many samples, so first draw a kind of file, then a file of this kind.
        kinds: dict[str, list[Path]] = {}
        for file in sorted(path.rglob(pattern)):
            if file.is_file() and file.name != ".lock" and file.stat().st_size:
                kinds.setdefault(re.sub("[0-9]+", "", f"{file.parent.name}/{file.name}"), []).append(file)
        return self.dice.choice(kinds[self.dice.choice(sorted(kinds))])

    def _pair(self, path: Path) -> tuple[Path, Path]:
        """Return two files or two folders of one kind."""
        while True:
            first = self._file(path)
            if self.dice.random() < 0.5 and first.parent != path:
                first = first.parent
            alike = [
                other
                for other in sorted(path.rglob("*"))
                if other != first and other.is_dir() == first.is_dir()
                and (other.parent == first.parent if first.is_dir() else other.name == first.name or (
                    other.parent == first.parent and other.suffix == first.suffix))
            ]  # fmt: skip
            if alike:
                return first, self.dice.choice(alike)

    @staticmethod
    def _put(source: Path, target: Path) -> None:
        if target.is_dir():
            shutil.rmtree(target)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def swap(self, path: Path) -> str:
        first, second = self._pair(path)
        aside = path.parent / "aside"
        first.rename(aside)
        second.rename(first)
        aside.rename(second)
        return f"{first.relative_to(path)} and {second.relative_to(path)}"

    def copy(self, path: Path) -> str:
        first, second = self._pair(path)
        if first.is_dir() and self.dice.random() < 0.3:
            second = first.with_name(f"{first.name}-copy")
        self._put(first, second)
        return f"{first.relative_to(path)} over {second.relative_to(path)}"

    def foreign(self, path: Path) -> str:
        """Replace a file or folder with that of a run with another seed, or of the undamaged run."""
        donor = self.folder / self.dice.choice(("other", "uncut", "cut-01-halve-0002"))
        there = self._file(donor)
        if self.dice.random() < 0.5 and there.parent != donor:
            there = there.parent
        place = path / there.relative_to(donor)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._put(there, place)
        return f"{there.relative_to(donor)} of {donor.name}"

    def delete(self, path: Path) -> str:
        file = self._file(path)
        if self.dice.random() < 0.5 and file.parent != path:
            shutil.rmtree(file.parent)
            return str(file.parent.relative_to(path))
        file.unlink()
        return str(file.relative_to(path))

    def truncate(self, path: Path) -> str:
        file = self._file(path)
        content = file.read_bytes()
        file.write_bytes(content[: self.dice.randrange(len(content))])
        return str(file.relative_to(path))

    def flip(self, path: Path) -> str:
        file = self._file(path)
        content = bytearray(file.read_bytes())
        bit = self.dice.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return f"bit {bit} of {file.relative_to(path)}"

    def edit(self, path: Path) -> str:
        """Change a number in a JSON file, or empty an entry."""
        file = self._file(path, "*.json*")
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        place = self.dice.randrange(len(lines))
        data = json.loads(lines[place])
        holders: list[tuple[Any, Any]] = []

        def look(value: Any) -> None:
            for key, held in value.items() if isinstance(value, dict) else enumerate(value):
                holders.append((value, key))
                if isinstance(held, dict | list):
                    look(held)

        look(data)
        numbers = [(v, k) for v, k in holders if isinstance(v[k], int | float)]
        holder, key = self.dice.choice(numbers or holders)
        if numbers and self.dice.random() < 0.7:
            holder[key] = self.dice.choice((holder[key] + 1, -holder[key] - 1, 1e308, str(holder[key])))
        else:
            holder, key = self.dice.choice(holders)
            holder[key] = self.dice.choice(({}, None, [], ""))
        lines[place] = json.dumps(data)
        file.write_text("\n".join(lines) + "\n")
        return f"{key!r} of {file.relative_to(path)} into {holder[key]!r}"

    def misplace(self, path: Path) -> str:
        """Replace a file with a folder, or a folder with a file."""
        file = self._file(path)
        if self.dice.random() < 0.5 and file.parent != path:
            place = file.parent
            shutil.rmtree(place)
            place.write_text("a file")
        else:
            place = self.dice.choice((file, path / ".lock"))
            place.unlink(missing_ok=True)
            (place / "something").mkdir(parents=True)
        return str(place.relative_to(path))
