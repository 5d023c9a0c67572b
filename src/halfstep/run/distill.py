"""Distillation in memory, for models that are made in Python."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser, warn_of_gain
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction
from halfstep.core.weighting import Weighting
from halfstep.data import Data, DataConfig, MemoryData, held_on, open_data, training_batch
from halfstep.models.model import Model
from halfstep.models.students import copy_denoiser, matched_student, viewed
from halfstep.objectives import Batch, GuidanceRange, Halving, Plan
from halfstep.runtime.processes import make_accelerator
from halfstep.train.engine import StageTrainer, Window
from halfstep.train.feed import Batches, updates_ahead

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
    denoiser: NetworkDenoiser,
    data: Source,
    *,
    num_updates: int,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    weighting: Weighting | None = None,
    ema_decay: float = 0.995,
    seed: int = 0,
    precision: str = "float32",
    on_window: Callable[[str, Window], None] | None = None,
) -> NetworkDenoiser:
    """The denoiser itself, trained in place to denoise the data: a teacher.

    Args:
        data: as for `distill`.
        num_updates, batch_size, learning_rate: of AdamW, whose rate rises over a twentieth of the updates and then
            falls linearly to 0.
        weighting: of the squared error in x0; truncated SNR if None.
        ema_decay: of the moving average of the weights, which is what is left in the network; 0 for none.
        seed, precision, on_window: as for `distill`.

    Raises:
        ValueError: if the data cannot be used, or a setting is out of range.
        NonFinite: if training diverged.
    """
    (stage,) = Plan.teacher(
        num_updates=num_updates,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weighting=weighting,
        warmup_updates=num_updates // 20,
        anneal=True,
        ema_decay=ema_decay,
    ).stages
    accelerator = make_accelerator(precision)
    batches, ahead = as_batches(data, accelerator.device)
    return _trained(
        StageTrainer(denoiser, None, stage, batches, seed=seed, stream="fit", accelerator=accelerator, ahead=ahead),
        on_window,
    )


def _trained(trainer: StageTrainer, on_window: Callable[[str, Window], None] | None) -> NetworkDenoiser:
    """The result of a stage, run to its end."""
    for update in trainer.run():
        if update % 100 == 0 or update == trainer.last_update:
            window = trainer.window()
            if on_window is not None:
                on_window(trainer.stream, window)
    return trainer.finish()


def distill(
    teacher: NetworkDenoiser | Model,
    data: Source,
    *,
    to: int = 4,
    start: int | None = None,
    num_updates: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    plan: Plan | None = None,
    prediction: Prediction | None = None,
    process: NoiseProcess | None = None,
    guidance: float | tuple[float, float] | None = None,
    null: Cond | None = None,
    matching_updates: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    on_window: Callable[[str, Window], None] | None = None,
) -> NetworkDenoiser:
    """A student that samples in `to` steps what the teacher samples in `start`: the whole chain of halvings, in memory.

    A stage of matching comes first if `prediction`, `process` or `guidance` asks for it.

    Args:
        teacher: an unclipped denoiser, or a loaded model; it is not changed.
        data: clean samples `[n, *dims]` (float32 as they are; uint8 as images), opened data, a source such as a folder
            of images, or any iterable of batches x0 `[batch, *dims]` or (x0, cond) with cond from names to tensors
            `[batch, ...]`, which is begun again at its end.
        to: DDIM steps of the student.
        start: DDIM steps of the teacher, `to` times a power of two; 16 times `to` if None.
        num_updates, batch_size, learning_rate: of each stage; twice the updates at 2 steps and 1.
        plan: the halving stages, in the place of the arguments before it.
        prediction: what the student's network predicts; as the teacher's if None.
        process: the student's noise process; the teacher's if None.
        guidance: one scale, or a range of them that the student's network is shown as `guidance_scale` `[batch]`.
        null: what stands for no condition, for one sample, by the names of the conditions; needed for guidance.
        matching_updates: of the stage of matching; `num_updates` if None.
        seed: with the update, the key of every random number.
        on_window: called with the stage's name and its statistics at every hundredth update.

    Raises:
        ValueError: if `start` cannot be halved to `to`, the data cannot be used, or settings contradict each other.
        NonFinite: if training diverged.
    """
    current = teacher.denoiser if isinstance(teacher, Model) else teacher
    held_null = dict(null or (teacher.null if isinstance(teacher, Model) else {}))
    scales = (guidance, guidance) if isinstance(guidance, int | float) else guidance
    shown = None if scales is None or scales[0] == scales[1] else GuidanceRange(*scales)
    if shown is None and scales is None and isinstance(teacher, Model) and teacher.manifest.guidance is not None:
        low, high = teacher.manifest.guidance
        shown = None if low == high else GuidanceRange(low, high)
    if plan is not None and shown is not None:
        stages = (
            replace(s, objective=replace(s.objective, guidance=shown)) if isinstance(s.objective, Halving) else s
            for s in plan.stages
        )
        plan = Plan(tuple(stages))
    chain = plan or Plan.halvings(
        16 * to if start is None else start,
        to,
        num_updates=num_updates,
        batch_size=batch_size,
        learning_rate=learning_rate,
        guidance=shown,
    )
    if (prediction, process, scales) != (None, None, None):
        matching = Plan.matching(
            num_updates=num_updates if matching_updates is None else matching_updates,
            batch_size=batch_size,
            learning_rate=learning_rate,
            guidance=shown,
            guided=scales is not None,
        )
        chain = matching + chain
    elif matching_updates is not None:
        raise ValueError(
            f"matching_updates {matching_updates} says nothing without prediction, process or guidance: leave it out"
        )
    if null is not None and scales is None:
        raise ValueError("null says what stands for no condition, which only guidance asks: give guidance, or leave it")
    warn_of_gain(process or current.process, prediction or current.prediction)
    accelerator = make_accelerator(precision)
    batches, ahead = as_batches(data, accelerator.device)
    was_training = current.training
    frozen = [parameter.requires_grad for parameter in current.parameters()]
    result = current
    learned_from: Denoiser
    try:
        for name, stage in zip(chain.names(1), chain.stages, strict=True):
            if stage.num_steps is None:
                student = copy_denoiser(matched_student(prediction, process, shown is not None)(result))
                learned_from = viewed(result, student.process, scales, held_null)
            else:
                student, learned_from = copy_denoiser(result), result
            trainer = StageTrainer(
                student, learned_from, stage, batches, seed=seed, stream=name, accelerator=accelerator, ahead=ahead
            )
            result = _trained(trainer, on_window)
    finally:
        # The stages ask a teacher in evaluation mode and frozen; it goes back as it came, also if one diverged.
        current.train(was_training)
        for parameter, needed in zip(current.parameters(), frozen, strict=True):
            parameter.requires_grad_(needed)
    return result
