"""The store of samples and metrics that runs, `halfstep evaluate` and the studies use.

A *cell* is a source with a given number of steps and a given set of seeds. Its samples are stored so that other
extractors can reuse them, and its metrics (figures) are stored once per protocol:

FOLDER/
  cells/NAME/                 one cell; complete or absent
      cell.json               description of the samples, sampling time and machine
      samples.npz             arr_0: uint8 [n, h, w, c] for images, float32 [n, *dims] otherwise
  figures/NAME.json           the metrics of one cell in one protocol

Each NAME contains a hash of everything that the content depends on. A run's cells are stored in RUN/evaluation, where
the run, evaluations and studies may write at the same time. Each of them locks FOLDER/.store.lock during each write, so
that no other process takes unfinished files for leftovers.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from filelock import FileLock
from pydantic import TypeAdapter
from torch import Tensor

from halfstep.core.warnings import HalfstepWarning
from halfstep.measure.evaluate import FIGURES_FORMAT, Against, Reference
from halfstep.measure.samples import samples_array
from halfstep.measure.sources import ModelSource, Source
from halfstep.metrics import Figures, figures_of_halves, from_uint8, paired_figures, why_no_lpips
from halfstep.runs.schema import Result
from halfstep.runtime.environment import device_name
from halfstep.runtime.failures import NonFinite, told_when_out_of_memory
from halfstep.runtime.files import (
    DamagedFile,
    check_files,
    json_digest,
    read_arrays,
    read_sealed,
    replacing_folder,
    sha256_of,
    sweep,
    write_arrays,
    write_sealed,
)
from halfstep.runtime.locks import lock_of
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import Ancestral, samplers

PARTS: Final = 8
"""The minimum number of batches into which a cell is split by default, so that this many processes can share the cell.
The batch size may change the last bits of a sample, so it must not depend on the number of processes."""
HELD: Final = 2
"""The number of cells whose samples are kept in memory."""


@final
@dataclass(frozen=True)
class Cell:
    """A source with a given number of steps and a given set of seeds."""

    source: Source
    num_steps: int | None
    """The number of steps, or None for samples in files."""
    seeds: range

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that the samples depend on, as JSON values."""
        return {"content": self.source.content, "num_steps": self.num_steps, "seeds": seeds_name(self.seeds)}

    @cached_property
    def name(self) -> str:
        """The name of the cell's folder."""
        steps = "" if self.num_steps is None else f"-{self.num_steps:04d}"
        return f"{self.source.name}{steps}-{seeds_name(self.seeds)}-{json_digest(self.key, 10)}"


def seeds_name(seeds: range) -> str:
    """Return the name of a set of seeds, in the form `first-last`."""
    return f"{seeds[0]}-{seeds[-1]}"


@final
class SameNoise(Against):
    """Another cell's samples from the same noise, as the reference."""

    def __init__(self, base: Cell, shape: Sequence[int]) -> None:
        self.needs = (base,)
        # The reason is part of the name, so that LPIPS is measured as soon as its requirements are installed.
        lacking = why_no_lpips(shape) if base.source.is_image else None
        self.name = f"same-noise-{json_digest((FIGURES_FORMAT, base.key, lacking), 10)}"

    def figures(self, samples: Tensor, others: Sequence[Tensor]) -> Figures:
        return paired_figures(samples, others[0], self.needs[0].source.is_image)


class Kept(NamedTuple):
    """Stored metrics."""

    values: dict[str, float]
    missing: list[str]
    """One sentence for each metric that could not be measured."""
    seconds: float


KEPT: Final = TypeAdapter(Kept)


def _lock_of(folder: Path) -> FileLock:
    """Return the lock that is held while a file of the store in `folder` is written."""
    return lock_of(folder, ".store.lock")


def sweep_store(folder: Path) -> None:
    """Remove leftover files from the store in `folder`, unless another process is writing to it or it is read-only."""
    if folder.is_dir():
        with contextlib.suppress(OSError), _lock_of(folder).acquire(timeout=0):
            sweep(folder / "cells", folder / "figures")


@final
class Store:
    """A folder of samples and metrics, which are computed if they are missing.

    With several processes, all ranks must make the same calls. They share the work, and rank 0 writes the files.

    Args:
        batch_size: the number of samples per batch; by default, an eighth of a cell, but at most `Source.at_once`. The
            default is reduced if a batch does not fit into memory.
        own_device: whether to redraw cells that were drawn on another kind of device.
        check: a function that is called before each write and raises OSError if nothing may be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int | None = None,
        own_device: bool = False,
        processes: Processes | None = None,
        stop: StopSignal | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self.folder, self.batch_size, self._own_device = folder, batch_size, own_device
        self._lock = _lock_of(folder)
        self.processes, self._stop = processes or Processes(), stop
        self.pace = [device_name(), torch.get_num_threads()]
        """The factors other than the model that affect the sampling time."""
        self.broken: dict[str, str] = {}
        """Messages about cells with non-finite samples, by cell name."""
        self._held: dict[str, Tensor] = {}

    # --- Samples ---

    def facts(self, cell: Cell) -> dict[str, Any] | None:
        """Return the content of cell.json, or None if the cell does not exist."""
        file = self._path(cell) / "cell.json"
        facts = _read_or_warn(file) if file.exists() else None
        if facts is None or facts["key"] != cell.key:
            return None
        return facts if not self._own_device or facts["pace"][0] == self.pace[0] else None

    def samples(self, cell: Cell) -> Tensor:
        """Return the samples `[n, *shape]` of a filled cell for evaluation, with images rounded to uint8.

        Raises:
            DamagedFile: if the samples cannot be read.
        """
        held = self._held.pop(cell.name, None)
        if held is None:
            array = self._read(cell)
            if array is None:
                missing = f"the samples of {cell.name} in {self.folder} are missing"
                raise DamagedFile(f"{missing}. Run the same command again")
            held = torch.from_numpy(array)
            if cell.source.is_image:
                held = from_uint8(held.permute(0, 3, 1, 2))
        for name in list(self._held)[: len(self._held) - HELD + 1]:
            del self._held[name]
        self._held[cell.name] = held
        return held

    def fill(self, cells: Sequence[Cell]) -> None:
        """Draw missing samples on all processes, and record cells with non-finite samples in `broken`.

        Raises:
            Interrupted: if a stop was requested.
            OutOfMemory: if a batch does not fit into memory.
        """
        wanted = {cell.name: cell for cell in cells if cell.name not in self.broken}
        for name in self.processes.on_main(lambda: [cell.name for cell in wanted.values() if self._read(cell) is None]):
            self._draw(wanted[name])

    def _draw(self, cell: Cell) -> None:
        size = self.batch_size or max(1, min(cell.source.at_once, -(-len(cell.seeds) // PARTS)))
        tried = f"with {size} samples at once: lower --batch-size (in a run: --evaluation.batch-size)"
        if self.batch_size is None:
            tried = "even with fewer samples at once: free some memory for this process, or measure on the CPU"
            tried += " (engine.cpu)"

        def draw(seeds: range) -> tuple[Tensor, ...]:
            with told_when_out_of_memory(f"out of memory while sampling, {tried}"):
                drawn = cell.source.draw(cell.num_steps, seeds, self.batch_size)
            evals = -1 if drawn.num_evals is None else drawn.num_evals
            return drawn.x0, torch.tensor([drawn.seconds, evals], dtype=torch.float64)

        batches = [cell.seeds[first : first + size] for first in range(0, len(cell.seeds), size)]
        parts = self.processes.spread(batches, draw, self._stop)
        # The models of all cells may not fit into memory together.
        cell.source.release()
        if why := self.processes.on_main(lambda: self._keep(cell, parts or [])):
            self.broken[cell.name] = why

    def drop_samples(self, cell: Cell) -> None:
        """Remove the samples of a cell, but keep its metrics."""
        self._held.pop(cell.name, None)
        self.processes.on_main(lambda: (self._path(cell) / "samples.npz").unlink(missing_ok=True))

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def _read(self, cell: Cell) -> np.ndarray | None:
        facts, file = self.facts(cell), self._path(cell) / "samples.npz"
        if facts is None or not file.exists():
            return None
        try:
            check_files(file.parent, facts["files"], file.with_name("cell.json"))
            return read_arrays(file, "arr_0")["arr_0"]
        except DamagedFile as error:
            _warn(error)
            return None

    def _keep(self, cell: Cell, parts: Sequence[tuple[Tensor, ...]]) -> str | None:
        """Write the cell with these batches, or return a message if samples are not finite."""
        x0 = torch.cat([samples for samples, _ in parts])
        if not bool(torch.isfinite(x0).all()):
            return f"samples drawn in {cell.num_steps} steps are not finite. Choose another number of steps or sampler"
        times, evals = torch.stack([numbers for _, numbers in parts]).unbind(1)
        seconds, is_drawn = float(times.sum()), bool(evals[0] >= 0)
        facts = {
            "key": cell.key,
            "num_evals": int(evals[0]) if is_drawn else None,
            "seconds_per_1000": seconds * 1000 / len(x0) if is_drawn else None,
            "seconds": seconds,
            "pace": self.pace,
        }
        self._held.pop(cell.name, None)
        self._check()
        with self._lock, replacing_folder(self._path(cell)) as folder:
            if self.facts(cell) is None:
                # Existing metrics may be for samples from another device.
                for old in self.folder.glob(f"figures/{cell.name}-*.json"):
                    old.unlink(missing_ok=True)
            file = folder / "samples.npz"
            write_arrays(file, arr_0=samples_array(x0, cell.source.is_image))
            write_sealed(folder / "cell.json", facts | {"files": {file.name: sha256_of(file)}})
        return None

    # --- Figures ---

    def measure(self, cells: Sequence[Cell], against: Sequence[Against]) -> None:
        """Compute all missing metrics, except those that need samples of `broken` cells.

        In each round, every process measures one cell against one reference, and then the results are written.

        Raises:
            Interrupted, OutOfMemory: the results of completed rounds are kept.
        """
        pairs = {(cell.name, one.name): (cell, one) for cell in cells for one in against}
        absent = self.processes.on_main(lambda: [cell.name for cell in cells if self.facts(cell) is None])
        self.fill([cell for cell in cells if cell.name in absent])
        lacking = self.processes.on_main(lambda: [names for names, pair in pairs.items() if self.kept(*pair) is None])
        todo = [pairs[names] for names in lacking]
        self.fill([needed for cell, one in todo for needed in (cell, *one.needs)])
        todo = [pair for pair in todo if not self.is_broken(*pair)]
        for first in range(0, len(todo), self.processes.count):
            part = todo[first : first + self.processes.count]
            done = self.processes.spread(part, self._measured, self._stop)

            def write(part: Any = part, done: Any = done) -> None:
                for (cell, one), (told,) in zip(part, done, strict=True):
                    self._write(f"{cell.name}-{one.name}", json.loads(bytes(told.tolist())))

            self.processes.on_main(write)

    def is_broken(self, cell: Cell, one: Against) -> bool:
        """Return whether these metrics need the samples of a cell in `broken`."""
        return any(needed.name in self.broken for needed in (cell, *one.needs))

    def kept(self, cell: Cell, one: Against) -> Kept | None:
        """Return the metrics of a cell, or None if they do not exist."""
        return None if self.is_broken(cell, one) else self._kept(f"{cell.name}-{one.name}")

    def halves(self, reference: Reference) -> Kept:
        """Return the metrics that compare one half of the real data with the other. Call this only on rank 0."""
        name = f"halves-{reference.name}"
        if kept := self._kept(name):
            return kept
        held = _timed(lambda: figures_of_halves(reference.extractor, reference.real))
        self._write(name, held)
        return Kept(**held)

    def result(self, cell: Cell, reference: Reference) -> Result:
        """Measure a model's cell, and return the metrics as a row of metrics.json.

        Raises:
            NonFinite: if a sample is not finite.
        """
        self.measure([cell], [reference])
        if cell.name in self.broken:
            raise NonFinite(self.broken[cell.name])
        (values, *_), facts = self.processes.on_main(lambda: (self.kept(cell, reference), self.facts(cell)))
        assert isinstance(cell.source, ModelSource)
        assert cell.num_steps is not None
        sampler = cell.source.sampler
        return Result(
            sampler=samplers.name_of(sampler),
            gamma=sampler.gamma if isinstance(sampler, Ancestral) else None,
            num_steps=cell.num_steps,
            num_evals=facts["num_evals"],
            frechet=values["frechet"],
            kid=values["kid"],
            precision=values.get("precision"),
            recall=values.get("recall"),
            coverage=values.get("coverage"),
            seconds_per_1000=facts["seconds_per_1000"],
            pace=facts["pace"],
        )

    def _measured(self, pair: tuple[Cell, Against]) -> tuple[Tensor]:
        """Return the metrics of a pair as the bytes of a JSON string."""
        cell, one = pair
        held = _timed(lambda: one.figures(self.samples(cell), [self.samples(other) for other in one.needs]))
        return (torch.frombuffer(bytearray(json.dumps(held).encode()), dtype=torch.uint8),)

    def _write(self, name: str, figures: dict[str, Any]) -> None:
        self._check()
        with self._lock:
            write_sealed(self._file(name), {"name": name} | figures)

    def _kept(self, name: str) -> Kept | None:
        file = self._file(name)
        held = _read_or_warn(file) if file.exists() else None
        if held is not None and held.pop("name", None) != name:
            _warn(DamagedFile(f"{file} contains metrics that do not match its name"))
            return None
        return None if held is None else KEPT.validate_python(held)

    def _file(self, name: str) -> Path:
        return self.folder / "figures" / f"{name}.json"


def _read_or_warn(file: Path) -> dict[str, Any] | None:
    """Return the content of a sealed file. If the file is damaged, issue a warning and return None."""
    try:
        return read_sealed(file)
    except DamagedFile as error:
        _warn(error)
        return None


def _warn(error: DamagedFile) -> None:
    warnings.warn(f"{error}; it will be recomputed", HalfstepWarning, stacklevel=4)


def _timed(make: Callable[[], Figures]) -> dict[str, Any]:
    start = time.perf_counter()
    figures = make()
    return {**figures._asdict(), "seconds": round(time.perf_counter() - start, 3)}
