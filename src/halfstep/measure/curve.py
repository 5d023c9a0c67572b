"""The curve: the tables of an evaluation, from the store's figures of every model at every number of steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from time import monotonic
from typing import Any, Final, Literal, final

from filelock import FileLock, Timeout

from halfstep.measure.evaluate import Evaluation, Reference
from halfstep.measure.sources import Source, json_hash
from halfstep.measure.store import Cell, SameNoise, Store, seeds_name
from halfstep.metrics import METRICS
from halfstep.runs import EvaluationResult
from halfstep.runs.evaluation import EvaluationTable, Figure, Halves, Protocol, Row, Series
from halfstep.runtime.environment import environment
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import InUse, write_json

MANY: Final = 50_000
"""Samples from which on the Frechet distance's bias is ignored, by custom."""
SAVED: Final = 5.0
"""Seconds between two writes of the tables while nothing is drawn."""


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

    def __str__(self) -> str:
        return self.series if self.num_steps is None else f"{self.series} at {self.num_steps} steps"


@final
@dataclass(frozen=True)
class CurveSpec:
    """What is measured and how."""

    subject: str
    kind: Literal["run", "stage", "pipeline", "images"]
    series: Sequence[Series]
    entries: Sequence[Entry]
    evaluation: Evaluation
    references: Sequence[Reference]
    """The real data in one extractor each; all of the same rows."""
    reference_split: str | None
    num_seeds: int = 1
    """Sets of seeds: set k holds the seeds from k * num_samples on."""
    guidance_scale: float | None = None
    teacher: Entry | None = None
    """What the others are compared with from the same noise."""
    notices: Sequence[str] = field(default=())

    @property
    def seed_sets(self) -> list[range]:
        """The sets of seeds, disjoint."""
        size = self.evaluation.num_samples
        return [range(k * size, (k + 1) * size) for k in range(self.num_seeds)]


@final
@dataclass(frozen=True)
class Progress:
    """A cell's figures exist."""

    entry: Entry
    seeds: range
    figures: dict[str, dict[str, float]]
    """By extractor."""
    was_there: bool
    done: int
    total: int


@final
class Curve:
    """Measures what a specification asks for, and writes evaluation.json. Several processes do this together.

    Args:
        out: the evaluation's folder.
    """

    def __init__(self, spec: CurveSpec, store: Store, out: Path) -> None:
        self.spec, self.store, self.out = spec, store, out
        self.notices = list(dict.fromkeys(spec.notices))
        self._environment = environment()
        self._protocols = [self._protocol(reference) for reference in spec.references]
        self._cells = {
            (index, number): Cell(entry.source, entry.num_steps, seeds)
            for number, seeds in enumerate(spec.seed_sets)
            for index, entry in enumerate(spec.entries)
        }
        self._failed: set[tuple[int, int]] = set()
        self._found: dict[tuple[str, tuple[int, int]], dict[str, float]] = {}
        self._halves: dict[str, Halves] = {}
        self._seconds = 0.0
        self.result: EvaluationResult | None = None
        """The last version that was written; None on processes that do not write."""

    def run(self) -> Iterator[Progress]:
        """Measure all cells that are missing, and write evaluation.json after each.

        Raises:
            InUse: if another process writes the folder.
            NonFinite: if the samples of every cell are broken.
            Interrupted: if a stop was asked for; what was measured stays.
        """
        lock = FileLock(self.out / ".lock")

        def take() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InUse(f"{self.out} is being written by another halfstep process: wait for it") from None

        self.store.processes.on_main(take)
        try:
            yield from self._run()
        finally:
            lock.release(force=True)

    def _run(self) -> Iterator[Progress]:
        for reference, protocol in zip(self.spec.references, self._protocols, strict=True):
            self._warn_of_bias(reference, protocol)
            if (each := protocol.num_reference // 2) >= 2:
                halves = self.store.halves(reference)
                self._take(halves.missing, halves.seconds)
                self._halves[protocol.extractor] = Halves(num_each=each, figures=halves.values)
        written, done = 0.0, 0
        for part in self._rounds(list(self._cells)):
            found = self.store.figures([self._cells[key] for key in part], self.spec.references)
            told = []
            for key, row in zip(part, found, strict=True):
                done += 1
                entry, cell = self.spec.entries[key[0]], self._cells[key]
                kept = [one for one in row if one is not None]
                if not kept:
                    self._failed.add(key)
                    self._say(f"{entry} is left out: {self.store.broken[cell.name]}.")
                    continue
                for protocol, one in zip(self._protocols, kept, strict=True):
                    self._found[protocol.extractor, key] = one.values
                    self._take(one.missing, one.seconds)
                figures = {p.extractor: self._found[p.extractor, key] for p in self._protocols}
                was_there = all(one.was_there for one in kept)
                told.append(Progress(entry, cell.seeds, figures, was_there, done, len(self._cells)))
            # Cells that existed cost nothing, and a write after each would.
            if not all(one.was_there for one in told) or monotonic() - written > SAVED:
                self._write(complete=False)
                written = monotonic()
            yield from told
        if self._failed and not self._found:
            raise NonFinite(next(reversed(self.store.broken.values())))
        self._compare()
        self._write(complete=not self._failed)

    def _rounds(self, keys: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Yield as many cells at a time as processes measure them."""
        count = self.store.processes.count
        return (keys[first : first + count] for first in range(0, len(keys), count))

    def _say(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)

    def _take(self, missing: Sequence[str], seconds: float) -> None:
        self._seconds += seconds
        for sentence in missing:
            self._say(sentence)

    def _protocol(self, reference: Reference) -> Protocol:
        said = reference.protocol
        return Protocol(
            kind="sets",
            extractor=reference.extractor.name,
            extractor_facts={"dimension": reference.real.features.shape[1], **reference.extractor.facts},
            resize=reference.extractor.resize,
            reference_split=self.spec.reference_split,
            num_samples=self.spec.evaluation.num_samples,
            seeds=[seeds_name(seeds) for seeds in self.spec.seed_sets],
            guidance_scale=self.spec.guidance_scale,
            precision=self.spec.evaluation.precision,
            **{n: said[n] for n in ("reference", "reference_fingerprint", "num_reference", "reference_rows", "images")},
        )

    def _warn_of_bias(self, reference: Reference, protocol: Protocol) -> None:
        least, size = min(protocol.num_samples, protocol.num_reference), reference.real.features.shape[1]
        where = f"In {protocol.extractor} the Frechet distance of {protocol.num_samples:,} samples"
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

    def _compare(self) -> None:
        """Measure the distances from the same noise, for all cells of each set of seeds."""
        teacher = self.spec.teacher
        if teacher is None:
            return
        for number, seeds in enumerate(self.spec.seed_sets):
            base = Cell(teacher.source, teacher.num_steps, seeds)
            same_noise = SameNoise(base, self.spec.references[0].data.shape)
            keys = [key for key in self._cells if key[1] == number and key not in self._failed]
            for part in self._rounds([key for key in keys if self._cells[key].name != base.name]):
                for key, (kept,) in zip(
                    part, self.store.figures([self._cells[key] for key in part], [same_noise]), strict=True
                ):
                    if kept is None:
                        self._say(
                            f"Nothing is compared from the same noise: {teacher}: {self.store.broken[base.name]}."
                        )
                        return
                    self._take(kept.missing, kept.seconds)
                    self._found["same_noise", key] = kept.values

    def _chosen(self) -> list[int]:
        """Return the entries that are shown: of those that differ in gamma alone the best in the first table."""
        best: dict[tuple[str, int | None], tuple[float, int]] = {}
        chosen = []
        for index, entry in enumerate(self.spec.entries):
            if entry.gamma is None:
                chosen.append(index)
                continue
            figures = self._figures(self._protocols[0].extractor, index).get("frechet")
            place = (entry.series, entry.num_steps)
            if figures is not None and (place not in best or figures.mean < best[place][0]):
                best[place] = (figures.mean, index)
        return sorted([*chosen, *(index for _, index in best.values())])

    def _figures(self, table: str, index: int) -> dict[str, Figure]:
        """Return an entry's figures over all sets of seeds; none where a set was broken, for the others are another
        protocol."""
        numbers = range(self.spec.num_seeds)
        if any((index, number) in self._failed for number in numbers):
            return {}
        found = [one for number in numbers if (one := self._found.get((table, (index, number)))) is not None]
        figures = {}
        for name in METRICS:
            if values := [one[name] for one in found if name in one]:
                spread = stdev(values) if len(values) > 1 else None
                figures[name] = Figure(mean=fmean(values), spread=spread, values=values)
        return figures

    def _rows(self, table: str, chosen: Sequence[int]) -> list[Row]:
        rows = []
        for index in chosen:
            entry, figures = self.spec.entries[index], self._figures(table, index)
            if not figures:
                continue
            cells = [self._cells[index, number] for number in range(self.spec.num_seeds)]
            facts = [held for cell in cells if (held := self.store.facts(cell)) is not None]
            # Times of another machine do not belong in one column with those of this one.
            here = [held["seconds_per_1000"] for held in facts if held.get("pace") == self.store.pace]
            times = [seconds for seconds in here if seconds is not None]
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
        changes: dict[str, Any] = {
            "kind": "same_noise",
            "extractor": "none",
            "extractor_facts": {},
            "resize": "none",
            "reference": f"{teacher.stage or teacher.series}, {teacher}, from the same noise",
            "reference_split": None,
            "reference_fingerprint": json_hash(teacher.source.content),
            "num_reference": self.spec.evaluation.num_samples,
            "reference_rows": "all",
        }
        return [EvaluationTable(protocol=self._protocols[0].model_copy(update=changes), rows=rows)]

    def _write(self, complete: bool) -> None:
        if not self.store.processes.is_main:
            return
        chosen = self._chosen()
        tables = [
            EvaluationTable(protocol=p, rows=self._rows(p.extractor, chosen), halves=self._halves.get(p.extractor))
            for p in self._protocols
        ]
        tables += self._same_noise(chosen)
        shown = {name for table in tables for row in table.rows for name in row.figures}
        sampled = sum(facts["seconds"] for cell in self._cells.values() if (facts := self.store.facts(cell)))
        self.result = EvaluationResult(
            subject=self.spec.subject,
            kind=self.spec.kind,
            complete=complete,
            metrics={name: info for name, info in METRICS.items() if name in shown},
            series=list(self.spec.series),
            tables=tables,
            notices=self.notices,
            environment=self._environment,
            seconds=round(sampled + self._seconds, 2),
        )
        write_json(self.out / "evaluation.json", self.result.model_dump(mode="json"))
