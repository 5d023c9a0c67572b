"""The tables of an evaluation, with the stored metrics of every model at every number of steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from time import monotonic
from typing import Any, Literal, NamedTuple, final

from halfstep.measure.evaluate import Against, Evaluation, Reference
from halfstep.measure.sources import Source
from halfstep.measure.store import Cell, Kept, SameNoise, Store, seeds_name, sweep_store
from halfstep.metrics import METRICS
from halfstep.runs import EvaluationResult
from halfstep.runs.evaluation import EvaluationTable, Figure, Halves, Protocol, Row, Series
from halfstep.runtime.environment import environment
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import json_digest, sweep, write_sealed
from halfstep.runtime.locks import acquire, lock_of


class Entry(NamedTuple):
    """One row of every table: a source with a given number of steps."""

    series: str
    stage: str | None
    source: Source
    num_steps: int | None
    gamma: float | None = None
    """The gamma of ancestral sampling, if several values are tried and only the best one is shown."""

    def words(self) -> str:
        """Describe the entry in a few words."""
        return self.series if self.num_steps is None else f"{self.series} at {self.num_steps} steps"


@final
@dataclass(frozen=True)
class CurveSpec:
    """The subject and the protocol of an evaluation."""

    subject: str
    kind: Literal["run", "stage", "pipeline", "images"]
    series: Sequence[Series]
    entries: Sequence[Entry]
    evaluation: Evaluation
    references: Sequence[Reference]
    """The real data for each extractor. All extractors use the same rows of the data."""
    reference_split: str | None
    num_seeds: int = 1
    """The number of sets of seeds. Set k starts at seed k * num_samples."""
    guidance_scale: float | None = None
    teacher: Entry | None = None
    """The model whose samples are the reference for the same-noise comparison."""
    notices: Sequence[str] = ()
    run: str | None = None
    """The value of `Manifest.run` in the measured run."""

    @property
    def seeds(self) -> list[range]:
        """The sets of seeds."""
        size = self.evaluation.num_samples
        return [range(k * size, (k + 1) * size) for k in range(self.num_seeds)]

    def cells(self, entry: Entry) -> list[Cell]:
        """Return the cells of an entry, one for each set of seeds."""
        return [Cell(entry.source, entry.num_steps, seeds) for seeds in self.seeds]


class CellDone(NamedTuple):
    """The event that `Curve.run` yields for each measured cell."""

    entry: Entry
    cell: Cell
    figures: dict[str, dict[str, float]]
    """The metrics for each extractor, keyed by name."""
    was_there: bool
    done: int


@final
class Curve:
    """An evaluation that writes its result to the folder `out`. All processes share the work."""

    def __init__(self, spec: CurveSpec, store: Store, out: Path) -> None:
        self.spec, self.store, self.out = spec, store, out
        self._environment = environment()
        self._notices: list[str] = []
        self._seconds = 0.0
        self._written = 0.0
        """The time of the last write in the main loop."""
        # The cells of a model are consecutive, so that the model is loaded once.
        self.cells = [(entry, cell) for entry in spec.entries for cell in spec.cells(entry)]
        self.result: EvaluationResult | None = None
        """The last result written, or None on processes that do not write."""

    def run(self) -> Iterator[CellDone]:
        """Measure all missing cells, and update evaluation.json as they are completed.

        Raises:
            InUse: if another process is writing to the folder.
            ValueError: if the processes measure different cells, because they see different stages or packages.
            NonFinite: if no cell has finite samples.
            Interrupted: if a stop was requested. Measured cells are kept.
        """
        names = [cell.name for _, cell in self.cells] + [same_noise.name for _, same_noise in self._bases()]
        self.store.processes.check_same(
            f"{len(self.cells)} cells, {json_digest(names, 10)}",
            "what they measure",
            "give all processes the same files and packages, and run the same command again",
        )
        lock = lock_of(self.out)

        def take() -> None:
            self.out.mkdir(parents=True, exist_ok=True)
            acquire(lock, f"{self.out} is being written by another halfstep process: wait until it ends")
            sweep(self.out)
            sweep_store(self.store.folder)

        self.store.processes.on_main(take)
        try:
            yield from self._run()
        finally:
            lock.release(force=True)

    def _run(self) -> Iterator[CellDone]:
        store, on_main, at_once = self.store, self.store.processes.on_main, self.store.processes.count
        for first in range(0, len(self.cells), at_once):
            part = self.cells[first : first + at_once]
            cells = [cell for _, cell in part]
            there = on_main(partial(self._there, cells))
            store.measure(cells, self.spec.references)
            figures = on_main(partial(self._updated, cells, is_due=not all(there)))
            for done, ((entry, cell), was_there, found) in enumerate(zip(part, there, figures, strict=True), first + 1):
                if found:
                    yield CellDone(entry, cell, found, was_there, done)
        if all(cell.name in store.broken for _, cell in self.cells):
            raise NonFinite(next(reversed(store.broken.values())))
        for base, same_noise in self._bases():
            cells = [cell for _, cell in self.cells if cell.seeds == base.seeds and cell.name != base.name]
            store.measure([cell for cell in cells if cell.name not in store.broken], [same_noise])
        complete = not any(cell.name in store.broken for _, cell in self.cells)
        on_main(partial(self._write, complete))

    def _there(self, cells: Sequence[Cell]) -> list[bool]:
        """Return, for each cell, whether its samples were drawn and all its metrics exist."""
        store, against = self.store, self.spec.references
        return [store.facts(cell) is not None and all(store.kept(cell, one) for one in against) for cell in cells]

    def _updated(self, cells: Sequence[Cell], is_due: bool) -> list[dict[str, dict[str, float]]]:
        """Update evaluation.json if it is due or older than 5 seconds, and return the metrics of the cells."""
        # Existing cells take no time, so writing the file after each one would dominate the run time.
        if is_due or monotonic() - self._written > 5:
            self._write(complete=False)
            self._written = monotonic()
        against, kept = self.spec.references, self.store.kept
        return [{one.extractor.name: held.values for one in against if (held := kept(cell, one))} for cell in cells]

    def _bases(self) -> list[tuple[Cell, SameNoise]]:
        """Return the teacher's cell for each set of seeds, and the reference for comparing other cells with it."""
        spec = self.spec
        cells = [] if spec.teacher is None else spec.cells(spec.teacher)
        return [(base, SameNoise(base, spec.references[0].data.shape)) for base in cells]

    def _write(self, complete: bool) -> None:
        """Write evaluation.json from the contents of the store."""
        spec, store = self.spec, self.store
        self._notices, self._seconds = list(spec.notices), 0.0
        bases = self._bases()
        for entry, cell in self.cells:
            self._seconds += (store.facts(cell) or {"seconds": 0.0})["seconds"]
            if cell.name in store.broken:
                self._notices.append(f"{entry.words()} was skipped: {store.broken[cell.name]}.")
        if spec.teacher is not None and (why := [w for base, _ in bases if (w := store.broken.get(base.name))]):
            self._notices.append(f"The same-noise comparison is missing ({spec.teacher.words()}: {why[0]}).")
        chosen = self._chosen()
        tables = []
        for one in spec.references:
            protocol, halves = self._protocol(one), None
            if one.note:
                self._notices.append(one.note)
            if (each := protocol.num_reference // 2) >= 2:
                halves = Halves(num_each=each, figures=self._counted(store.halves(one)).values)
            rows = self._rows(chosen, [one] * spec.num_seeds)
            tables.append(EvaluationTable(protocol=protocol, rows=rows, halves=halves))
        if spec.teacher is not None and (rows := self._rows(chosen, [one for _, one in bases])):
            tables.append(EvaluationTable(protocol=self._same_noise(spec.teacher), rows=rows))
        shown = {name for table in tables for row in table.rows for name in row.figures}
        self.result = EvaluationResult(
            run=spec.run,
            subject=spec.subject,
            kind=spec.kind,
            complete=complete,
            metrics={name: info for name, info in METRICS.items() if name in shown},
            series=list(spec.series),
            tables=tables,
            notices=list(dict.fromkeys(self._notices)),
            environment=self._environment,
            seconds=round(self._seconds, 2),
        )
        write_sealed(self.out / "evaluation.json", self.result.model_dump(mode="json"))

    def _counted(self, kept: Kept) -> Kept:
        """Return the metrics after recording their time and a notice for each missing metric."""
        self._notices += kept.missing
        self._seconds += kept.seconds
        return kept

    def _figures(self, entry: Entry, against: Sequence[Against]) -> list[Kept]:
        """Return an entry's metrics for each set of seeds. If a set failed, return [], because a row needs all sets."""
        pairs = list(zip(self.spec.cells(entry), against, strict=True))
        if any(cell.name in self.store.broken for cell, _ in pairs):
            return []
        return [kept for cell, one in pairs if (kept := self.store.kept(cell, one)) is not None]

    def _chosen(self) -> list[Entry]:
        """Return the entries to show. Among entries that differ only in gamma, the best in the first table is shown."""
        best: dict[tuple[str, int | None], tuple[float, Entry]] = {}
        chosen = [entry for entry in self.spec.entries if entry.gamma is None]
        for entry in self.spec.entries:
            found = self._figures(entry, [self.spec.references[0]] * self.spec.num_seeds)
            if entry.gamma is not None and found:
                mean, place = fmean(kept.values["frechet"] for kept in found), (entry.series, entry.num_steps)
                if place not in best or mean < best[place][0]:
                    best[place] = (mean, entry)
        return [*chosen, *(entry for _, entry in best.values())]

    def _rows(self, entries: Sequence[Entry], against: Sequence[Against]) -> list[Row]:
        """Return the rows of a table. `against` contains one reference for each set of seeds."""
        rows = []
        for entry in entries:
            kept = [self._counted(one).values for one in self._figures(entry, against)]
            figures = {}
            for name in METRICS:
                if values := [one[name] for one in kept if name in one]:
                    spread = stdev(values) if len(values) > 1 else None
                    figures[name] = Figure(mean=fmean(values), spread=spread, values=values)
            if not figures:
                continue
            facts = [held for cell in self.spec.cells(entry) if (held := self.store.facts(cell)) is not None]
            # Times from different machines cannot be compared.
            here = [held["seconds_per_1000"] for held in facts if held["pace"] == self.store.pace]
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
        order = [series.name for series in self.spec.series]
        return sorted(rows, key=lambda row: (order.index(row.series), -(row.num_steps or 0)))

    def _protocol(self, reference: Reference) -> Protocol:
        said, spec = reference.protocol, self.spec
        return Protocol(
            kind="sets",
            extractor=reference.extractor.name,
            extractor_facts={"dimension": reference.real.features.shape[1], **reference.extractor.facts},
            resize=reference.extractor.resize,
            reference_split=spec.reference_split,
            num_samples=spec.evaluation.num_samples,
            seeds=[seeds_name(seeds) for seeds in spec.seeds],
            guidance_scale=spec.guidance_scale,
            precision=spec.evaluation.precision,
            **{n: said[n] for n in ("reference", "reference_fingerprint", "num_reference", "reference_rows", "images")},
        )

    def _same_noise(self, teacher: Entry) -> Protocol:
        changes: dict[str, Any] = {
            "kind": "same_noise",
            "extractor": "none",
            "extractor_facts": {},
            "resize": "none",
            "reference": f"{teacher.stage or teacher.series}, {teacher.words()}, from the same noise",
            "reference_split": None,
            "reference_fingerprint": json_digest(teacher.source.content),
            "num_reference": self.spec.evaluation.num_samples,
            "reference_rows": "all",
        }
        return self._protocol(self.spec.references[0]).model_copy(update=changes)
