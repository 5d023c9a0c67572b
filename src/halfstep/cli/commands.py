"""The verbs, as functions of the arguments after their names."""

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from PIL import Image
from rich.table import Table

from halfstep.cli.arguments import (
    FAMILIES,
    SHORT,
    SHORT_OF_FINISH,
    DistillArguments,
    FinishArguments,
    ListArguments,
    PlanArguments,
    ReportArguments,
    RunArguments,
    SampleArguments,
    device_of,
    processes_of,
    recipe_from,
    recipe_of_stage,
)
from halfstep.cli.display import RunDisplay, show_results
from halfstep.cli.dry_run import data_line, show_plan
from halfstep.cli.exporting import sample_prompts
from halfstep.cli.help import HELP
from halfstep.cli.importing import imported
from halfstep.cli.reporting import make_report
from halfstep.cli.usage import UsageError, as_typed, expand_short, parse
from halfstep.cli.words import Screen, duration, print_json
from halfstep.data import Data, DataConfig, StandIn, holds_images, read_prompts
from halfstep.hub import (
    PUBLISHED,
    START_STEPS,
    decoder_of,
    is_pipeline,
    networks_below,
    published,
    release_texts,
    text_conditions,
)
from halfstep.measure.samples import grid_image, samples_array, write_png
from halfstep.metrics import to_uint8
from halfstep.models.folder import find_stage, load
from halfstep.models.model import Model, samples_at_once
from halfstep.nets import BasePrecision
from halfstep.objectives import Role
from halfstep.recipes import Recipe, build, recipes
from halfstep.recipes.schema import SECOND_ORDER, MatchingConfig, data_or_stand_in, encode_first
from halfstep.report.words import count
from halfstep.run.own_samples import NUM_SAMPLES, NUM_STEPS
from halfstep.run.runner import run as run_spec
from halfstep.run.spec import GIVEN_TEACHER, RunSpec
from halfstep.runs import RunFolder, read_status
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import refuse_file, refuse_taken, replacing_folder, write_arrays
from halfstep.runtime.launch import world_size
from halfstep.runtime.stop import Interrupted, StopSignal, at_once
from halfstep.samplers import Ancestral, Heun, Sampler, samplers


def _carry_out(
    arguments: PlanArguments,
    out: Path,
    what: Literal["all", "teacher", "chain"],
    teacher: Model | None = None,
    parent: Mapping[str, Any] | None = None,
    stand_in: tuple[Data, str] | None = None,
) -> None:
    """Show the plan with --dry-run; otherwise build the run, train it and show its results.

    Args:
        stand_in: data for a dry run, and why the real data is missing; by default the recipe's data or random pixels.
    """
    recipe = arguments.recipe
    refuse_file(out)
    make = partial(build, recipe, what=what, teacher=teacher, parent=parent)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    if not arguments.dry_run:
        _execute(recipe, make, out, arguments.json)
        return
    if world_size() > 1:
        # A dry run times an update on one process.
        raise UsageError("a dry run uses one process: start it without torchrun or accelerate launch")
    data, missing = stand_in or data_or_stand_in(recipe)
    show_plan(make(data=data), out, arguments.json, missing)


def _execute(recipe: Recipe, make: Callable[[], RunSpec], out: Path, json: bool) -> None:
    """Build a run, train it and show its results; a signal stops each of these phases cleanly."""
    screen = Screen(json)
    started = time.monotonic()
    try:
        with StopSignal() as stop:
            # Several processes stop together, at the first point where they agree to.
            alone = stop if world_size() == 1 else None
            with at_once(alone):
                spec = make()
            screen.say(f"halfstep: {recipe.name} -> {out}")
            screen.say(data_line(spec))
            RunDisplay(spec.stages, screen).show(run_spec(spec, out, stop))
            if screen.quiet:
                return
            show_results(out, screen)
            with at_once(alone):
                screen.say(f"report: {make_report(out, spec.data)}")
    except Interrupted as stopped:
        if recipe.engine.requeue_code is not None and stopped.signal in (signal.SIGTERM, signal.SIGUSR1):
            stopped.code = recipe.engine.requeue_code
        raise
    screen.say(f"finished in {duration(time.monotonic() - started)}")
    if json:
        print_json(read_status(out).as_json())


def run(argv: Sequence[str]) -> None:
    """Run the whole plan of a recipe."""
    _run(argv, "run")


def demo(argv: Sequence[str]) -> None:
    """Run the digits recipe."""
    _run(["digits", *argv], "demo")


def train(argv: Sequence[str]) -> None:
    """Train the teacher of a recipe."""
    _run(argv, "train", "teacher")


def _run(argv: Sequence[str], verb: str, what: Literal["all", "teacher"] = "all") -> None:
    if argv and argv[0] in HELP:
        recipe, name, rest = recipes["digits"](), "RECIPE", argv
    elif not argv or argv[0].startswith("-"):
        raise UsageError(f"the recipe is missing: halfstep {verb} RECIPE (known: {', '.join(recipes)})")
    else:
        recipe, name, rest = recipe_from(argv[0]), argv[0], argv[1:]
    prog = f"halfstep {verb}" if verb == "demo" else f"halfstep {verb} {name}"
    arguments = parse(RunArguments, rest, prog, RunArguments(recipe), SHORT)
    long = expand_short(rest, SHORT)
    given = {token.partition("=")[0].removeprefix("--").replace("-", "_") for token in long}
    suffix = "-teacher" if what == "teacher" else ""
    with as_typed(rest, SHORT):
        if what == "all":
            arguments = replace(arguments, recipe=arguments.recipe.fitted(given))
        _carry_out(arguments, arguments.out or Path("runs") / f"{arguments.recipe.name}{suffix}", what)


def distill(argv: Sequence[str]) -> None:
    """Distil a trained model."""
    if any(word in HELP for word in argv):
        name = argv[0] if not argv[0].startswith("-") else "MODEL"
        parse(DistillArguments, argv, f"halfstep distill {name}", _shown_for(name), SHORT)
    if not argv or argv[0].startswith("-"):
        raise UsageError("the model is missing: halfstep distill MODEL --to 4")
    rest = argv[1:]
    recipe = None
    has_prompts = any(word.partition("=")[0] == "--prompts" for word in rest)
    is_published = argv[0] in PUBLISHED and "--dry-run" in rest and not Path(argv[0]).is_dir()
    precision = _precision(rest)
    if is_published:
        model = published(argv[0], precision)
        where, stage = argv[0], argv[0]
    elif is_pipeline(argv[0]) or not Path(argv[0]).is_dir():
        model = imported(argv[0], _values(rest, "--call"), Screen("--json" in rest), precision=precision)
        where, stage = argv[0], model.manifest.stage
    else:
        try:
            folder = find_stage(Path(argv[0]))
        except ValueError:
            if below := networks_below(Path(argv[0])):
                raise UsageError(
                    f"{argv[0]} is not a model itself. Give one of the folders in it, such as {below[-1]}"
                ) from None
            raise
        if precision != "float32":
            raise UsageError("--base-precision only applies to a pipeline. For a stage, set it with halfstep import")
        model = load(folder.path)
        recipe = recipe_of_stage(folder)
        where, stage = str(folder.path), folder.name
    if recipe is None:
        if not (has_prompts or is_published) and not any(
            token.partition("=")[0] in ("--data", "--data.source") for token in rest
        ):
            raise UsageError(
                f"{where} is not inside a run, so its data is unknown: add --data SOURCE, or "
                "--prompts TEXT for a pipeline"
            )
        recipe = Recipe(name="distilled", chain=SECOND_ORDER)
    for name in (word.partition("=")[0].replace("_", "-") for word in rest):
        if name.startswith(("--network.", "--teacher.", "--model.")) and name != "--model.weighting":
            raise UsageError(f"{name} cannot change an existing teacher: remove it")
    default = DistillArguments(_going_on(recipe, model))
    arguments = parse(DistillArguments, rest, f"halfstep distill {argv[0]}", default, SHORT)
    arguments = replace(arguments, recipe=_prepared(arguments.recipe, recipe, model, argv[0]))
    chain = arguments.recipe.chain
    if model.num_steps is not None and chain.start_steps != model.num_steps:
        raise UsageError(
            f"{where} samples in {model.num_steps} steps, so the chain must start there, not at "
            f"{chain.start_steps}: remove --start, or distil from an earlier stage"
        )
    last = chain.students[-1] if chain.students else chain.end_steps
    out = arguments.out or Path("runs") / f"{arguments.recipe.name}-{stage}-to-{last}"
    stand_in = None
    if arguments.dry_run and (arguments.prompts is not None or is_published):
        stand_in = _not_sampled(arguments.prompts, model, out)
    elif arguments.prompts is not None:
        arguments = replace(arguments, recipe=_with_samples(arguments, model, out))
    with as_typed(rest, SHORT):
        _carry_out(arguments, out, "chain", model, stand_in=stand_in)


def _shown_for(name: str) -> DistillArguments:
    """Return the defaults in the help of `distill NAME`: of the recipe of its run, or of an imported model."""
    with suppress(ValueError, OSError):
        folder = find_stage(Path(name))
        if (recipe := recipe_of_stage(folder)) is not None:
            return DistillArguments(_going_on(recipe, load(folder.path)))
    chain = SECOND_ORDER.model_copy(update={"start_steps": START_STEPS})
    # An imported model has no data of its own.
    data = DataConfig().model_copy(update={"source": "required"})
    return DistillArguments(Recipe(name="distilled", chain=chain).model_copy(update={"data": data}))


def _values(words: Sequence[str], option: str) -> list[str]:
    """Return the values that follow an option."""
    found: list[str] = []
    taking = False
    for word in words:
        if word.startswith("--"):
            taking = word.partition("=")[0] == option
            word = word.partition("=")[2] if "=" in word else ""
        if taking and word:
            found.append(word)
    return found


def _precision(words: Sequence[str]) -> BasePrecision:
    given = _values(words, "--base-precision") or ["float32"]
    known = get_args(BasePrecision)
    if given[-1] not in known:
        raise UsageError(f"--base-precision {given[-1]}: give one of {', '.join(known)}")
    return cast(BasePrecision, given[-1])


def _data_beside(out: Path) -> Path:
    """Return the folder for the teacher's samples of a run's prompts."""
    return out.with_name(f"{out.name}-data")


def _with_samples(arguments: DistillArguments, model: Model, out: Path) -> Recipe:
    """Sample the training data from the teacher into a folder next to the run; return the recipe that uses it."""
    assert arguments.prompts is not None
    folder, recipe = _data_beside(out), arguments.recipe
    learned, processes = recipe.matching.guidance, processes_of(recipe.engine.cpu)
    sample_prompts(
        model, arguments.prompts, folder, None if learned is None else learned.default_scale, NUM_STEPS, recipe.seed, 8,
        device_of("cpu" if recipe.engine.cpu else None, processes), processes, Screen(arguments.json),
    )  # fmt: skip
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": str(folder)})})


def _not_sampled(prompts: Path | None, model: Model, out: Path) -> tuple[Data, str]:
    """Return the stand-in for the teacher's own samples in a dry run, and why they are missing."""
    number, why = NUM_SAMPLES, f"{model.manifest.source} has no weights here"
    if prompts is not None:
        number = len(read_prompts(prompts))
        calls = model.num_evals(Heun(), NUM_STEPS)
        why = f"{count(number, 'sample')} of {prompts} would be drawn first, with {calls} network calls each"
    return StandIn(str(_data_beside(out)), model.shape, number, conditions=model.manifest.conditions), why


def _prepared(recipe: Recipe, before: Recipe, model: Model, name: str) -> Recipe:
    """Return the recipe with new images resized and converted to the teacher's size and channels.

    Raises:
        UsageError: if the teacher generates latents and the data are images.
    """
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
    """Finish students of a trained run."""
    if argv and argv[0] in HELP:
        default = FinishArguments(recipes["digits"]())
        parse(FinishArguments, argv, "halfstep finish RUN", default, SHORT_OF_FINISH)
    if not argv or argv[0].startswith("-"):
        raise UsageError("the run is missing: halfstep finish RUN --steps 4 2 1")
    folder = RunFolder(Path(argv[0]))
    if not folder.recipe_path.is_file():
        raise UsageError(f"{argv[0]} is not a run (no recipe.json). Give the folder of a run")
    recipe, held = recipe_from(argv[0]), folder.recipe()["recipe"]
    arguments = parse(FinishArguments, argv[1:], f"halfstep finish {argv[0]}", FinishArguments(recipe), SHORT_OF_FINISH)
    asked = arguments.recipe.finish.steps
    if not asked:
        raise UsageError("no student to finish. Add --steps, such as --steps 4 2 1")
    # Existing finishing stages keep their order; new ones come after them.
    steps = (*recipe.finish.steps, *(number for number in asked if number not in recipe.finish.steps))
    finishes = arguments.recipe.finish.model_copy(update={"steps": steps})
    arguments = replace(arguments, recipe=arguments.recipe.model_copy(update={"finish": finishes}))
    what, parent = held.get("what", "all"), held.get("parent")
    if what == "teacher":
        raise UsageError(f"{argv[0]} contains only a teacher. Distil it first: halfstep distill {argv[0]}")
    teacher = None if parent is None else load(folder.stage(GIVEN_TEACHER).path)
    _carry_out(arguments, folder.path, what, teacher, parent)


def _going_on(recipe: Recipe, model: Model) -> Recipe:
    """Return the recipe of the model's run, with a chain that starts at the model."""
    # Per-student settings of the old chain may not fit the new one.
    chain = {
        "start_steps": model.num_steps or model.manifest.start_steps or recipe.chain.start_steps,
        "factor": 2,
        **dict.fromkeys(("updates_at", "learning_rate_at", "students", "keep")),
    }
    if model.role is Role.STUDENT:
        # A student teaches at the number of steps that it was distilled for.
        chain |= {"teacher_sampler": "ddim", "teacher_steps": None}
    changes: dict[str, object] = {
        "chain": recipe.chain.model_copy(update=chain),
        "further": (),
        "finish": Recipe.model_fields["finish"].default,
    }
    if model.role is not Role.TEACHER:
        # Only a teacher is matched; a student was distilled from a model that already has these settings.
        done = ("prediction", "process", "guidance_scale", "guidance_range", "null_class")
        defaults = {name: MatchingConfig.model_fields[name].default for name in done}
        changes["matching"] = recipe.matching.model_copy(update=defaults)
    return recipe.model_copy(update=changes)


def _sampler(name: str | None, gamma: float | None, own: Sampler) -> Sampler:
    """Return the named sampler, or the model's own; reject a gamma without effect."""
    name = name or samplers.name_of(own)
    kind = samplers[name]
    if gamma is None:
        return own if kind is type(own) else kind()
    if kind is not Ancestral:
        raise UsageError(f"--gamma {gamma} has no effect on the sampler {name}. Remove it, or add --sampler ancestral.")
    return Ancestral(gamma)


def sample(argv: Sequence[str]) -> None:
    """Draw samples into a grid, an .npz or a folder."""
    arguments = parse(SampleArguments, argv, "halfstep sample")
    out = arguments.out
    as_file = out.suffix.lower() in (".png", ".npz")
    if out.suffix and not as_file:
        raise UsageError(
            f"--out {out}: write a .png, a .npz, or a folder (a name without a suffix); lossy formats are not supported"
        )
    if arguments.overwrite:
        refuse_file(out.parent if as_file else out)
    else:
        refuse_taken(out, as_file, "choose another --out, or add --overwrite")
    processes = processes_of(arguments.device == "cpu")
    model = load(arguments.model, device_of(arguments.device, processes))
    method = _sampler(arguments.sampler, arguments.gamma, model.sampler)
    seeds = range(arguments.seed, arguments.seed + arguments.num_samples)
    cond = _prompted(model, arguments.prompt, len(seeds))
    # With one process, the model finds the batch size that fits. With several, batches have the size that the model
    # would try first, because on a GPU the batch size affects the last bits.
    share = len(seeds) if processes.count == 1 else arguments.batch_size or samples_at_once(model.device)

    def drawn(first: int) -> tuple[torch.Tensor]:
        part = seeds[first : first + share]
        x0 = model.sample(
            part,
            arguments.num_steps,
            method,
            arguments.class_label,
            arguments.batch_size,
            arguments.guidance_scale,
            {name: value[: len(part)] for name, value in cond.items()},
            arguments.precision,
        )
        return (x0,)

    started = time.perf_counter()
    parts = processes.spread(range(0, len(seeds), share), drawn)
    if parts is None:
        return
    x0 = torch.cat([part for (part,) in parts])
    if bad := int((~x0.isfinite()).flatten(1).any(1).sum()):
        raise NonFinite(f"{bad} of {len(x0)} samples are not finite, so {out} was not written: the model is broken")
    seconds = time.perf_counter() - started
    write_samples(x0, model, seeds, out)
    steps = model.check_steps(arguments.num_steps)
    if arguments.json:
        print_json(
            {
                "out": str(out),
                "model": model.manifest.stage,
                "num_samples": arguments.num_samples,
                "first_seed": arguments.seed,
                "shape": list(model.shape),
                "num_steps": steps,
                "sampler": samplers.name_of(method),
                "num_evals": model.num_evals(method, steps, arguments.guidance_scale),
                "seconds": round(seconds, 3),
            }
        )
        return
    Screen().say(f"{count(arguments.num_samples, 'sample')} in {count(steps, 'step')}: {out}")


def _prompted(model: Model, prompt: str | None, number: int) -> dict[str, torch.Tensor]:
    """Return a prompt's conditions, repeated for `number` samples; empty for a model without text conditions."""
    manifest = model.manifest
    if not manifest.conditions:
        if prompt is not None:
            raise UsageError("--prompt has no effect: this model is not text-conditioned. Remove it")
        return {}
    if prompt is None or manifest.pipeline is None:
        raise UsageError(f"this model is conditioned on {', '.join(manifest.conditions)}: add --prompt TEXT")
    shown = text_conditions(manifest, [prompt])
    release_texts()
    return {name: value.expand(number, *value.shape[1:]) for name, value in shown.items()}


def write_samples(x0: torch.Tensor, model: Model, seeds: range, out: Path) -> None:
    """Write samples `[n, *shape]` in the format given by the suffix of `out`.

    Raises:
        UsageError: if `out` is not a .npz and the samples cannot be shown as images.
    """
    is_image = model.manifest.is_image
    if out.suffix.lower() == ".npz":
        write_arrays(out, arr_0=samples_array(x0, is_image))
        return
    if not is_image:
        if model.manifest.pipeline is None or len(model.shape) != 3:
            raise UsageError(f"samples of shape {list(model.shape)} are not images: write a .npz")
        decode = decoder_of(model.manifest)
        x0 = torch.cat([decode(part) for part in x0.split(8)])
    pixels = to_uint8(x0).permute(0, 2, 3, 1).numpy()
    if out.suffix.lower() == ".png":
        write_png(out, grid_image(pixels))
        return
    # Existing files in the folder are kept.
    is_new = not out.exists() or not any(out.iterdir())
    with replacing_folder(out) if is_new else nullcontext(out) as folder:
        for seed, picture in zip(seeds, pixels, strict=True):
            image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
            write_png(folder / f"{seed:06d}.png", image)


def report(argv: Sequence[str]) -> None:
    """Write a run's report."""
    arguments = parse(ReportArguments, argv, "halfstep report")
    if not arguments.run.is_dir():
        raise UsageError(f"{arguments.run} is not a run: give the folder of a run")
    if arguments.studies is not None and not any(arguments.studies.glob("*/study.json")):
        raise UsageError(f"{arguments.studies} contains no studies: give the folder that `halfstep study` wrote to")
    Screen().say(str(make_report(arguments.run, studies=arguments.studies)))


def ls(argv: Sequence[str]) -> None:
    """List the members of every family."""
    arguments = parse(ListArguments, argv, "halfstep ls")
    shown = {
        family: {name: _summary(member) for name, member in FAMILIES[family].items()}
        for family in arguments.families or FAMILIES
    }
    if arguments.json:
        print_json(shown)
        return
    screen = Screen()
    for family, members in shown.items():
        table = Table(title=family, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for member, text in members.items():
            table.add_row(f"  {member}", text)
        screen.show(table)


def _summary(thing: object) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    text = " ".join((thing.__doc__ or "").split())
    # A full stop inside a sentence, as in "i = 1, ..., n" or "e.g. a", is not followed by a capital letter.
    return re.split(r"(?<!\.)\.(?= [A-Z])|(?<!\.)\.$", text)[0]
