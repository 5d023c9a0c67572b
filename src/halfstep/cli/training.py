"""The verbs that execute a training plan: run, train, demo, distill and finish."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
import tyro

from halfstep.cli.arguments import device_of, processes_of, recipe_from, recipe_of_run, recipe_of_stage
from halfstep.cli.display import RunDisplay, show_results
from halfstep.cli.dry_run import check_alone, data_line, show_plan
from halfstep.cli.exporting import sample_prompts
from halfstep.cli.help import HELP
from halfstep.cli.importing import imported
from halfstep.cli.reporting import make_report
from halfstep.cli.usage import Switch, UsageError, as_typed, expand_short, parse, refuse_idle
from halfstep.cli.words import Screen, print_json
from halfstep.data import Data, DataConfig, StandIn, holds_images, read_prompts
from halfstep.hub import PUBLISHED, START_STEPS, is_pipeline, networks_below, published
from halfstep.models.folder import find_stage, load
from halfstep.models.model import Model
from halfstep.nets import BasePrecision
from halfstep.recipes import Recipe, build, recipes
from halfstep.recipes.building import data_or_stand_in, encode_first
from halfstep.recipes.schema import SECOND_ORDER, MatchingConfig
from halfstep.report.words import count, duration
from halfstep.run.folder import check_recipe
from halfstep.run.own_samples import NUM_SAMPLES, effective_scale, sampling_of
from halfstep.run.runner import run as run_spec
from halfstep.run.spec import GIVEN_TEACHER, RunSpec
from halfstep.runs import Manifest, RunFolder, StageFolder, read_status
from halfstep.runtime.failures import OutOfMemory
from halfstep.runtime.files import refuse_file, user_path
from halfstep.runtime.launch import world_size
from halfstep.runtime.stop import Interrupted, StopSignal, at_once

SHORT: Final = {"--data": "--data.source", "--to": "--chain.end-steps", "--start": "--chain.start-steps"}
"""The short names of some recipe options."""
SHORT_OF_FINISH: Final = {"--steps": "--finish.steps"}
"""The short names of some options of `finish`."""
PROMPTS_AT_ONCE: Final = (8, 4, 2, 1)
"""The numbers of prompts to sample at once, in the order in which they are tried until one fits in memory."""
NO_DATA: Final = "required"
"""The data source that the help shows if the teacher is not part of a run."""


@dataclass
class PlanArguments:
    """The options that all verbs with a training plan share."""

    recipe: tyro.conf.AvoidSubcommands[Annotated[Recipe, tyro.conf.arg(name="", help="")]]
    dry_run: Switch = False
    """Print the plan, memory and time; write nothing."""
    json: Switch = False
    """Print one JSON document: the plan with --dry-run, otherwise the final status."""


@dataclass
class RunArguments(PlanArguments):
    """Run the whole plan of a recipe: train a teacher, halve its steps, measure the models and write a report."""

    out: Path | None = None
    """Folder of the run; runs/NAME by default."""


@dataclass
class TrainArguments(RunArguments):
    """Train only the teacher of a recipe, measure it and write a report."""

    out: Path | None = None
    """Folder of the run; runs/NAME-teacher by default."""


@dataclass
class DemoArguments(RunArguments):
    """Run the recipe digits: train a teacher, halve its steps, measure the models and write a report."""


@dataclass
class DistillArguments(PlanArguments):
    """Distil a model to fewer steps. MODEL is a diffusers folder, a name on the Hub, a stage, or a run, whose last
    stage is used. A teacher that predicts eps is first converted to v-prediction. The defaults come from the recipe of
    the run that contains MODEL; imported models have their own defaults.
    """

    out: Path | None = None
    """Folder of the new run; runs/NAME-STAGE-to-STEPS by default."""
    prompts: Path | None = None
    """File with one prompt per line, instead of --data. For each prompt, the text-conditioned teacher generates a
    sample, which is written to OUT-data. The teacher is then distilled on these samples.
    """
    call: tuple[str, ...] = ()
    """Arguments of the pipeline call for all samples, such as height=512 width=512."""
    base_precision: BasePrecision = "float32"
    """Precision of a pipeline's frozen weights with --chain.lora-rank: bf16, int8 or nf4 (both from bitsandbytes), or
    int8wo (from torchao)."""


@dataclass
class FinishArguments(PlanArguments):
    """Finish students of a trained run: train them to bring the distribution of their samples closer to the data, or to
    the samples of a guided teacher. RUN is the folder of a run, to which the new stages are added. The options are
    those of the run's recipe. The settings of stages that are already trained cannot change."""


def run(argv: Sequence[str]) -> None:
    _run(argv, RunArguments, "run")


def demo(argv: Sequence[str]) -> None:
    _run(["digits", *argv], DemoArguments, "demo")


def train(argv: Sequence[str]) -> None:
    _run(argv, TrainArguments, "train", "teacher")


def _run(argv: Sequence[str], kind: type[RunArguments], verb: str, what: Literal["all", "teacher"] = "all") -> None:
    if _only_help(argv, f"the recipe is missing: halfstep {verb} RECIPE (known: {', '.join(recipes)})"):
        parse(kind, argv, f"halfstep {verb} RECIPE", kind(recipes["digits"]()), SHORT)
    name, *rest = argv
    prog = f"halfstep {verb}" if verb == "demo" else f"halfstep {verb} {name}"
    default = recipe_from(name)
    # Check the recipe's own settings first: `fitted` later removes those that the options make redundant.
    default.finish.plan()
    arguments = parse(kind, rest, prog, kind(default), SHORT)
    recipe, suffix = arguments.recipe, "-teacher" if what == "teacher" else ""
    with as_typed(rest, SHORT):
        if what == "all":
            recipe = recipe.fitted(_given(rest, SHORT))
        out = arguments.out or Path("runs") / f"{recipe.name}{suffix}"
        with _requeued(recipe):
            _carry_out(replace(arguments, recipe=recipe), out, what)


def _given(argv: Sequence[str], short: Mapping[str, str]) -> set[str]:
    """Return the dotted names of the fields that the command sets."""
    options = (token.partition("=")[0] for token in expand_short(argv, short))
    return {option.removeprefix("--").replace("-", "_") for option in options}


def distill(argv: Sequence[str]) -> None:
    if _only_help(argv, "the model is missing: halfstep distill MODEL --to 4"):
        parse(DistillArguments, argv, "halfstep distill MODEL", DistillArguments(_chain_of(_imported_recipe())), SHORT)
    name, *rest = argv
    for option in (word.partition("=")[0].replace("_", "-") for word in rest):
        if option.startswith(("--network.", "--teacher.", "--model.")) and option != "--model.weighting":
            raise UsageError(f"{option} cannot change an existing teacher. Remove it")
    stage = _stage_at(name)
    before = (None if stage is None else recipe_of_stage(stage)) or _imported_recipe()

    def parsed(manifest: Manifest | None) -> DistillArguments:
        default = DistillArguments(_chain_of(before, manifest))
        arguments = parse(DistillArguments, rest, f"halfstep distill {name}", default, SHORT)
        chain, given = arguments.recipe.chain, _given(rest, SHORT)
        if "chain.students" not in given or "chain.end_steps" in given:
            return arguments
        # The list replaces the end of the recipe.
        changes = {"chain": chain.model_copy(update={"end_steps": 1})}
        return replace(arguments, recipe=arguments.recipe.model_copy(update=changes))

    arguments = parsed(None if stage is None else stage.manifest(verify=False))
    with _requeued(arguments.recipe):
        _distil(name, rest, stage, before, arguments, parsed)


def _distil(
    name: str,
    rest: Sequence[str],
    stage: StageFolder | None,
    before: Recipe,
    arguments: DistillArguments,
    parsed: Callable[[Manifest | None], DistillArguments],
) -> None:
    """Load or import the model, draw its samples for prompts, and carry out the chain.

    Args:
        rest: the command's words after the model.
        stage: the model's stage, or None for a pipeline.
        before: the recipe that the options change.
        parsed: parses `rest` with the defaults for a model, or for a pipeline that has not been imported yet.
    """
    if arguments.prompts is not None:
        if any(word.partition("=")[0] == SHORT["--data"] for word in expand_short(rest, SHORT)):
            raise UsageError("--data and --prompts cannot be combined. Remove one of them")
        # Importing a pipeline can take minutes, so an invalid file is reported first.
        read_prompts(arguments.prompts)
    is_published = name in PUBLISHED and arguments.dry_run and not Path(name).is_dir()
    if stage is not None or is_published:
        why = "only pipelines take call arguments" if stage else "the estimate is for the listed size"
        refuse_idle(arguments, f"with {name}", ("call",), {"call": why})
    if stage is not None:
        if arguments.base_precision != "float32":
            raise UsageError("--base-precision only applies to a pipeline. For a stage, pass it to halfstep import")
        model, label = load(stage.path), stage.name
    elif is_published:
        model, label = published(name, arguments.base_precision), name
    else:
        model = imported(name, arguments.call, Screen(arguments.json), precision=arguments.base_precision)
        label = model.manifest.stage
    if arguments.recipe.data.source == NO_DATA and arguments.prompts is None and not is_published:
        raise UsageError(
            f"{name} is not part of a run, so its data is unknown. Add --data SOURCE, or --prompts TEXT for a pipeline"
        )
    if stage is None:
        arguments = parsed(model.manifest)
    recipe = _prepared(arguments.recipe, before, model, name)
    chain = recipe.chain
    if model.num_steps is not None and chain.start_steps != model.num_steps:
        raise UsageError(
            f"{name} samples in {model.num_steps} steps, so the chain must start at this number, not at "
            f"{chain.start_steps}. Remove --start, or distil from an earlier stage"
        )
    last = chain.students[-1] if chain.students else chain.end_steps
    out = arguments.out or Path("runs") / f"{recipe.name}-{label}-to-{last}"
    # The paths . and .. must be resolved before a sibling folder can be named.
    place = out.resolve() if out.name in ("", "..") else out
    data_folder, stand_in = place.with_name(f"{place.name}-data"), None
    if arguments.dry_run and (arguments.prompts is not None or is_published):
        stand_in = _not_sampled(arguments.prompts, recipe, model, data_folder)
    elif arguments.prompts is not None:
        # Sampling can take hours, so an invalid plan is reported first.
        with as_typed(rest, SHORT):
            data, _ = _not_sampled(arguments.prompts, recipe, model, data_folder)
            check_recipe(build(recipe, what="chain", teacher=model, data=data), RunFolder(out))
        _sample_prompts(arguments.prompts, recipe, model, data_folder, Screen(arguments.json))
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": str(data_folder)})})
    with as_typed(rest, SHORT):
        _carry_out(replace(arguments, recipe=recipe), out, "chain", model, stand_in=stand_in)


def _only_help(argv: Sequence[str], missing: str) -> bool:
    """Return whether the first argument is a help option; raise UsageError if it is missing or another option."""
    if argv and argv[0] in HELP:
        return True
    if not argv or argv[0].startswith("-"):
        raise UsageError(missing)
    return False


def _stage_at(name: str) -> StageFolder | None:
    """Return the stage in the folder `name`, or None if `name` refers to a pipeline."""
    path = user_path(name)
    if is_pipeline(path) or not path.is_dir():
        return None
    try:
        return find_stage(path)
    except ValueError:
        if below := networks_below(path):
            raise UsageError(f"{name} is not a model. Use one of its subfolders, such as {below[-1]}") from None
        raise


def _imported_recipe() -> Recipe:
    """Return the default recipe for a model outside a run, whose data is unknown."""
    return Recipe(name="distilled", chain=SECOND_ORDER, data=DataConfig(source=NO_DATA))


def _chain_of(recipe: Recipe, model: Manifest | None = None) -> Recipe:
    """Return the recipe with a chain that starts from a model. A `model` of None stands for a pipeline that has not
    been imported yet.
    """
    # The per-student settings of the old chain may not fit the new chain.
    chain: dict[str, object] = {
        "start_steps": START_STEPS,
        "factor": 2,
        **dict.fromkeys(("updates_at", "learning_rate_at", "students", "keep")),
    }
    changes: dict[str, object] = {"further": (), "finish": Recipe.model_fields["finish"].default}
    if model is not None:
        chain["start_steps"] = model.num_steps or model.start_steps or recipe.chain.start_steps
        if model.outcome.role == "student":
            # As a teacher, a student uses the number of steps that it was distilled for.
            chain |= {"teacher_sampler": "ddim", "teacher_steps": None}
        if model.outcome.role != "teacher":
            # Only a teacher needs matching. A matched model or a student already has these settings.
            done = ("prediction", "process", "guidance_scale", "guidance_range", "null_class")
            defaults = {name: MatchingConfig.model_fields[name].default for name in done}
            changes["matching"] = recipe.matching.model_copy(update=defaults)
    return recipe.model_copy(update={**changes, "chain": recipe.chain.model_copy(update=chain)})


def _sample_prompts(prompts: Path, recipe: Recipe, model: Model, folder: Path, screen: Screen) -> None:
    """Sample the training data from the teacher and write it to a folder, in batches that fit in memory."""
    processes = processes_of(recipe.engine.cpu)
    num_steps, _ = sampling_of(model)
    # If one of several processes runs out of memory, the others cannot try another size.
    sizes = PROMPTS_AT_ONCE if processes.count == 1 else PROMPTS_AT_ONCE[:1]
    for size in sizes:
        try:
            sample_prompts(
                model, prompts, folder, _scale_of_samples(recipe), num_steps, recipe.seed, size,
                device_of("cpu" if recipe.engine.cpu else None, processes), processes, screen,
                "Free some memory, or use the CPU (--engine.cpu)",
            )  # fmt: skip
            return
        except OutOfMemory:
            if size == sizes[-1]:
                raise
            screen.note(f"a batch of {size} prompts does not fit in memory; retrying with a batch size of {size // 2}")


def _scale_of_samples(recipe: Recipe) -> float | None:
    """Return the guidance scale at which the samples for prompts are drawn, or None for the teacher's own scale."""
    learned = recipe.matching.guidance
    return None if learned is None else learned.default_scale


def _not_sampled(prompts: Path | None, recipe: Recipe, model: Model, folder: Path) -> tuple[Data, str]:
    """Return data that replaces the teacher's samples in a dry run, and the reason why they are missing."""
    number, why = NUM_SAMPLES, f"the weights of {model.manifest.source} are not on this machine"
    if prompts is not None:
        number = len(read_prompts(prompts))
        num_steps, sampler = sampling_of(model)
        calls = model.num_evals(sampler, num_steps, effective_scale(model, _scale_of_samples(recipe)))
        why = (
            f"{count(number, 'sample')} for the prompts in {prompts} would be drawn first, with {calls} network calls "
            "each"
        )
    return StandIn(str(folder), model.shape, number, conditions=model.manifest.conditions), why


def _prepared(recipe: Recipe, before: Recipe, model: Model, name: str) -> Recipe:
    """Return the recipe with settings that convert new images to the teacher's image size and number of channels."""
    data, shape = recipe.data, model.shape
    if data.source == before.data.source or not holds_images(data):
        return recipe
    if not model.manifest.is_image:
        if model.manifest.pipeline is not None:
            raise UsageError(encode_first(model.manifest, data.source, name))
        return recipe
    size = data.image_size or (shape[1] if shape[1] == shape[2] else None)
    channels = data.channels or (shape[0] if shape[0] in (1, 3) else None)
    return recipe.model_copy(update={"data": data.model_copy(update={"image_size": size, "channels": channels})})


def finish(argv: Sequence[str]) -> None:
    if _only_help(argv, "the run is missing: halfstep finish RUN --steps 2 1"):
        parse(FinishArguments, argv, "halfstep finish RUN", FinishArguments(recipes["digits"]()), SHORT_OF_FINISH)
    name, *rest = argv
    folder = RunFolder(Path(name))
    if not folder.recipe_path.is_file():
        raise UsageError(f"{name} is not a run (it has no recipe.json). Use the folder of a run")
    recipe, held = recipe_of_run(folder), folder.recipe()["recipe"]
    arguments = parse(FinishArguments, rest, f"halfstep finish {name}", FinishArguments(recipe), SHORT_OF_FINISH)
    asked = arguments.recipe.finish
    if not asked.steps:
        raise UsageError("there is no student to finish. Add --steps, such as --steps 2 1")
    with as_typed(rest, SHORT_OF_FINISH):
        arguments.recipe.fitted(_given(rest, SHORT_OF_FINISH)).finish.plan()
    # New finishing stages follow the existing ones, whose order and own settings do not change.
    before = recipe.finish
    changes: dict[str, Any] = {"steps": tuple(dict.fromkeys((*before.steps, *asked.steps)))}
    for setting in ("updates_at", "learning_rate_at"):
        changes[setting] = {**(getattr(before, setting) or {}), **(getattr(asked, setting) or {})} or None
    finishes = asked.model_copy(update=changes)
    arguments = replace(arguments, recipe=arguments.recipe.model_copy(update={"finish": finishes}))
    what, parent = held.get("what", "all"), held.get("parent")
    if what == "teacher":
        raise UsageError(f"{name} contains only a teacher. Distil it first: halfstep distill {name}")
    with _requeued(arguments.recipe):
        teacher = None if parent is None else load(folder.stage(GIVEN_TEACHER).path)
        _carry_out(arguments, folder.path, what, teacher, parent)


def _carry_out(
    arguments: PlanArguments,
    out: Path,
    what: Literal["all", "teacher", "chain"],
    teacher: Model | None = None,
    parent: Mapping[str, Any] | None = None,
    stand_in: tuple[Data, str] | None = None,
) -> None:
    """With --dry-run, show the plan. Otherwise, build the run, train it and show the results.

    Args:
        stand_in: the data for a dry run, and the reason why the real data is missing; by default, the recipe's data
            or, if it is missing, random pixels.
    """
    recipe = arguments.recipe
    refuse_file(out)
    make = partial(build, recipe, what=what, teacher=teacher, parent=parent)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    if not arguments.dry_run:
        _execute(recipe, make, out, arguments.json)
        return
    check_alone()
    data, missing = stand_in or data_or_stand_in(recipe)
    show_plan(make(data=data), out, arguments.json, missing)


@contextlib.contextmanager
def _requeued(recipe: Recipe) -> Iterator[None]:
    """Replace the exit code of a command that SIGTERM or SIGUSR1 stops, if the recipe has a `requeue_code`."""
    code, stops = recipe.engine.requeue_code, (signal.SIGTERM, signal.SIGUSR1)
    try:
        yield
    except Interrupted as stopped:
        if code is not None and stopped.signal in stops:
            stopped.code = code
        raise
    except SystemExit as end:
        # Outside of a run, the handler of a signal ends the process.
        if code is not None and end.code in [128 + number for number in stops]:
            raise SystemExit(code) from None
        raise


def _execute(recipe: Recipe, make: Callable[[], RunSpec], out: Path, json: bool) -> None:
    """Build a run, train it and show the results. A signal stops any of these phases cleanly."""
    screen = Screen(json)
    started = time.monotonic()
    with StopSignal() as stop:
        # Several processes stop together, once all of them have agreed to stop.
        alone = stop if world_size() == 1 else None
        with at_once(alone):
            spec = make()
        screen.say(f"halfstep: {recipe.name} -> {out}")
        screen.say(data_line(spec.data))
        # If the output fails, the traceback would keep the run, and with it the folder's lock.
        with contextlib.closing(run_spec(spec, out, stop)) as events:
            RunDisplay(spec.stages, screen).show(events)
        if screen.quiet:
            return
        show_results(out, screen)
        with at_once(alone):
            screen.say(f"report: {make_report(out, spec.data)}")
    screen.say(f"finished in {duration(time.monotonic() - started)}")
    if json:
        print_json(read_status(out).as_json())
