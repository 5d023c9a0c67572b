"""The curve: every model of a run, its baselines and others, at every number of steps, over several sets of seeds.

A *cell* is one series at one number of steps with one set of seeds. Its samples are kept, so that another extractor or
another reference draws nothing anew; its figures are kept for each protocol. Both are files that are whole or absent
(`runs/evaluation.py`), named by a hash of all that they depend on: a second call reads them, another protocol or other
weights find none.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, Literal, final

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from halfstep.measure.evaluate import Reference
from halfstep.measure.samples import samples_array
from halfstep.measure.sources import Drawn, Source
from halfstep.metrics import METRICS, Figures, figures_of, figures_of_halves, from_uint8, paired_figures, why_no_lpips
from halfstep.runs import EvaluationResult
from halfstep.runs.evaluation import EvaluationTable, Figure, Halves, Protocol, Row, Series
from halfstep.runtime.environment import environment
from halfstep.runtime.failures import NonFinite, told_when_out_of_memory
from halfstep.runtime.files import (
    DamagedFile,
    InUse,
    json_digest,
    read_arrays,
    read_json,
    replacing_folder,
    sweep,
    write_arrays,
    write_json,
)
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal

FIGURES_FORMAT: Final = 1
"""Of the kept figures; another number when a metric changes, so that old ones are taken anew."""
MANY: Final = 50_000
"""Samples from which on nobody speaks of the Frechet distance's bias, by custom."""


@final
@dataclass(frozen=True)
class Entry:
    """A source at one number of steps: a row of every table."""

    series: str
    stage: str | None
    source: Source
    num_steps: int | None
    gamma: float | None = None
    """Of ancestral sampling, where several are tried and the best is shown."""


@final
@dataclass(frozen=True)
class CurveSpec:
    """What is measured and how.

    Raises:
        ValueError: if a count is too small.
    """

    subject: str
    kind: Literal["run", "stage", "pipeline", "images"]
    series: Sequence[Series]
    entries: Sequence[Entry]
    references: Sequence[Reference]
    """The real data in one extractor each; all of the same rows."""
    reference_split: str | None
    num_samples: int
    num_seeds: int = 1
    """Sets of seeds: set k holds the seeds from k * num_samples on."""
    batch_size: int | None = None
    """Samples drawn at once; None for as many as the source draws by itself."""
    guidance_scale: float | None = None
    teacher: Entry | None = None
    """What the others are compared with from the same noise."""
    notices: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("num_seeds", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {value}")
        if not self.references:
            raise ValueError("no extractor was given: name at least one, such as pixels")
        if len({entry.source.precision for entry in self.entries}) > 1:
            raise ValueError("samples of one evaluation are drawn in one precision: give the others one of their own")

    @property
    def precision(self) -> str:
        """In which the networks of the entries compute."""
        return self.entries[0].source.precision if self.entries else "float32"

    @property
    def seed_sets(self) -> list[range]:
        """The sets of seeds, disjoint."""
        return [range(k * self.num_samples, (k + 1) * self.num_samples) for k in range(self.num_seeds)]


@final
@dataclass(frozen=True)
class CellDone:
    """A cell's figures are there."""

    entry: Entry
    seeds: range
    figures: dict[str, dict[str, float]]
    """By extractor."""
    was_there: bool
    done: int
    total: int


def _timed(make: Callable[[], Figures]) -> dict[str, Any]:
    """What is kept of figures: their values, what is missing, and the seconds that they took."""
    start = time.perf_counter()
    figures = make()
    seconds = round(time.perf_counter() - start, 3)
    return {"values": figures.values, "missing": figures.missing, "seconds": seconds}


def _seeds_name(seeds: range) -> str:
    return f"{seeds[0]}-{seeds[-1]}"


@final
class _Cell:
    """One entry with one set of seeds, on disk."""

    def __init__(self, folder: Path, spec: CurveSpec, entry: Entry, seeds: range, pace: Sequence[str | int]) -> None:
        self.spec, self.entry, self.seeds = spec, entry, seeds
        self.pace = list(pace)
        """What the time of sampling depends on beside the model: device and threads."""
        self.is_image = spec.references[0].data.is_image
        self.key = {
            "content": entry.source.content,
            "num_steps": entry.num_steps,
            "seeds": _seeds_name(seeds),
        }
        steps = "" if entry.num_steps is None else f"-{entry.num_steps:04d}"
        self.name = f"{entry.series}{steps}-{_seeds_name(seeds)}-{json_digest(self.key, length=10)}"
        self.path = folder / "cells" / self.name
        self.samples_path = self.path / "samples.npz"

    def facts(self) -> dict[str, Any] | None:
        """cell.json, or None if the cell is not there or is of another making."""
        try:
            held = read_json(self.path / "cell.json")
        except DamagedFile:
            return None
        return held if isinstance(held, dict) and held.get("key") == self.key else None

    def is_filled(self) -> bool:
        """Whether the samples are there and can be read."""
        return self.facts() is not None and self._read() is not None

    def fill(self, stop: StopSignal | None) -> None:
        """Draws the samples if they are not there."""
        if not self.is_filled():
            self._keep(self.entry.source.draw(self.entry.num_steps, self.seeds, self.spec.batch_size, stop))

    def fill_together(self, processes: Processes, stop: StopSignal | None) -> None:
        """Draws the samples if they are not there, batch by batch by several processes. Of broken ones none is kept."""
        if processes.on_main(self.is_filled):
            return

        def draw(seeds: range) -> tuple[Tensor, ...]:
            try:
                drawn = self.entry.source.draw(self.entry.num_steps, seeds, self.spec.batch_size, None)
            except NonFinite:
                return ()
            seconds = math.nan if drawn.seconds is None else drawn.seconds
            return drawn.x0, torch.tensor([seconds, math.nan if drawn.num_evals is None else drawn.num_evals])

        size = self.spec.batch_size or self.entry.source.at_once
        parts = processes.spread(
            [self.seeds[first : first + size] for first in range(0, len(self.seeds), size)], draw, stop
        )

        def keep() -> None:
            if parts and all(parts):
                numbers = torch.stack([told for _, told in parts])
                seconds, evals = float(numbers[:, 0].sum()), float(numbers[0, 1])
                x0 = torch.cat([samples for samples, _ in parts])
                self._keep(
                    Drawn(x0, None if math.isnan(seconds) else seconds, None if math.isnan(evals) else int(evals))
                )

        processes.on_main(keep)

    def _keep(self, drawn: Drawn) -> None:
        each = None if drawn.seconds is None else drawn.seconds * 1000 / len(drawn.x0)
        facts = {
            "key": self.key,
            "num_evals": drawn.num_evals,
            "seconds_per_1000": each,
            "seconds": drawn.seconds or 0.0,
            "pace": self.pace,
        }

        with replacing_folder(self.path) as folder:
            write_arrays(folder / "samples.npz", arr_0=samples_array(drawn.x0, self.is_image))
            write_json(folder / "cell.json", facts)

    def _read(self) -> np.ndarray | None:
        try:
            array = read_arrays(self.samples_path, "arr_0")["arr_0"]
        except DamagedFile:
            return None
        wanted = np.dtype(np.uint8 if self.is_image else np.float32)
        return array if len(array) == len(self.seeds) and array.dtype == wanted else None

    @cached_property
    def samples(self) -> Tensor:
        """The samples as they are measured: what was kept."""
        array = self._read()
        if array is None:
            raise DamagedFile(f"{self.samples_path} cannot be read: run the same command again")
        tensor = torch.from_numpy(array)
        return from_uint8(tensor.permute(0, 3, 1, 2)) if self.is_image else tensor

    def forget(self) -> None:
        """Frees the samples' memory."""
        self.__dict__.pop("samples", None)


@final
class Curve:
    """Fills an evaluation's folder.

    Args:
        out: the folder, RUN/evaluation.
    """

    def __init__(self, spec: CurveSpec, out: Path, stop: StopSignal | None = None) -> None:
        self.spec, self.out, self.stop = spec, out, stop
        self.notices = list(dict.fromkeys(spec.notices))
        self._sets = [self._protocol(reference) for reference in spec.references]
        self._environment = environment()
        self._pace = [self._environment["device"], self._environment["threads"]]
        self._cells = {
            (index, number): _Cell(out, spec, entry, seeds, self._pace)
            for number, seeds in enumerate(spec.seed_sets)
            for index, entry in enumerate(spec.entries)
        }
        self._failed: set[tuple[int, int]] = set()
        self._found: dict[tuple[str, tuple[int, int]], dict[str, float]] = {}
        self._halves: dict[str, Halves] = {}
        self._seconds: dict[str, float] = {}
        self._lock = FileLock(out / ".lock")
        self.result: EvaluationResult | None = None
        """What was written last."""

    def share(self, processes: Processes) -> None:
        """Measures all cells that are not there by several processes, which share out the samples of each cell and then
        the cells' figures: the first writes them, and then finds them in `run`, up to the end of which the folder is
        its own.

        Raises:
            InUse, Interrupted, FailedElsewhere: on all; what was measured stays.
        """
        processes.on_main(self._take)
        try:
            for cell in self._cells.values():
                cell.fill_together(processes, self.stop)
            cells = list(self._cells.values())
            # One for each process at a time, for what was made by then is written then.
            for first in range(0, len(cells), processes.count):
                done = processes.spread(cells[first : first + processes.count], self._figures_to_write, self.stop)
                processes.on_main(functools.partial(self._write_figures, done or []))
        except BaseException:
            self._lock.release()
            raise

    def _figures_to_write(self, cell: _Cell) -> tuple[Tensor]:
        """The figures of a cell that are not there, by their names, as JSON in bytes."""
        wanted = [(name, make) for _, name, make in self._makers(cell) if not self._figures_path(name).is_file()]
        # Of a cell whose samples are broken, and so are not there, `run` tells.
        made = {name: _timed(make) for name, make in wanted} if wanted and cell.is_filled() else {}
        cell.forget()
        return (torch.frombuffer(bytearray(json.dumps(made).encode()), dtype=torch.uint8),)

    def _write_figures(self, done: Sequence[tuple[Tensor, ...]]) -> None:
        for (told,) in done:
            for name, held in json.loads(bytes(told.tolist())).items():
                write_json(self._figures_path(name), held)

    def _take(self) -> None:
        """Takes the folder for this process.

        Raises:
            InUse: if another one has it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InUse(f"{self.out} is being written by another halfstep process: wait for it") from None
        sweep(self.out, self.out / "cells", self.out / "figures")

    def run(self) -> Iterator[CellDone]:
        """Measures all cells that are not there, and writes evaluation.json anew after each.

        Raises:
            InUse: if another process writes the folder.
            NonFinite: if the samples of every cell are broken.
            Interrupted: if a stop was asked for; what was measured stays.
        """
        self._take()
        try:
            yield from self._run()
        finally:
            self._lock.release(force=True)

    def _run(self) -> Iterator[CellDone]:
        for reference, protocol in zip(self.spec.references, self._sets, strict=True):
            self._say_of_bias(reference, protocol)
            self._measure_halves(reference, protocol)
        written = 0.0
        broken = None
        for done, (key, cell) in enumerate(self._cells.items(), start=1):
            if self.stop is not None:
                self.stop.check()
            try:
                was_there = self._measure(key, cell)
            except NonFinite as error:
                broken = error
                self._failed.add(key)
                self._say(f"{self._words(cell.entry)} is left out: {error}.")
                continue
            finally:
                cell.forget()
            # What was there costs nothing, and writing after each would.
            if not was_there or time.monotonic() - written > 5:
                self._write(complete=False)
                written = time.monotonic()
            found = {p.extractor: self._found[p.extractor, key] for p in self._sets}
            yield CellDone(cell.entry, cell.seeds, found, was_there, done, len(self._cells))
        if broken is not None and not self._found:
            raise broken
        self._compare()
        self._write(complete=not self._failed)

    def _words(self, entry: Entry) -> str:
        return entry.series if entry.num_steps is None else f"{entry.series} at {entry.num_steps} steps"

    def _say(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)

    def _protocol(self, reference: Reference) -> Protocol:
        said = reference.protocol
        return Protocol(
            kind="sets",
            extractor=reference.extractor.name,
            extractor_facts={"dimension": reference.real.features.shape[1], **reference.extractor.facts},
            resize=reference.extractor.resize,
            reference=said["reference"],
            reference_split=self.spec.reference_split,
            reference_fingerprint=said["reference_fingerprint"],
            num_reference=said["num_reference"],
            reference_rows=said["reference_rows"],
            num_samples=self.spec.num_samples,
            seeds=[_seeds_name(seeds) for seeds in self.spec.seed_sets],
            images=said["images"],
            guidance_scale=self.spec.guidance_scale,
            precision=self.spec.precision,
        )

    def _say_of_bias(self, reference: Reference, protocol: Protocol) -> None:
        least, size = min(self.spec.num_samples, protocol.num_reference), reference.real.features.shape[1]
        where = f"In {protocol.extractor} the Frechet distance of {self.spec.num_samples:,} samples"
        if least <= size:
            self._say(
                f"{where} to {protocol.num_reference:,} real ones says little: {size} dimensions need more than "
                f"{size} of each, better ten times as many; read KID instead."
            )
        elif least < MANY:
            self._say(
                f"{where} to {protocol.num_reference:,} real ones is biased upwards, the more the fewer they are: "
                "compare it within its table only."
            )

    def _kept(self, name: str, make: Callable[[], Figures]) -> tuple[Figures, bool]:
        """The figures in figures/`name`.json, made and kept if they are not there; and whether they were."""
        try:
            figures = self._read_figures(name)
            was_there = True
        except (DamagedFile, KeyError, TypeError, ValueError, AttributeError):
            write_json(self._figures_path(name), _timed(make))
            figures = self._read_figures(name)
            was_there = False
        for sentence in figures.missing:
            self._say(sentence)
        return figures, was_there

    def _read_figures(self, name: str) -> Figures:
        held = read_json(self._figures_path(name))
        figures = Figures({str(k): float(v) for k, v in held["values"].items()}, [str(t) for t in held["missing"]])
        self._seconds[name] = float(held["seconds"])
        return figures

    def _figures_path(self, name: str) -> Path:
        return self.out / "figures" / f"{name}.json"

    def _figures_name(self, protocol: Protocol, cell: str) -> str:
        """Unique to the cell and all of the protocol that its figures depend on."""
        real = (protocol.extractor, protocol.reference_fingerprint, protocol.num_reference)
        short = re.sub("[^a-z0-9]+", "-", protocol.extractor.lower())
        return f"{cell}-{short}-{json_digest((FIGURES_FORMAT, *real), length=10)}"

    def _measure_halves(self, reference: Reference, protocol: Protocol) -> None:
        each = protocol.num_reference // 2
        if each < 2:
            return
        name = self._figures_name(protocol, "halves")
        figures, _ = self._kept(name, lambda: figures_of_halves(reference.extractor, reference.real))
        self._halves[protocol.extractor] = Halves(num_each=each, figures=figures.values)

    def _measure(self, key: tuple[int, int], cell: _Cell) -> bool:
        """Draws and measures a cell where that was not done; returns whether all was there."""
        wanted = list(self._makers(cell))
        was_there = cell.facts() is not None and all(self._figures_path(name).is_file() for _, name, _ in wanted)
        if not was_there:
            cell.fill(self.stop)
        for extractor, name, make in wanted:
            figures, held = self._kept(name, make)
            was_there = was_there and held
            self._found[extractor, key] = figures.values
        return was_there

    def _makers(self, cell: _Cell) -> Iterator[tuple[str, str, Callable[[], Figures]]]:
        """Of each protocol the extractor, the name of the cell's figures, and what makes them."""
        for reference, protocol in zip(self.spec.references, self._sets, strict=True):

            def make(reference: Reference = reference) -> Figures:
                cell.fill(self.stop)
                with told_when_out_of_memory(
                    f"out of memory while measuring in {reference.extractor.name}: take fewer samples (--num-samples), "
                    "or an extractor with fewer features"
                ):
                    return figures_of(reference.extractor, reference.extractor.features(cell.samples), reference.real)

            yield protocol.extractor, self._figures_name(protocol, cell.name), make

    def _compare(self) -> None:
        """The distances from the same noise, for all cells of each set of seeds."""
        teacher = self.spec.teacher
        if teacher is None:
            return
        reference = self.spec.references[0]
        # What is installed later is measured then.
        lacking = why_no_lpips(reference.data.shape) if reference.is_image else None
        for number, seeds in enumerate(self.spec.seed_sets):
            base = _Cell(self.out, self.spec, teacher, seeds, self._pace)
            for index in range(len(self.spec.entries)):
                cell = self._cells[index, number]
                if (index, number) in self._failed or cell.name == base.name:
                    continue
                if self.stop is not None:
                    self.stop.check()

                def make(cell: _Cell = cell, base: _Cell = base) -> Figures:
                    for one in (base, cell):
                        one.fill(self.stop)
                    return paired_figures(cell.samples, base.samples, cell.is_image)

                digest = json_digest((FIGURES_FORMAT, base.key, lacking), length=10)
                name = f"{cell.name}-same-noise-{digest}"
                try:
                    figures, _ = self._kept(name, make)
                except NonFinite as error:
                    self._say(f"Nothing is compared from the same noise: {self._words(teacher)}: {error}.")
                    return
                finally:
                    cell.forget()
                if figures.values:
                    self._found["same_noise", (index, number)] = figures.values
            base.forget()

    def _chosen(self) -> list[int]:
        """The entries that are shown: all, but of those that differ in gamma alone the best in the first table."""
        best: dict[tuple[str, int | None], tuple[float, int]] = {}
        chosen = []
        for index, entry in enumerate(self.spec.entries):
            if entry.gamma is None:
                chosen.append(index)
                continue
            figures = self._figures(self._sets[0].extractor, index).get("frechet")
            place = (entry.series, entry.num_steps)
            if figures is not None and (place not in best or figures.mean < best[place][0]):
                best[place] = (figures.mean, index)
        return sorted([*chosen, *(index for _, index in best.values())])

    def _figures(self, table: str, index: int) -> dict[str, Figure]:
        """Of an entry, over all sets of seeds; none where one was broken, for the others are another protocol."""
        if any((index, number) in self._failed for number in range(self.spec.num_seeds)):
            return {}
        found = [
            self._found[table, (index, number)]
            for number in range(self.spec.num_seeds)
            if (table, (index, number)) in self._found
        ]
        figures = {}
        for name in METRICS:
            values = [figures_[name] for figures_ in found if name in figures_]
            if values:
                spread = stdev(values) if len(values) > 1 else None
                figures[name] = Figure(mean=fmean(values), spread=spread, values=values)
        return figures

    def _rows(self, table: str, chosen: Sequence[int]) -> list[Row]:
        rows = []
        for index in chosen:
            entry, figures = self.spec.entries[index], self._figures(table, index)
            if not figures:
                continue
            facts = [f for n in range(self.spec.num_seeds) if (f := self._cells[index, n].facts()) is not None]
            # Times of another machine are no column with those of this one.
            here = [f for f in facts if f.get("pace") == self._pace]
            times = [f["seconds_per_1000"] for f in here if f["seconds_per_1000"] is not None]
            rows.append(
                Row(
                    series=entry.series,
                    num_steps=entry.num_steps,
                    num_evals=facts[0]["num_evals"] if facts else None,
                    stage=entry.stage,
                    gamma=entry.gamma,
                    seconds_per_1000=fmean(times) if times else None,
                    figures=figures,
                )
            )
        order = {series.name: place for place, series in enumerate(self.spec.series)}
        return sorted(rows, key=lambda row: (order[row.series], -(row.num_steps or 0)))

    def _same_noise(self, chosen: Sequence[int]) -> list[EvaluationTable]:
        rows = self._rows("same_noise", chosen)
        teacher = self.spec.teacher
        if teacher is None or not rows:
            return []
        content = _Cell(self.out, self.spec, teacher, range(1), self._pace).key["content"]
        changes: dict[str, Any] = {
            "kind": "same_noise",
            "extractor": "none",
            "extractor_facts": {},
            "resize": "none",
            "reference": f"{teacher.stage or teacher.series}, {self._words(teacher)}, from the same noise",
            "reference_split": None,
            "reference_fingerprint": json_digest(content),
            "num_reference": self.spec.num_samples,
            "reference_rows": "all",
        }
        return [EvaluationTable(protocol=self._sets[0].model_copy(update=changes), rows=rows)]

    def _write(self, complete: bool) -> None:
        chosen = self._chosen()
        tables = [
            EvaluationTable(protocol=p, rows=self._rows(p.extractor, chosen), halves=self._halves.get(p.extractor))
            for p in self._sets
        ]
        tables += self._same_noise(chosen)
        shown = {name for table in tables for row in table.rows for name in row.figures}
        sampled = sum(facts["seconds"] for cell in self._cells.values() if (facts := cell.facts()) is not None)
        self.result = EvaluationResult(
            subject=self.spec.subject,
            kind=self.spec.kind,
            complete=complete,
            metrics={name: info for name, info in METRICS.items() if name in shown},
            series=list(self.spec.series),
            tables=tables,
            notices=self.notices,
            environment=self._environment,
            seconds=round(sampled + sum(self._seconds.values()), 2),
        )
        write_json(self.out / "evaluation.json", self.result.model_dump(mode="json"))
