"""Distillation in memory, for models that are made in Python."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Cond, Denoiser, NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction, TruncatedSNR, Weighting
from halfstep.data import Data, DataConfig, MemoryData, held_on, open_data, training_batch
from halfstep.data.base import Batches, updates_ahead
from halfstep.models.model import Model
from halfstep.nets import copy_denoiser, has_movable_clock
from halfstep.objectives import Batch, Denoising, Guidance, Plan, Role, Stage, Training, parents_of
from halfstep.run.course import Match, Start, course
from halfstep.run.own_samples import samples_of
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import Sampler
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine, Precision
from halfstep.train.window import Window

STUDENT_TRAINING: Final = Training(num_updates=1000, learning_rate=2e-4)

Source = Tensor | np.ndarray | Data | str | Iterable[Any]
"""Where batches come from; see `distill`."""


@final
class StreamedBatches:
    """Batches of any size from an iterable, cut and joined into those of the updates, and begun again at its end.

    Unlike all other data here, what an update sees is whatever comes next, not a function of the update's number. Each
    of several processes must be given the same batches, of which it takes its own share.

    Raises:
        ValueError: at the call, if an item is neither x0 nor (x0, cond), its parts differ in length, or the iterable
            gives nothing (a generator gives nothing the second time).
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._iterator: Iterator[Any] = iter(batches)
        self._held: list[Batch] = []
        self._seen = 0
        self._cut: tuple[tuple[str, int], Batch] | None = None

    def __call__(self, draw: Draw) -> Batch:
        key = (draw.stream, draw.update)
        if self._cut is None or self._cut[0] != key:
            self._cut = key, self._next_update(draw.batch_size)
        x0, cond = self._cut[1]
        mine = slice(draw.places.start, draw.places.stop)
        return Batch(x0[mine], {name: value[mine] for name, value in cond.items()})

    def _next_update(self, wanted: int) -> Batch:
        """The next batch of that size."""
        while sum(len(batch.x0) for batch in self._held) < wanted:
            self._held.append(self._next())
        names = list(self._held[0].cond)
        x0 = torch.cat([batch.x0 for batch in self._held])
        cond = {name: torch.cat([batch.cond[name] for batch in self._held]) for name in names}
        self._held = [Batch(x0[wanted:], {name: value[wanted:] for name, value in cond.items()})]
        return Batch(x0[:wanted], {name: value[:wanted] for name, value in cond.items()})

    def _next(self) -> Batch:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._batches)
            try:
                item = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"the batches ended after {self._seen} samples and cannot be begun again: pass a list, a "
                    "DataLoader or another iterable that can, not a generator"
                ) from None
        x0, cond = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        cond = {} if cond is None else cond
        if not isinstance(x0, Tensor) or not isinstance(cond, Mapping):
            raise ValueError(
                f"a batch must be x0 or (x0, cond), a tensor [batch, *dims] and a mapping of names to tensors "
                f"[batch, ...], got {type(x0).__name__} and {type(cond).__name__}"
            )
        if not x0.is_floating_point():
            raise ValueError(
                f"a batch's x0 must be of floats, got {x0.dtype}: scale pixels to [-1, 1] (x / 127.5 - 1), or pass "
                "them as one uint8 tensor [n, channels, height, width]"
            )
        if x0.ndim == 0 or len(x0) == 0 or any(len(value) != len(x0) for value in cond.values()):
            lengths = ", ".join(f"{name} of {len(value)}" for name, value in cond.items())
            raise ValueError(
                f"the parts of a batch need one length above 0, got x0 of shape {list(x0.shape)}"
                + (f" and {lengths}" if lengths else "")
            )
        if self._held and set(cond) != set(self._held[0].cond):
            raise ValueError(
                f"every batch needs the same conditions, got {sorted(cond)} after {sorted(self._held[0].cond)}"
            )
        self._seen += len(x0)
        return Batch(x0, cond)


def as_batches(data: Source, device: torch.device) -> tuple[Batches, int]:
    """The batches of clean samples `[n, *dims]`, of opened data, of a source that `open_data` opens, or of an iterable
    of x0 or (x0, cond); and for how many updates to make them ahead."""
    if isinstance(data, Data):
        held = data
    elif isinstance(data, str):
        held = open_data(DataConfig(source=data))
    elif isinstance(data, Tensor | np.ndarray):
        held = MemoryData("memory", torch.as_tensor(data))
    else:
        return StreamedBatches(data), updates_ahead(device, reads_files=False)
    near = held_on(device, held)
    return lambda draw: training_batch(near, draw, False), updates_ahead(device, not isinstance(held, MemoryData))


def fit(
    denoiser: Denoiser,
    data: Source,
    training: Training,
    *,
    weighting: Weighting | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    on_window: Callable[[str, Window], None] | None = None,
) -> Denoiser:
    """Train a denoiser in place to denoise the data, and return it: a teacher.

    Args:
        denoiser: a `NetworkDenoiser`, or a denoiser of one's own; it keeps its moving average if `training` has one.
        data: as for `distill`.
        weighting: of the squared error in x0; truncated SNR if None.
        seed, precision, on_window: as for `distill`.

    Raises:
        ValueError: if the data cannot be used.
        NonFinite: if training diverged.
    """
    stage = Stage(Denoising(weighting or TruncatedSNR()), training)
    return _trained(denoiser, None, stage, "fit", _Bench(data, seed, precision, on_window))


@final
class _Bench:
    """What all stages of one call share."""

    def __init__(
        self, data: Source, seed: int, precision: Precision, on_window: Callable[[str, Window], None] | None
    ) -> None:
        self.engine = Engine(precision=precision)
        self.accelerator = make_accelerator(precision)
        self.batches, self.ahead = as_batches(data, self.accelerator.device)
        self.seed, self.on_window = seed, on_window


def _trained(student: Denoiser, teacher: Denoiser | None, stage: Stage, name: str, bench: _Bench) -> Denoiser:
    """Run a stage to its end and return its result."""
    trainer = StageTrainer(
        student,
        teacher,
        stage,
        bench.batches,
        seed=bench.seed,
        stream=name,
        accelerator=bench.accelerator,
        engine=bench.engine,
        ahead=bench.ahead,
    )
    for update in trainer.run():
        if update % 100 == 0 or update == trainer.last_update:
            window = trainer.window()
            if bench.on_window is not None:
                bench.on_window(name, window)
    return trainer.finish()


def distill(
    teacher: Denoiser | Model,
    data: Source | None = None,
    *,
    to: int = 4,
    start: int | None = None,
    training: Training = STUDENT_TRAINING,
    plan: Plan | None = None,
    prediction: Prediction | None = None,
    process: NoiseProcess | None = None,
    guidance: Guidance | None = None,
    null: Cond | None = None,
    matching: Training | None = None,
    finish: Sequence[int] | Plan = (),
    teacher_sampler: Sampler | None = None,
    teacher_steps: int | None = None,
    seed: int = 0,
    precision: Precision = "float32",
    on_window: Callable[[str, Window], None] | None = None,
) -> Denoiser:
    """Return a student that samples in `to` steps what the teacher samples in `start`: the whole chain, in memory.

    The plan is the one that a recipe would make: a matching stage comes first where `prediction`, `process` or
    `guidance` asks for it, or where the teacher is clipped or predicts eps at a signal-to-noise ratio near 0.

    Args:
        teacher: a denoiser, or a loaded model; it is not changed. `Clipped` for images: the student is matched to its
            clipped x0.
        data: clean samples `[n, *dims]` (float32 as they are; uint8 as images), opened data, a source such as a folder
            of images, or any iterable of batches x0 `[batch, *dims]` or (x0, cond) with cond from names to tensors
            `[batch, ...]`, which is restarted at its end. If None, samples of the teacher: see `samples_of`.
        to: DDIM steps of the student.
        start: DDIM steps of the teacher, `to` times a power of two; if None a student's own, or 16 times `to`.
        training: of each halving stage; twice the updates at 2 steps and 1.
        plan: the halving stages instead of `to`, `start` and `training`.
        prediction: what the student's network predicts; as the teacher's if None.
        process: the student's noise process; the teacher's, or the cosine clock for a matched U-Net, if None.
        guidance: what the student learns: `FixedGuidance`, or a `GuidanceRange` that its network is shown as
            `guidance_scale` `[batch]`.
        null: what stands for no condition, for one sample, by the names of the conditions; needed for guidance.
        matching: training of the matching stage; `training` if None.
        finish: students, by their steps, that are finished after the chain, or the stages of `Plan.finishes`; the last
            of them is returned.
        teacher_sampler: deterministic sampler of the first teacher; DDIM if None. Students teach by DDIM.
        teacher_steps: its steps for each step of the first student; 2 if None.
        seed: with the update, the key of every random number.
        on_window: called with the stage's name and its statistics at every hundredth update.

    Raises:
        ValueError: if `start` cannot be halved to `to`, the data cannot be used, or settings contradict each other.
        NonFinite: if training diverged.
    """
    current: Denoiser
    if isinstance(teacher, Model):
        current, known, held_null = teacher.denoiser, Start.of(teacher), dict(null or teacher.null)
    else:
        clipped = isinstance(teacher, Clipped)
        bare = teacher.denoiser if isinstance(teacher, Clipped) else teacher
        known = Start(teacher.process, None, is_clipped=clipped)
        if isinstance(bare, NetworkDenoiser):
            may_move = has_movable_clock(bare.network)
            known = Start(teacher.process, bare.prediction, may_move=may_move, is_clipped=clipped)
        current, held_null = teacher, dict(null or {})
    wanted = Match(matching or training, prediction, None if process is None else lambda _: process, guidance)

    def halvings(learned: Guidance | None) -> Plan:
        if plan is None:
            first = known.num_steps or 16 * to if start is None else start
            return Plan.halvings(
                first, to, training, guidance=learned, teacher_sampler=teacher_sampler, teacher_steps=teacher_steps
            )
        return plan.guided(learned)

    if plan is not None and (teacher_sampler, teacher_steps) != (None, None):
        raise ValueError(
            "plan gives the halving stages, so teacher_sampler and teacher_steps have no effect. Remove them"
        )
    after = finish if isinstance(finish, Plan) else Plan.finishes(finish)
    chain = course(known, wanted, halvings, after=after)
    if null is not None and all(stage.objective.guidance is None for stage in chain.stages):
        raise ValueError("null stands for no condition, which only guidance needs. Pass guidance, or leave null out")
    if matching is not None and chain.stages[0].objective.outcome.role is not Role.MATCHED:
        raise ValueError(
            "matching has no effect without prediction, process, guidance or a Clipped teacher. Leave it out"
        )
    bench = _Bench(samples_of(teacher, seed=seed) if data is None else data, seed, precision, on_window)
    was_training = current.training
    frozen = [parameter.requires_grad for parameter in current.parameters()]
    made, outcomes = [current], [known.outcome]
    try:
        for name, stage in zip(chain.names(1), chain.stages, strict=True):
            parents = parents_of(stage.objective, outcomes)
            assert parents is not None
            seen = made[parents.teacher]
            student = copy_denoiser(stage.objective.start(made[parents.start]))
            made.append(_trained(student, stage.objective.view(seen, student, held_null), stage, name, bench))
            outcomes.append(stage.objective.outcome)
    finally:
        # The stages run a teacher in evaluation mode and frozen; it is restored, also if one diverged.
        current.train(was_training)
        for parameter, needed in zip(current.parameters(), frozen, strict=True):
            parameter.requires_grad_(needed)
    return made[-1]
