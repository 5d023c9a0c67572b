"""Helpers that look up recipes, process groups and devices for several verbs."""

from pathlib import Path
from shlex import quote
from typing import Any

import torch
from pydantic import ValidationError

from halfstep.cli.usage import UsageError, first_line
from halfstep.nets import OWN
from halfstep.recipes import Recipe, recipes
from halfstep.run.spec import GIVEN_TEACHER
from halfstep.runs import RunFolder, StageFolder
from halfstep.runtime.devices import default_accelerator, existing_device
from halfstep.runtime.files import DamagedFile, read_json
from halfstep.runtime.launch import world_size
from halfstep.runtime.processes import Processes, make_accelerator


def recipe_from(text: str) -> Recipe:
    """Return the recipe for `text`, which is a built-in name, the folder of a run or a .json file.

    Raises:
        ValueError: if the recipe does not exist.
    """
    path = Path(text)
    if text in recipes or not (path.suffix == ".json" or path.is_dir()):
        return recipes[text]()
    if not path.is_dir():
        # The user may have written this file, so it needs no seal.
        data = read_json(path)
        _refuse_chain(data, text)
        return _recipe_in(data, path)
    run = RunFolder(path)
    if not (run.recipe_path.exists() or run.log_path.exists() or run.stages()):
        raise UsageError(
            f"{text} is neither a recipe ({', '.join(recipes)}) nor the folder of a run. To train on the images in "
            f"this folder: halfstep run images --data {quote(text)}"
        )
    data = run.recipe()
    _refuse_chain(data, text)
    return _recipe_in(data, run.recipe_path)


def _refuse_chain(data: Any, text: str) -> None:
    """Raise UsageError for the JSON of a run from a given teacher, because `halfstep run` would train a new one."""
    held = data.get("recipe", data) if isinstance(data, dict) else {}
    if isinstance(held, dict) and held.get("what") == "chain":
        raise UsageError(
            f"{text} was distilled from a given teacher. To resume it, rerun its command. To train other students of "
            f"this teacher: halfstep distill RUN/stages/{GIVEN_TEACHER}"
        )


def recipe_of_run(run: RunFolder) -> Recipe:
    """Return the recipe of a run; raise ValueError if its recipe.json is damaged or does not contain a recipe."""
    return _recipe_in(run.recipe(), run.recipe_path)


def _recipe_in(data: Any, file: Path) -> Recipe:
    """Return the recipe from parsed JSON: a run's recipe.json, or a file that contains only a recipe."""
    if isinstance(data, dict) and isinstance(data.get("recipe"), dict):
        data = data["recipe"]
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not contain a recipe")
    network = data.get("network")
    if isinstance(network, dict) and network.get("type") == OWN:
        raise UsageError(
            f"{file} belongs to a run of your own network, which the command line cannot build. In Python, repeat the "
            "call; to measure the models, add evaluation=halfstep.Evaluation()"
        )
    if "call" in data:
        raise UsageError(f"{file} belongs to a run of {data['call']}. Repeat the call in Python to resume or change it")
    try:
        return Recipe.model_validate({key: value for key, value in data.items() if key not in ("what", "parent")})
    except ValidationError as error:
        raise UsageError(f"{file}: {first_line(error)}") from None


def recipe_of_stage(stage: StageFolder) -> Recipe | None:
    """Return the recipe of the run that contains a stage.

    Return None if the stage is not part of a run, or of a run that a call in Python started with one of halfstep's
    networks, because such a run has no recipe.
    """
    if stage.run is None or not stage.run.recipe_path.exists():
        return None
    held = stage.run.recipe()["recipe"]
    has_own_network = held.get("network", {}).get("type") == OWN
    return None if "call" in held and not has_own_network else recipe_of_run(stage.run)


def processes_of(cpu: bool = False) -> Processes:
    """Return the process group that runs this command (usually a single process)."""
    return Processes(make_accelerator(cpu=cpu)) if world_size() > 1 else Processes()


def device_of(name: str | None, processes: Processes | None = None) -> torch.device:
    """Return the named device or, by default, the accelerator if there is one and the CPU otherwise. With several
    processes, each uses its own GPU.

    Raises:
        ValueError: if this machine has no such device, or the device has no float64.
    """
    if name in (None, "cuda") and processes is not None and processes.count > 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return existing_device(name or default_accelerator() or "cpu")
