"""Generates training data with the teacher, for distillation without a data set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Cond, Denoiser
from halfstep.core.door import check_denoiser, check_instance, check_shape, check_whole
from halfstep.core.draw import Draw, as_seed, sample_labels
from halfstep.core.grids import check_num_steps
from halfstep.data import LatentData, MemoryData, StandIn
from halfstep.models.model import Model, drawn_in_batches, samples_at_once
from halfstep.objectives import Guidance, Role
from halfstep.runtime.files import json_digest
from halfstep.runtime.tensors import read_cached, write_verified
from halfstep.samplers import DDIM, Heun, Sampler, sample, samplers

NUM_SAMPLES: Final = 4096
"""The number of samples generated from a teacher that is distilled without data."""
SOURCE: Final = "samples of the teacher"
"""The source of these samples, and the name of the random stream of their noise."""
NUM_STEPS: Final = 32
"""The number of Heun steps for an undistilled teacher. They take 63 network calls and match the quality of 256 DDIM
steps."""


def samples_of(
    teacher: Denoiser | Model,
    num_samples: int = NUM_SAMPLES,
    shape: tuple[int, ...] | None = None,
    *,
    num_steps: int | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> MemoryData:
    """Sample training data from the teacher, so that `distill` needs no other data.

    The cost is `num_samples` times the sampler's network calls: 4,096 samples with 32 Heun steps take 258,048 forward
    passes, as many as 288 finishing updates of 64 samples. No student can be better than these samples, which contain
    the teacher's errors and gaps. With too few samples, a student memorises them.

    A class-conditional model generates samples of each of its classes in turn. It is sampled without guidance unless it
    has learned a guidance scale. The noise comes from a random stream of its own, so evaluations never use the same
    noise.

    Args:
        shape: the shape of one sample; by default, that of a loaded model.
        num_steps: the number of sampler steps. By default, a student's own number of steps, or 32 for other models.
        sampler: a deterministic sampler. By default, a student's own sampler, or Heun for other models.
        seed: the seed of the noise.

    Raises:
        ValueError: if the shape is unknown, the sampler draws noise, the model needs conditions other than classes,
            or an argument has the wrong type.
    """
    shape = check_can_sample(teacher, shape)
    check_whole("the number of samples", num_samples)
    seed = as_seed(seed)
    if num_steps is not None:
        check_num_steps(num_steps)
    if sampler is not None:
        check_instance("the sampler", sampler, Sampler, "halfstep.Heun()")
    model = teacher if isinstance(teacher, Model) else None
    num_steps, method = sampling_of(teacher, num_steps, sampler)
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    labels = None
    if model is not None and model.num_classes:
        labels = sample_labels(range(num_samples), model.manifest.classes_shown or model.num_classes)

    def draw(places: range) -> Tensor:
        noise = Draw(seed, SOURCE, 0, num_samples, places).normal("noise", shape)
        cond = {} if model is None else model.cond(places, guidance_scale=_unguided(model))
        return sample(teacher, teacher.process.start_scale * noise, num_steps, method, cond).float()

    was_training = teacher.training
    teacher.eval()
    try:
        parts, _ = drawn_in_batches(num_samples, samples_at_once(device), draw)
    finally:
        teacher.train(was_training)
    return _as_data(torch.cat(parts), labels)


def sampling_of(teacher: Denoiser, num_steps: int | None = None, sampler: Sampler | None = None) -> tuple[int, Sampler]:
    """Return the number of steps and the sampler, by default a student's own, or 32 Heun steps for other models.

    Raises:
        ValueError: if the sampler draws noise at each step, because training data must depend only on the seed.
    """
    method: Sampler = sampler or (teacher.num_steps and (teacher.sampler or DDIM())) or Heun()
    if method.stochastic:
        remedy = "Choose a deterministic sampler" if sampler else "Draw the samples from another model"
        raise ValueError(f"{type(method).__name__} draws noise at each step. {remedy}")
    return num_steps or teacher.num_steps or NUM_STEPS, method


def _as_data(x: Tensor, labels: Tensor | None) -> MemoryData:
    classes = 0 if labels is None else int(labels.max()) + 1
    return MemoryData(SOURCE, x, labels, tuple(map(str, range(classes))))


def expected_from(teacher: Denoiser) -> StandIn:
    """Return random data that replaces the default samples of the teacher until they are drawn."""
    return StandIn(SOURCE, check_can_sample(teacher), NUM_SAMPLES, conditions={})


def key_of(teacher: Denoiser, recipe: Mapping[str, Any]) -> str:
    """Return a digest of everything that determines the default samples of the teacher, except the hardware.

    Args:
        recipe: the recipe of the call, which describes the teacher's network, weights, prediction and process.
    """
    num_steps, method = sampling_of(teacher)
    conditioning = {"num_classes", "classes_shown", "clip", "guidance", "guidance_scale"}
    sampling = {
        "num_samples": NUM_SAMPLES,
        "shape": check_can_sample(teacher),
        "num_steps": num_steps,
        "sampler": samplers.describe(method),
        "clip": (teacher.low, teacher.high) if isinstance(teacher, Clipped) else None,
        "model": teacher.manifest.model_dump(mode="json", include=conditioning) if isinstance(teacher, Model) else None,
    }
    described = {name: recipe[name] for name in ("seed", "network", "teacher", "prediction", "process")}
    return json_digest([described, sampling])


def read_samples(file: Path, key: str) -> MemoryData | None:
    """Return the samples that `write_samples` wrote with this key; None if they are missing or damaged."""
    held = read_cached(file)
    if not held or bytes(held["key"].tolist()).hex() != key:
        return None
    return _as_data(held["x"], held.get("labels"))


def write_samples(file: Path, key: str, data: MemoryData) -> None:
    """Write samples of the teacher and their key to a file.

    Raises:
        OSError, DamagedFile: see `write_tensors`.
    """
    labels = {} if data.labels is None else {"labels": data.labels}
    write_verified(file, {"x": data.x, **labels, "key": torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)})


def check_can_sample(teacher: Denoiser, shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the shape of the teacher's samples.

    Raises:
        ValueError: if the shape is unknown or differs from the teacher's, or the teacher needs conditions other than
            classes.
    """
    check_denoiser("the teacher", teacher, Denoiser)
    if isinstance(teacher, Model) and teacher.manifest.conditions:
        names = ", ".join(teacher.manifest.conditions)
        raise ValueError(
            f"the teacher cannot be sampled without {names}. Pass data that contains these conditions, such as a "
            "folder from halfstep encode --prompts"
        )
    if shape is None and teacher.shape is None:
        raise ValueError(
            "the sample shape is unknown. Pass data=samples_of(teacher, num_samples, shape), or your own data"
        )
    asked = check_shape(teacher.shape if shape is None else shape)
    if teacher.shape not in (None, asked):
        raise ValueError(f"the teacher's samples have the shape {list(teacher.shape or ())}, got {list(asked)}")
    return asked


def prompted_by(
    teacher: Model,
    num_samples: int,
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Callable[[range, Cond], Tensor]:
    """Return a function that samples the teacher, given indices below `num_samples` and their conditions.

    The samples are returned on the CPU.

    Args:
        num_steps: the number of Heun steps. By default, a student's own number of steps, or 32 for other models.
        guidance_scale: the guidance scale. None disables guidance.
        seed: the seed of the noise.

    Raises:
        ValueError: if the sampler of a student draws noise at each step.
    """
    steps, method = sampling_of(teacher, num_steps)
    scale = _unguided(teacher) if guidance_scale is None else guidance_scale

    def sampled(places: range, conditions: Cond) -> Tensor:
        teacher.eval()
        noise = Draw(seed, SOURCE, 0, num_samples, places).normal("noise", teacher.shape)
        cond = teacher.cond(places, guidance_scale=scale, others=conditions)
        x_1 = (teacher.process.start_scale * noise).to(teacher.device)
        return sample(teacher, x_1, steps, method, cond).float().cpu()

    return sampled


def effective_scale(teacher: Model, guidance_scale: float | None) -> float | None:
    """Return the guidance scale of the samples that `prompted_by` draws, or None if the teacher cannot be guided."""
    if guidance_scale is not None:
        return guidance_scale
    if teacher.manifest.guidance_scale is not None and _unguided(teacher) is None:
        return teacher.manifest.guidance_scale
    return _own_scale(teacher) if teacher.guidance is None else teacher.guidance.default_scale


def check_guidance_of(data: object, teacher: Model, learned: Iterable[Guidance]) -> None:
    """Raise ValueError if data was sampled at a guidance scale that the undistilled teacher's students do not learn.

    If the students learn guidance, unguided samples are also accepted. Data without a recorded guidance scale is always
    accepted, as is any data for a student or a matched teacher, which may have learned the scale of its pipeline.

    Args:
        learned: the guidance that stages of the plan learn.
    """
    if not isinstance(data, LatentData) or data.guidance_scale is None or teacher.role is not Role.TEACHER:
        return
    drawn, again = data.guidance_scale, "draw the samples again with halfstep encode --prompts"
    known = [*learned] or ([] if teacher.guidance is None else [teacher.guidance])
    if known:
        if drawn == 1 or any(guidance.covers(drawn) for guidance in known):
            return
        what, remedy = f"learn {known[0]}", f"Change this guidance, or {again}"
    elif drawn == (_own_scale(teacher) or 1.0):
        return
    elif teacher.takes_scale:
        pipeline = teacher.manifest.pipeline
        # Without a pipeline, the scale at which the network is called is unknown.
        if pipeline is None or pipeline.scale is None:
            return
        what = f"learn guidance scale {pipeline.scale:g}"
        remedy = f"Import the pipeline with --call {pipeline.guidance}={drawn:g}, or {again}"
    else:
        what, remedy = "learn no guidance", f"Add --matching.guidance-scale {drawn:g}, or {again}"
    raise ValueError(
        f"{data.source} contains samples drawn at guidance scale {drawn:g}, but the student would {what}. {remedy}"
    )


def _own_scale(model: Model) -> float | None:
    """Return the default guidance scale of a model that has learned no guidance, or None if there is no default."""
    pipeline = model.manifest.pipeline
    return pipeline.scale if model.takes_scale and pipeline is not None else _unguided(model)


def _unguided(model: Model) -> float | None:
    """Return the scale that disables guidance, or None if the model has learned a scale or cannot be guided."""
    return 1.0 if model.null and model.guidance is None and not model.takes_scale else None
