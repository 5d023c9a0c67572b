"""The arguments of the verbs that know recipes and models."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
import tyro
from pydantic import BaseModel, ValidationError

from halfstep.cli.usage import Switch, first_line
from halfstep.cli.usage import UsageError as UsageError
from halfstep.cli.usage import parse as parse
from halfstep.recipes import Recipe, recipes
from halfstep.runs import RunFolder
from halfstep.runtime.files import DamagedFile, read_json
from halfstep.runtime.processes import Processes

SHORT: Final = {"--data": "--data.source", "--to": "--chain.end-steps", "--start": "--chain.start-steps"}
"""Short names of a recipe's options."""

RecipeFields = tyro.conf.AvoidSubcommands[Annotated[Recipe, tyro.conf.arg(name="", help="")]]


@dataclass
class RunArguments:
    """Train, halve, measure and report: the whole plan of a recipe. The same command again continues where it was."""

    recipe: RecipeFields
    out: Path | None = None
    """Folder of the run; runs/NAME by default."""
    dry_run: Switch = False
    """Print plan, parameters and an estimate of time, and write nothing."""
    json: Switch = False
    """Print one JSON document: the plan with --dry-run, else the run's status at its end; progress goes to stderr."""


@dataclass
class DistillArguments:
    """Halve a model to fewer steps. MODEL is the folder of a run or of a stage, a folder that diffusers has saved, or a
    name on the Hub; --data says what to train on. Options are those of the recipe of the model's run. A teacher that
    predicts eps is matched to v first; --matching.guidance-scale takes classifier-free guidance into the student."""

    recipe: RecipeFields
    out: Path | None = None
    """Folder of the new run; by default beside the model's run, with the steps in its name."""
    dry_run: Switch = False
    """Print plan, parameters and an estimate of time, and write nothing."""
    json: Switch = False
    """Print one JSON document: the plan with --dry-run, else the run's status at its end; progress goes to stderr."""


@dataclass
class SampleArguments:
    """Draw samples from a model by a sampler of few or many steps. Each sample is a function of its own seed, counted
    from --seed, whatever the batch: the same seed gives the same noise at any number of steps and to any model."""

    model: tyro.conf.Positional[Path]
    """Folder of a run (its last stage is meant) or of a stage."""
    num_steps: int | None = None
    """Sampler steps; those that the model was distilled for by default."""
    num_samples: int = 64
    """How many samples to draw."""
    seed: int = 0
    """Seed of the first sample."""
    class_label: int | None = None
    """One class for all; classes in turn by default."""
    guidance_scale: float | None = None
    """uncond + scale (cond - uncond), for a model that knows guidance; 1 is none. The model's own by default."""
    prompt: str | None = None
    """What to show, for a model of texts."""
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
    overwrite: Switch = False
    """Replace what is at --out."""
    json: Switch = False
    """Print what was drawn as one JSON document."""


@dataclass
class EvaluateArguments:
    """Measure every student of a run at its own steps, and the teacher by several samplers at all, in one or several
    kinds of features, over one or several sets of seeds. SUBJECT is the folder of a run, of a stage, of a diffusers
    pipeline (or its name on the Hub), or a folder of images or an .npz of samples. The same command goes on where it
    was cut, and draws nothing that is there. It writes evaluation.json, .md, .csv, .svg, and keeps the samples."""

    subject: tyro.conf.Positional[str]
    """What to measure."""
    num_steps: tuple[int, ...] = ()
    """Steps of the --against series, and of a single stage; by default the start of the chain, halved down to 1."""
    against: tuple[str, ...] | None = None
    """Series beside the students: teacher-SAMPLER or student-SAMPLER (see `halfstep ls samplers`); teacher-ddim by
    default."""
    extractors: tuple[str, ...] = ()
    """Where distances are measured: NAME or NAME=WEIGHTS (see `halfstep ls extractors`); the recipe's by default."""
    seeds: int = 1
    """Sets of seeds; with several, figures have a spread."""
    num_samples: int | None = None
    """Samples in a set; as in the recipe by default, and all of a folder's."""
    gamma: float | None = None
    """Of ancestral sampling: its variance, from 0 for the lower bound to 1 for the upper, which is the default."""
    search_gamma: int | None = None
    """Try so many values of gamma from 0 to 1 (the paper: 11) for each ancestral row and show the best."""
    guidance_scale: float | None = None
    """For models that know guidance; each model's own by default."""
    precision: Literal["float32", "bf16"] | None = None
    """bf16 lets the networks compute in bfloat16 while they sample; as in the recipe by default."""
    batch_size: int | None = None
    """Samples drawn at once; the recipe's number by default, or as many as fit if it has none."""
    data: str | None = None
    """Real samples to compare with; those of the recipe by default."""
    image_size: int | None = None
    """Side to which real images of another size are brought; as in the recipe by default."""
    channels: Literal[1, 3] | None = None
    """1 reads real images as grey, 3 in colour; as in the recipe by default."""
    split: str | None = None
    """Their split; the recipe's by default, on which the models were trained."""
    out: Path | None = None
    """Folder of the evaluation; SUBJECT/evaluation by default, evaluation-NAME here for what is no run or stage."""
    json: Switch = False
    """Print the evaluation as one JSON document, as in evaluation.json; progress goes to stderr."""


@dataclass
class ReportArguments:
    """Write RUN/report/index.html, one file that needs no network."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, finished or in progress."""
    studies: Path | None = None
    """Folder of studies (`halfstep study`) to show in it; RUN/studies by default."""


@dataclass
class ListArguments:
    """List what recipes and options can name: the members of every family, with a line on each."""

    families: tyro.conf.Positional[tuple[str, ...]] = field(default=())
    """Families to list; all by default."""
    json: Switch = False
    """Print one JSON document: families, their members, and what each is."""


def settings_of(model: Any) -> dict[str, Any]:
    """Return the types of the fields of a configuration, by name."""
    if is_dataclass(model):
        return {one.name: one.type for one in fields(model)}
    return {name: one.annotation for name, one in type(model).model_fields.items()}


def flags_of(model: Any, prefix: str = "") -> list[str]:
    """The flags of a recipe's fields."""
    flags: list[str] = []
    for name in settings_of(model):
        value = getattr(model, name)
        dotted = f"{prefix}{name.replace('_', '-')}"
        nested = isinstance(value, BaseModel) or is_dataclass(value)
        flags += flags_of(value, f"{dotted}.") if nested else [f"--{dotted}"]
    return flags


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
    expanded = []
    for token in argv:
        name, equals, value = token.partition("=")
        expanded.append(SHORT.get(name, name) + equals + value if name in SHORT else token)
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
