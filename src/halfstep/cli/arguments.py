"""From command lines to typed arguments, by tyro; from its complaints to one line that names what is near."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from pydantic import BaseModel, ValidationError
from tyro import _errors as tyro_errors

from halfstep.recipes import Recipe, recipes
from halfstep.registry import nearest
from halfstep.runs import DamagedFile, RunFolder, read_json
from halfstep.train import Processes

Arguments = TypeVar("Arguments")
RecipeFields = tyro.conf.AvoidSubcommands[Annotated[Recipe, tyro.conf.arg(name="", help="")]]


@dataclass
class RunArguments:
    """Train, halve, measure and report: the whole plan of a recipe. The same command again continues where it was."""

    recipe: RecipeFields
    out: Path | None = None
    """Folder of the run; runs/NAME by default."""
    dry_run: bool = False
    """Print plan, parameters and an estimate of time, and write nothing."""


@dataclass
class DistillArguments:
    """Halve a model to fewer steps. MODEL is the folder of a run or of a stage, a folder that diffusers has saved, or a
    name on the Hub; --data says what to train on. Options are those of the recipe of the model's run. A teacher that
    predicts eps is matched to v first; --matching.guidance-scale takes classifier-free guidance into the student."""

    recipe: RecipeFields
    out: Path | None = None
    """Folder of the new run; by default beside the model's run, with the steps in its name."""
    dry_run: bool = False
    """Print plan, parameters and an estimate of time, and write nothing."""


@dataclass
class SampleArguments:
    """Draw samples, each a function of its own seed: --seed, --seed + 1, ..."""

    model: tyro.conf.Positional[Path]
    """Folder of a run or of a stage."""
    num_steps: int | None = None
    """Sampler steps; those that the model was distilled for by default."""
    num_samples: int = 64
    """How many."""
    seed: int = 0
    """Seed of the first sample."""
    class_label: int | None = None
    """One class for all; classes in turn by default."""
    guidance_scale: float | None = None
    """uncond + scale (cond - uncond), for a model that knows guidance; 1 is none. The model's own by default."""
    prompt: str | None = None
    """A text, for a model of texts."""
    sampler: str = "ddim"
    """Sampler (see `halfstep ls samplers`)."""
    gamma: float | None = None
    """Of ancestral sampling: its variance, from 0 for the lower bound to 1 for the upper, which is the default."""
    batch_size: int | None = None
    """Samples drawn at once; as many as fit by default."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 lets the network compute in bfloat16."""
    device: str | None = None
    """cpu, cuda, mps; the fastest there is by default."""
    out: Path = Path("samples.png")
    """A .png (one grid), a .npz (arr_0, uint8 [n, h, w, c]), or a folder (one PNG each)."""
    overwrite: bool = False
    """Replace what is at --out."""


@dataclass
class ReportArguments:
    """Write RUN/report/index.html, one file that needs no network."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, finished or in progress."""
    studies: Path | None = None
    """Folder of studies (`halfstep study`) to show in it; RUN/studies by default."""


@dataclass
class ListArguments:
    """List the members of every family."""

    families: tyro.conf.Positional[tuple[str, ...]] = field(default=())
    """Families to list; all by default."""


class UsageError(ValueError):
    """A command line that cannot be understood; one line."""


def flags_of(model: BaseModel, prefix: str = "") -> list[str]:
    """The flags of a recipe's fields."""
    flags: list[str] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        dotted = f"{prefix}{name.replace('_', '-')}"
        flags += flags_of(value, f"{dotted}.") if isinstance(value, BaseModel) else [f"--{dotted}"]
    return flags


def first_line(error: ValidationError) -> str:
    """A pydantic error in one line: field, what was got, what was needed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("unet2d", "mlp"))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {reason}"
    if first["type"] == "extra_forbidden":
        return f"unknown field {where!r}"
    return f"{where}: {reason[0].lower()}{reason[1:]}, got {first['input']!r}"


def plain_reason(message: str) -> str:
    """tyro's and pydantic's words for a bad value, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if len(lines) >= 3 and "validation error" in lines[0]:
        if " [type=" in lines[1]:
            # A contradiction between fields has no field of its own.
            return lines[1].partition(" [type=")[0].removeprefix("Value error, ")
        reason, _, details = lines[2].partition(" [type=")
        got = details.partition("input_value=")[2].partition(", input_type")[0]
        reason = reason.removeprefix("Value error, ")
        return f"{lines[1].replace('_', '-')}: {reason}" + ("" if "got" in reason or not got else f", got {got}")
    for kind, needed in (("int()", "a whole number"), ("float", "a number")):
        if kind in message and ":" in message:
            return f"needs {needed}, got {message.rpartition(':')[2].strip()}"
    return " ".join(lines)


def parse(
    kind: type[Arguments],
    argv: Sequence[str],
    prog: str,
    default: Arguments | None = None,
    flags: Iterable[str] = (),
) -> Arguments:
    """The arguments in `argv`.

    Raises:
        UsageError: one line, if an option is unknown, lacks its value or has one of the wrong type.
        SystemExit: after --help.
    """
    known = [
        *flags,
        *(f"--{name.replace('_', '-')}" for name in getattr(kind, "__dataclass_fields__", {})),
        "--help",
    ]

    def explain(event: tyro_errors.ParseErrorEvent) -> None:
        if isinstance(event, tyro_errors.UnrecognizedArgs):
            token = event.tokens[0]
            raise UsageError(f"unknown option {token!r}{nearest(token.split('=')[0], known)}; see {prog} --help")
        if isinstance(event, tyro_errors.MissingArgs):
            if event.unrecognized_tokens:
                token = event.unrecognized_tokens[0]
                raise UsageError(f"unknown option {token!r}{nearest(token, known)}; see {prog} --help")
            names = ", ".join(argument.arg.lowered.name_or_flags[0] for argument in event.missing_arguments)
            raise UsageError(f"{names} is missing; see {prog} --help")
        if isinstance(event, tyro_errors.BadValue):
            flag = event.argument.lowered.name_or_flags[0]
            raise UsageError(f"{flag} needs a value; see {prog} --help")
        if isinstance(event, tyro_errors.InvalidChoice):
            flag = event.argument.lowered.name_or_flags[0]
            raise UsageError(
                f"{flag}: {event.value!r} is not one of {', '.join(event.choices)}{nearest(event.value, event.choices)}"
            )
        if isinstance(event, tyro_errors.InstantiationFailure):
            flag = event.argument.lowered.name_or_flags[0] if event.argument is not None else ""
            raise UsageError(f"{flag + ': ' if flag else ''}{plain_reason(event.message)}")

    try:
        with tyro_errors.on_parse_error(explain):
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                default=default if default is not None else tyro.MISSING_NONPROP,
            )
    except ValidationError as error:
        raise UsageError(first_line(error)) from None


def recipe_from(text: str) -> Recipe:
    """The recipe that `text` names: one that comes with halfstep, a run's folder, or a .json file.

    Raises:
        ValueError: if there is none, or the file does not hold a recipe.
    """
    path = Path(text)
    if text not in list(recipes) and (path.suffix == ".json" or path.is_dir()):
        file = RunFolder(path).recipe_path if path.is_dir() else path
        return recipe_of_file(file)
    return recipes[text]()


def recipe_of_file(file: Path) -> Recipe:
    """The recipe in a run's recipe.json, or in a file that holds a recipe alone.

    Raises:
        ValueError: if it is no recipe.
    """
    data: Any = read_json(file)
    if isinstance(data, dict) and isinstance(data.get("recipe"), dict):
        data = data["recipe"]
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not hold a recipe")
    data = {key: value for key, value in data.items() if key not in ("what", "parent")}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{file}: {first_line(error)}") from None


def expand_data(argv: Sequence[str]) -> list[str]:
    """`--data SOURCE` and `--to N` written out as the recipe's fields."""
    short = {"--data": "--data.source", "--to": "--chain.end-steps", "--start": "--chain.start-steps"}
    expanded = []
    for token in argv:
        name, equals, value = token.partition("=")
        expanded.append(short.get(name, name) + equals + value if name in short else token)
    return expanded


def device_of(name: str | None, processes: Processes | None = None) -> torch.device:
    """The device of that name, or the one there is; with several processes, the own one of each.

    Raises:
        UsageError: if it cannot be used here.
    """
    if name in (None, "cuda") and processes is not None and processes.count > 1 and torch.cuda.is_available():
        # Each of several has its own.
        return torch.device("cuda", torch.cuda.current_device())
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device
