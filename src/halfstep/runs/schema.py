"""The types of a run folder's JSON files."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from halfstep.runs.record import Record

FORMAT = 4
"""The version of the run folder's layout. Readers reject any other version."""

RoleName = Literal["teacher", "matched", "student"]
"""A teacher is not distilled, a matched model was converted to another prediction, process or guidance, and a student
was distilled."""


class Pipeline(Record):
    """A diffusers pipeline in a folder or on the Hub."""

    kind: str
    """The class of the pipeline."""
    folder: str
    component: str
    """The part that the model replaces: unet or transformer."""
    averaged: bool = False
    """Whether the weights are the averaged ones stored next to the component (unet_ema)."""
    options: dict[str, Any] = Field(default={})
    """The arguments of the pipeline call, which are the same for all samples."""
    guidance: str | None = None
    """The name of the call argument that sets the guidance scale."""
    off: float | None = None
    """The value of this argument that disables guidance, or None if the network takes the scale as an input."""
    scale: float | None = None
    """The scale at which the network was trained, if the network takes the scale as an input."""
    end: str | None = None
    """The name of the call argument that sets a sound's end time in seconds, if end times can differ between sounds."""

    @property
    def single_scale(self) -> float | None:
        """The value of the argument `guidance` with which each step takes one network call, or None without it."""
        return self.scale if self.off is None else self.off


class Outcome(Record):
    """The role of a stage's model and how to sample it, as declared by the stage's objective."""

    role: RoleName
    num_steps: int | None = None
    """The number of sampler steps that the model was distilled for, or None for any number."""
    sampler: dict[str, Any] = Field(default={"type": "ddim"})
    """The sampler as {"type": its registered name, and its fields}."""

    @property
    def sampler_name(self) -> str:
        """The registered name of the sampler."""
        return str(self.sampler.get("type"))


class PlannedStage(NamedTuple):
    """A planned stage: a row of the plan in recipe.json."""

    name: str
    role: RoleName | None = None
    """The role of the stage's model, or None if the row does not contain a role."""
    num_steps: int | None = None
    num_updates: int = 0
    """The number of updates, or 0 for a given model."""
    update_cost: float = 1.0
    """The cost of an update, in single-sample forward passes."""


class Manifest(Record):
    """The manifest.json of a stage, which contains the model's origin and everything needed to rebuild the model."""

    format: int = FORMAT
    run: str | None = None
    """The `run` in recipe.json of the run that trained the model, or None outside a run."""
    stage: str
    objective: str
    parent: str | None
    """The stage from which the model was initialised."""
    teacher: str | None = None
    """The stage from which the model learned."""
    outcome: Outcome
    """The model's role, number of steps and sampler, which are recorded nowhere else."""
    start_steps: int | None = None
    """The number of steps of the first teacher in the stage's chain."""
    num_updates: int
    seconds: float
    """The training time of the stage, over all its restarts."""
    shape: tuple[int, ...]
    """The shape of one sample."""
    num_classes: int = 0
    """The number of classes that the model is conditioned on, or 0 for an unconditional model."""
    classes_shown: int | None = None
    """The number of classes in the training data (always the first classes), or None for all classes. Samples
    cycle through these classes."""
    class_names: tuple[str, ...] = ()
    """The labels or folder names of the model's classes, in order; empty if unknown."""
    conditions: dict[str, tuple[int, ...]] = Field(default={})
    """The model's other conditions, each with its per-sample shape."""
    guidance: dict[str, Any] | None = None
    """The guidance that the network has learned, as {"type": its registered name, and its fields}, or None if it has
    learned none."""
    guidance_scale: float | None = None
    """The default guidance scale, or None without guidance."""
    is_image: bool
    """Whether samples are images with values in [-1, 1]."""
    clip: bool
    """Whether sampling clips x0 to [-1, 1]."""
    network: dict[str, Any]
    """The network as {"type": its registered name, and its arguments}."""
    process: dict[str, Any]
    """The noise process as {"type": its registered name, and its fields}."""
    prediction: dict[str, Any]
    """The prediction as {"type": its registered name, and its fields}."""
    base: str | None = None
    """The stage of the same run that contains the base weights of this LoRA, or None if the model is not a LoRA."""
    pipeline: Pipeline | None = None
    """The diffusers pipeline that the model came from. An export copies the pipeline's other parts."""
    files: dict[str, str]
    """The sha256 of each file."""
    source: str | None = None
    """Where the model, or the teacher of its chain, was imported from."""
    data: str | None = None
    """The training data of the stage: the source and the number of samples."""
    weights_kept: bool = True
    """False once the weights have been removed because `chain.keep` does not include the stage."""

    @property
    def num_steps(self) -> int | None:
        """The number of sampler steps that the model was distilled for, or None for any number."""
        return self.outcome.num_steps

    def guidance_words(self) -> str:
        """Explain the pipeline's guidance scale, the effect of negative prompts, and the network calls per step."""
        if not self.num_classes and not self.conditions:
            return "The model is unconditional, so guidance has no effect. Each step takes one network call."
        pipeline = self.pipeline
        if self.guidance is None and pipeline is not None and pipeline.scale is not None:
            return (
                f"The network itself takes the scale as an input and was distilled at scale {pipeline.scale:g}: "
                f"pass {pipeline.guidance} {pipeline.scale:g}. Each step takes one network call."
            )
        ignored = "" if self.num_classes else " Negative prompts have no effect."
        if pipeline is None or pipeline.single_scale is None:
            single = None
        else:
            single = f"{pipeline.guidance} {pipeline.single_scale:g}"
        if self.guidance is None and single is None:
            learned = "is a teacher" if self.outcome.role == "teacher" else "has learned no guidance"
            return f"The model {learned}, and its pipeline applies none. Each step takes one network call."
        if self.guidance is None and self.outcome.role == "teacher":
            assert pipeline is not None
            base, negative = "cond" if pipeline.off == 0 else "uncond", ", and negative prompts work"
            # Pipelines with this argument apply it only if a negative prompt is passed.
            needed = " and a negative prompt" if pipeline.guidance == "true_cfg_scale" else ""
            return (
                f"The model is a teacher. {single} disables guidance, and each step takes one network call. With a "
                f"higher scale{needed}, each step takes two network calls, with and without the condition ({base} + "
                f"scale (cond - uncond)){'' if self.num_classes else negative}."
            )
        if self.guidance is None:
            return (
                f"The model has learned no guidance: pass {single}, so that each step takes one network call. A higher "
                "scale would call the model twice per step, with and without the condition, but the model was not "
                "distilled for that."
            )
        if self.guidance["type"] == "fixed":
            scale = self.guidance["scale"]
            passed, twice = "", ""
            if single is not None:
                passed = f" Pass {single}, which disables a pipeline's own guidance."
                twice = " With a higher scale, guidance would be applied twice."
            return (
                f"The model has learned the teacher's guidance at scale {scale:g} (uncond + {scale:g} (cond - "
                f"uncond)).{passed} Each step takes one network call, while the teacher needed two.{twice}{ignored}"
            )
        low, high = self.guidance["low"], self.guidance["high"]
        return (
            "The model has learned the teacher's guidance (uncond + scale (cond - uncond)) at all scales from "
            f"{low:g} to {high:g} and takes the scale as an input: pass guidance_scale in that range, because the "
            "model was not trained outside it. Each step takes one network call, while the teacher needed two."
            f"{ignored}"
        )


class Result(Record):
    """One row of metrics.json: the results of a model with a given sampler and number of steps."""

    sampler: str
    gamma: float | None = None
    """The gamma of ancestral sampling: 0 selects the lower bound of the variance, and 1 the upper bound."""
    num_steps: int
    num_evals: int
    """The number of network calls per sample."""
    frechet: float
    kid: float
    precision: float | None = None
    """Precision, recall and coverage are None if there are too few samples, or if the results come from an earlier
    version of halfstep."""
    recall: float | None = None
    coverage: float | None = None
    teacher_rmse: float | None = None
    """The RMS difference, on the scale [-1, 1], from the finest samples of the chain's first model, drawn from the same
    noise; None for those samples themselves."""
    seconds_per_1000: float
    """The wall time for 1,000 samples."""
    pace: tuple[str, int] | None = None
    """The device and the number of CPU threads that determined the time, or None for a result of an earlier version.
    Times are only compared if these are equal, which is assumed for two results of earlier versions."""
    samples: str | None = None
    """The path of the .npz with the first samples, relative to the stage's folder."""


class Metrics(Record):
    """The metrics.json of a stage."""

    run: str | None = None
    """The same as `Manifest.run`."""
    stage: str
    protocol: dict[str, Any]
    """The extractor, counts, reference data, seed and device. Results of different protocols must not be compared."""
    results: list[Result]
    files: dict[str, str] = Field(default={})
    """The sha256 of each sample file, keyed by its path in the stage's folder."""
    seconds: float | None = None
    """The wall time spent on sampling and measuring, excluding results that already existed."""
    note: str | None = None
    """A warning, if there are too few samples for reliable distances."""
    too_few: bool = False
    """Whether there are too few samples for a reliable Frechet distance (`best.too_few`)."""


def shortened(names: Sequence[str]) -> str:
    """Return the names on one line. If there are more than ten, only the first three and the last are shown."""
    return ", ".join(names if len(names) <= 10 else (*names[:3], "...", names[-1]))


def flatten(data: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested data into a dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
