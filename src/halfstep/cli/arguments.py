"""Arguments of the verbs that take recipes and models, and the recipes, processes and devices built from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import torch
import tyro
from pydantic import ValidationError

from halfstep.cli.usage import Count, Guidance, Range, Share, Side, Steps, Switch, UsageError, first_line
from halfstep.core.noise import processes as noise_processes
from halfstep.core.prediction import predictions, weightings
from halfstep.metrics import extractors
from halfstep.nets import BasePrecision, networks
from halfstep.objectives import objectives
from halfstep.recipes import Recipe, recipes
from halfstep.registry import Registry
from halfstep.runs import RunFolder, StageFolder
from halfstep.runtime.files import DamagedFile, read_json
from halfstep.runtime.launch import world_size
from halfstep.runtime.processes import Processes, make_accelerator
from halfstep.samplers import samplers
from halfstep.studies import studies

SHORT: Final = {"--data": "--data.source", "--to": "--chain.end-steps", "--start": "--chain.start-steps"}
"""Short names of recipe options."""

SHORT_OF_FINISH: Final = {"--steps": "--finish.steps"}
"""Short names of the options of `finish`."""

FAMILIES: Final[Mapping[str, Registry[Any]]] = {
    "recipes": recipes,
    "samplers": samplers,
    "predictions": predictions,
    "weightings": weightings,
    "processes": noise_processes,
    "objectives": objectives,
    "networks": networks,
    "studies": studies,
    "extractors": extractors,
}
"""Registries of the names that recipes and options accept, by family."""

if TYPE_CHECKING:
    FamilyName = str
    RecipeName = str
    SamplerName = str
    StudyName = str
else:
    FamilyName = tyro.extras.literal_type_from_choices(FAMILIES)
    RecipeName = tyro.extras.literal_type_from_choices(recipes)
    SamplerName = tyro.extras.literal_type_from_choices(samplers)
    StudyName = tyro.extras.literal_type_from_choices(studies)

RecipeFields = tyro.conf.AvoidSubcommands[Annotated[Recipe, tyro.conf.arg(name="", help="")]]


@dataclass
class PlanArguments:
    """Options shared by the verbs that run a plan."""

    recipe: RecipeFields
    dry_run: Switch = False
    """Print plan, memory and time; write nothing."""
    json: Switch = False
    """Print one JSON document: the plan with --dry-run, otherwise the final status."""


@dataclass
class RunArguments(PlanArguments):
    """Run the whole plan of a recipe: train, halve, measure and report. Rerun the same command to resume it."""

    out: Path | None = None
    """Folder of the run; runs/NAME by default."""


@dataclass
class DistillArguments(PlanArguments):
    """Distil a model to fewer steps. MODEL is a run (its last stage is used), a stage, a diffusers folder or a name on
    the Hub. A teacher that predicts eps is matched to v first. Defaults are those of the recipe of MODEL's run,
    otherwise those of an imported model.
    """

    out: Path | None = None
    """Folder of the new run; runs/NAME-STAGE-to-STEPS by default."""
    prompts: Path | None = None
    """File with one prompt per line, instead of --data. For a pipeline: the teacher samples these prompts into OUT-data
    and is distilled on the samples.
    """
    call: tuple[str, ...] = ()
    """Pipeline call arguments shared by all samples, such as height=512 width=512."""
    base_precision: BasePrecision = "float32"
    """Precision of a pipeline's frozen weights under --chain.lora-rank: bf16, int8 or nf4 (bitsandbytes), int8wo
    (torchao)."""


@dataclass
class FinishArguments(PlanArguments):
    """Finish students of a trained run: train their samples towards the distribution of the undistilled teacher. RUN
    is the folder of a run; the new stages are added to it. The options are those of its recipe. Options of stages that
    are already trained cannot change."""


@dataclass
class SampleArguments:
    """Draw samples from a model in any number of steps. Seeds count up from --seed, and each sample depends only on its
    own seed, not on the batch. A seed gives the same noise for any number of steps and any model.
    """

    model: tyro.conf.Positional[Path]
    """Folder of a run (its last stage is used) or of a stage."""
    num_steps: Steps | None = None
    """Sampler steps; by default the number that the model was distilled for."""
    num_samples: Count = 64
    """Number of samples to draw."""
    seed: Annotated[int, Range(0, 2**62)] = 0
    """Seed of the first sample."""
    class_label: Annotated[int, Range(0, 2**31)] | None = None
    """Class of all samples; by default, samples cycle through the classes."""
    guidance_scale: Guidance | None = None
    """Scale in uncond + scale (cond - uncond), for models that support guidance; 1 disables it. The model's own by
    default."""
    prompt: str | None = None
    """Prompt of a text-conditioned model."""
    sampler: SamplerName | None = None
    """Sampler (`halfstep ls samplers` describes them); the model's own by default."""
    gamma: Share | None = None
    """Variance of ancestral sampling: 0 is its lower bound, 1 its upper bound (the default)."""
    batch_size: Count | None = None
    """Samples drawn at once; as many as fit by default."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 runs the network in bfloat16."""
    device: str | None = None
    """cpu, cuda or mps; by default the fastest available."""
    out: Path = Path("samples.png")
    """A .png (one grid, small images enlarged), a .npz (arr_0, uint8 [n, h, w, c]), or a folder (one PNG each, true
    size)."""
    overwrite: Switch = False
    """Replace an existing --out."""
    json: Switch = False
    """Describe the samples in one JSON document."""


@dataclass
class EvaluateArguments:
    """Measure each student of a run at its own number of steps, and the teacher at all of these numbers with several
    samplers, in one or more feature spaces and with one or more sets of seeds. SUBJECT is a run, a stage, a diffusers
    pipeline (a folder or a name on the Hub), a folder of images, or an .npz of samples. To resume, run the same command
    again: finished samples are reused. Writes evaluation.json, .md, .csv and .svg, and keeps the samples.
    """

    subject: tyro.conf.Positional[str]
    """Model, run or samples to evaluate."""
    num_steps: tuple[Steps, ...] = ()
    """Steps of the --against series and of a single stage; by default, the start of the chain, halved down to 1."""
    against: tuple[str, ...] | None = None
    """Series to compare with the students: teacher-SAMPLER or student-SAMPLER (see `halfstep ls samplers`); by default
    teacher-ddim, and also teacher-heun unless --num-steps is given."""
    extractors: tuple[str, ...] = ()
    """Feature extractors for the distances: NAME or NAME=WEIGHTS (see `halfstep ls extractors`); the recipe's by
    default.
    """
    seeds: Annotated[int, Range(1, 1000)] = 1
    """Number of sets of seeds; with several, results include their spread."""
    num_samples: Annotated[int, Range(2, 1_000_000)] | None = None
    """Samples per set; by default the recipe's number, or all of a folder's."""
    gamma: Share | None = None
    """Variance of ancestral sampling: 0 is its lower bound, 1 its upper bound (the default)."""
    search_gamma: Annotated[int, Range(2, 1000)] | None = None
    """Number of gammas from 0 to 1 to try for each ancestral row (the paper: 11); the best is shown."""
    guidance_scale: Guidance | None = None
    """Guidance scale, for models that support guidance; each model's own by default."""
    precision: Literal["float32", "bf16"] | None = None
    """bf16 samples in bfloat16; as in the recipe by default."""
    batch_size: Count | None = None
    """Samples drawn at once; by default the recipe's number, or as many as fit."""
    data: str | None = None
    """Real samples to compare with; the recipe's by default."""
    image_size: Side | None = None
    """Side to which real images are resized; as in the recipe by default."""
    channels: Literal[1, 3] | None = None
    """1 reads real images as grey, 3 in colour; as in the recipe by default."""
    split: str | None = None
    """Split of the real data; by default the recipe's, which the models were trained on."""
    no_labels: Switch = False
    """Ignore the classes of the real data."""
    label_column: str | None = None
    """Table column with the class of each real image; as in the recipe by default."""
    skip_broken: Switch = False
    """Skip real images that cannot be read."""
    max_bytes: int | None = None
    """Memory for the pixels of the real images; as in the recipe by default."""
    out: Path | None = None
    """Folder of the evaluation; by default SUBJECT/evaluation for a run or stage, otherwise ./evaluation-NAME."""
    json: Switch = False
    """Print the evaluation as one JSON document, as in evaluation.json; progress goes to stderr."""


@dataclass
class ReportArguments:
    """Write RUN/report/index.html, a single file that works offline."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, finished or in progress."""
    studies: Path | None = None
    """Folder of studies (`halfstep study`) to include; RUN/studies by default."""


@dataclass
class ListArguments:
    """List the names that recipes and options accept, by family, with one line on each."""

    families: tyro.conf.Positional[tuple[FamilyName, ...]] = field(default=())
    """Families to list; all by default."""
    json: Switch = False
    """Print one JSON document: families, their members, and a line on each."""


def recipe_from(text: str) -> Recipe:
    """Return the recipe given as a built-in name, a run's folder or a .json file.

    Raises: ValueError: if it does not exist, or the file does not contain a recipe.
    """
    path = Path(text)
    if text in list(recipes) or not (path.suffix == ".json" or path.is_dir()):
        return recipes[text]()
    if path.is_dir():
        run = RunFolder(path)
        if not (run.recipe_path.exists() or run.log_path.exists() or run.stages()):
            raise UsageError(
                f"{text} is neither a recipe ({', '.join(recipes)}) nor the folder of a run. To train on images in it: "
                f"halfstep run images --data {quote(text)}"
            )
        return recipe_of_run(run)
    # The user may have written or edited this file.
    return _recipe_in(read_json(path), path)


def recipe_of_run(run: RunFolder) -> Recipe:
    """Return the recipe of a run.

    Raises:
        ValueError: if it is damaged or not a recipe.
    """
    return _recipe_in(run.recipe(), run.recipe_path)


def _recipe_in(data: Any, file: Path) -> Recipe:
    """Return the recipe from the content of a run's recipe.json, or of a file that contains a bare recipe."""
    if isinstance(data, dict) and isinstance(data.get("recipe"), dict):
        data = data["recipe"]
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not contain a recipe")
    try:
        return Recipe.model_validate({key: value for key, value in data.items() if key not in ("what", "parent")})
    except ValidationError as error:
        raise UsageError(f"{file}: {first_line(error)}") from None


def recipe_of_stage(stage: StageFolder) -> Recipe | None:
    """Return the recipe of the run that contains a stage; None for a stage outside a run."""
    return None if stage.run is None or not stage.run.recipe_path.exists() else recipe_of_run(stage.run)


def options_from(words: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE words into pipeline call arguments; a value that is not JSON is kept as text.

    Raises:
        UsageError: if a word has no value.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise UsageError(f"--call {word}: give NAME=VALUE, such as --call height=512 width=512")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def processes_of(cpu: bool = False) -> Processes:
    """Return the processes that run this verb together; usually one."""
    return Processes(make_accelerator(cpu=cpu)) if world_size() > 1 else Processes()


def device_of(name: str | None, processes: Processes | None = None) -> torch.device:
    """Return the named device, or the fastest one; with several processes, each gets its own.

    Raises:
        UsageError: if it cannot be used here.
    """
    if name in (None, "cuda") and processes is not None and processes.count > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it stores no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device
