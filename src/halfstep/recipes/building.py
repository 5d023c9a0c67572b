"""Build a run from a recipe, and check that the recipe's parts, the teacher and the data fit together."""

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch

from halfstep.core.noise import NoiseProcess, VPCosine
from halfstep.core.prediction import Prediction, predictions
from halfstep.data import Data, LatentData, StandIn, open_data, warn_of_scale
from halfstep.models.model import Model
from halfstep.objectives import Plan, Stage, objectives
from halfstep.recipes.schema import MatchingConfig, Recipe
from halfstep.run.course import IMAGE_RANGE, Start, check_start, course
from halfstep.run.own_samples import check_guidance_of
from halfstep.run.preflight import preflight
from halfstep.run.spec import FREE_SETTINGS, RunSpec
from halfstep.runs import Manifest
from halfstep.runs.schema import shortened
from halfstep.runtime.files import cache_folder, rounded_digest, user_path

FREE_FIELDS: Final = (
    *("chain.keep", "data.source", "data.skip_broken", "data.accept_changed"),
    *FREE_SETTINGS,
)
"""Fields that may change when a run resumes, because they do not change the trained models. Data is identified by its
samples, not by its source. Models are re-evaluated if the evaluation protocol changes.
"""
LATER_FACTS: Final = ("scheduler", "network", "call")
"""Facts of a teacher that runs of earlier versions lack."""


def data_or_stand_in(recipe: Recipe) -> tuple[Data, str | None]:
    """Return the recipe's data and None, or random pixels of the same shape and the reason why the data is missing.

    Raises:
        ValueError: if the data cannot be opened and the recipe has no `facts`.
    """
    data, facts = recipe.data, recipe.facts
    if facts is None:
        return open_data(data), None
    missing = f"{data.source} is a data set on the Hub, and a dry run downloads nothing"
    is_path = "/" not in data.source or data.source.startswith((".", "/", "~"))
    if is_path or user_path(data.source).exists():
        try:
            return open_data(data), None
        except ValueError as error:
            missing = str(error)
    channels, *sides = facts.shape
    shape = (data.channels or channels, *((data.image_size,) * 2 if data.image_size else sides))
    names = tuple(str(number) for number in range(facts.num_classes if data.labels else 0))
    return StandIn(data.source, shape, min(facts.num_samples, data.limit or facts.num_samples), names), missing


def build(
    recipe: Recipe,
    *,
    what: Literal["all", "teacher", "chain"] = "all",
    teacher: Model | None = None,
    data: Data | None = None,
    parent: Mapping[str, Any] | None = None,
) -> RunSpec:
    """Return the run that a recipe describes: the whole plan, only the teacher, or a chain from a given teacher.

    Args:
        data: the data to use instead of the recipe's data.
        parent: the identity of the given teacher, or None to use the teacher's stage, source and files.

    Raises:
        ValueError: if the data cannot be opened, the recipe's parts do not fit the data or each other, or the models
            cannot be evaluated.
    """
    process: NoiseProcess = VPCosine(recipe.model.log_snr_min, recipe.model.log_snr_max)
    prediction: Prediction = predictions[recipe.model.prediction]()
    opened = open_data(recipe.data) if data is None else data
    if teacher is None:  # A given teacher determines the scale of its data, such as the latents of an autoencoder.
        warn_of_scale(opened)
    origin: dict[str, Any] = {} if what == "all" else {"what": what}
    if teacher is None:
        start = Start(process, prediction, given=False, clip=IMAGE_RANGE if opened.is_image else None)
        # Reject a network that does not fit the data, without allocating weights.
        with torch.device("meta"):
            recipe.make_network(opened)
    else:
        start, process, prediction = Start.of(teacher), teacher.process, teacher.denoiser.prediction
        check_fit(teacher.manifest, opened)
        teacher = _with_null(teacher, recipe.matching, opened)
        # Runs from different teachers are different runs, even with the same settings.
        origin["parent"] = _identity(teacher.manifest) if parent is None else dict(parent)
    defaults = Recipe(name=recipe.name).model_dump(mode="json")
    later = {name: value for name, value in origin.get("parent", {}).items() if name in LATER_FACTS}
    plan = recipe.teacher_plan() if what in ("all", "teacher") else Plan()
    if what in ("all", "chain"):
        further = [Stage(objectives.rebuild(config.objective), config.training) for config in recipe.further]
        after = Plan(tuple(further)) + recipe.finish.plan()
        chain = course(start, recipe.matching.match(), recipe.chain_plan, recipe.chain.lora_rank, after)
        if teacher is not None:
            check_start(teacher, chain)
            check_guidance_of(opened, teacher, chain.learned)
        plan = plan + chain
    spec = RunSpec(
        recipe=recipe.model_dump(mode="json") | origin,
        plan=plan,
        data=opened,
        process=process,
        prediction=prediction,
        network=None if teacher is not None else lambda: recipe.make_network(opened),
        teacher=teacher,
        start_steps=recipe.chain.start_steps,
        keep=recipe.chain.keep,
        conditional=recipe.model.conditional if teacher is None else teacher.num_classes > 0,
        flip=recipe.data.flip,
        clip=opened.is_image if teacher is None else teacher.manifest.clip,
        seed=recipe.seed,
        lora_rank=recipe.chain.lora_rank,
        engine=recipe.engine,
        evaluation=recipe.evaluation,
        cache=cache_folder(),
        free=FREE_FIELDS,
        defaults=defaults | ({"parent": later} if later else {}),
    )
    preflight(spec)
    return spec


def _identity(teacher: Manifest) -> dict[str, Any]:
    """Return the facts that identify a teacher among the models from which a run can start."""
    own: dict[str, Any] = {"stage": teacher.stage, **teacher.files}
    if teacher.source is None:
        return own
    # The weights of a pipeline do not determine the noise levels and the prediction, which belong to its scheduler,
    # the settings of its network, or the arguments with which its call was recorded.
    digests = {
        "scheduler": rounded_digest([teacher.process, teacher.prediction, teacher.clip], 16),
        "network": rounded_digest(teacher.network, 16),
    }
    call = {} if teacher.pipeline is None else dict(teacher.pipeline.options)
    return own | {"source": teacher.source} | digests | ({"call": call} if call else {})


def _with_null(teacher: Model, config: MatchingConfig, data: Data) -> Model:
    """Return the teacher with null conditions, taken from the teacher itself, the recipe or the data."""
    null = dict(teacher.null)
    if config.null_class is not None:
        if not teacher.num_classes:
            raise ValueError(
                f"matching.null_class {config.null_class} has no effect, because this teacher has no classes. Remove it"
            )
        last = max(int(null.get("class_labels", 0)), teacher.num_classes - 1)
        if config.null_class > last:
            raise ValueError(
                f"matching.null_class {config.null_class} is not a class of the teacher. Choose one of 0 to {last}"
            )
        null = {"class_labels": torch.tensor(config.null_class)}
    if isinstance(data, LatentData) and not null and teacher.manifest.guidance is None:
        null = dict(data.null)
    if config.guidance is not None:
        if teacher.manifest.guidance is not None:
            raise ValueError(
                "the teacher has already learned guidance. Remove matching.guidance_scale or matching.guidance_range"
            )
        if not null and not teacher.takes_scale:
            remedy = "Add --matching.null-class" if teacher.num_classes else "Remove guidance"
            raise ValueError(f"guidance needs the teacher's null condition, which is not known. {remedy}")
    return Model(teacher.denoiser, teacher.manifest, null)


def _check_classes(model: Manifest, data: Data) -> None:
    """Raise ValueError if the data and the model number their classes differently, for example due to gaps in the
    labels.
    """
    names = data.class_names
    known = model.class_names[: len(names)] or tuple(map(str, range(len(names))))
    # Without class names, only the number of classes can be compared.
    if names != known and (model.class_names or all(name.isdecimal() for name in names)):
        raise ValueError(
            f"the model's first classes are {shortened(known)}, but those of {data.source} are {shortened(names)}. "
            "Pass data with the same classes, in the same order"
        )


def encode_first(model: Manifest, source: str, pipeline: str) -> str:
    """Return the error message for a latent model whose data is images, including the command that encodes them."""
    return (
        f"the model generates latents {list(model.shape)}, but {source} contains images. Encode them with "
        f"halfstep encode {pipeline} --data {source} --out latents, and use --data latents"
    )


def check_fit(model: Manifest, data: Data) -> None:
    """Raise ValueError if the shape, range or conditions of a model differ from those of the data."""
    kinds = {True: "images in [-1, 1]", False: "plain arrays"}
    if model.pipeline is not None and data.is_image and not model.is_image:
        raise ValueError(encode_first(model, data.source, model.pipeline.folder))
    if model.is_image != data.is_image:
        raise ValueError(
            f"the model generates {kinds[model.is_image]}, but {data.source} has {kinds[data.is_image]}. Pass the "
            "training data (--data)"
        )
    if model.shape != data.shape:
        raise ValueError(
            f"the model has samples of shape {list(model.shape)}, but {data.source} has shape {list(data.shape)}. "
            "Pass the training data (--data, --data.image-size)"
        )
    if model.num_classes and not 0 < data.num_classes <= model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, but {data.source} has {data.num_classes}. Pass the training "
            "data (--data)"
        )
    if model.num_classes:
        _check_classes(model, data)
    held = data.fetch(torch.zeros(1, dtype=torch.int64)).cond if model.conditions else {}
    for name, shape in model.conditions.items():
        if name not in held:
            raise ValueError(
                f"the model is conditioned on {name}, which {data.source} does not contain. Encode images and captions "
                "first (halfstep encode)"
            )
        if tuple(held[name].shape[1:]) != shape:
            raise ValueError(
                f"the model takes {name} of shape {list(shape)}, but {data.source} has shape "
                f"{list(held[name].shape[1:])}. Encode the data with the model's own pipeline"
            )
