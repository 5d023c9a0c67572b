"""Write, find and load the stage folders of models."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.door import got
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.models.model import Model
from halfstep.nets import OWN, LoRA, build_network, copy_network, load_own_state, own_state, rebuild_own
from halfstep.runs import Manifest, RunFolder, StageFolder
from halfstep.runtime.devices import existing_device
from halfstep.runtime.files import (
    DamagedFile,
    contents,
    last_line,
    leftovers,
    refuse_file,
    scratch,
    sweep,
    sync,
    user_path,
    write_sealed,
)
from halfstep.runtime.tensors import check_finite, read_tensors, write_tensors

PRETRAINED: Final = Path(__file__).parent.parent / "pretrained"
"""The folder of the packaged students, with a stage folder for each student. Weights are stored in float16."""


def pretrained() -> dict[str, Path]:
    """Return a mapping from the packaged students' names to their folders."""
    return {found.parent.name: found.parent for found in sorted(PRETRAINED.glob("*/manifest.json"))}


def model_path(path: str | Path) -> Path:
    """Return `path`, or the folder of the packaged student with that name if `path` does not exist."""
    path = Path(path)
    return path if path.exists() else pretrained().get(str(path), path)


def save_stage(
    folder: StageFolder, denoiser: NetworkDenoiser, manifest: Manifest, null: Mapping[str, Tensor] | None = None
) -> Manifest:
    """Write model.safetensors, null.safetensors if needed, and then manifest.json, which marks the stage as complete.

    Raises:
        OSError: if the disk is full or no longer available.
        DamagedFile: if a weight is not finite, or if a file differs from the data that was written to it. In either
            case, no manifest is written.
    """
    contents = {folder.model: own_state(denoiser.network)}
    if null:
        contents[folder.null] = dict(null)
    for file, tensors in contents.items():
        check_finite(tensors, manifest.source or file)
    digests = {file.name: write_tensors(file, tensors) for file, tensors in contents.items()}
    complete = manifest.model_copy(update={"files": digests})
    write_sealed(folder.manifest_path, complete.model_dump(mode="json"))
    return complete


def drop_weights(folder: StageFolder) -> None:
    """Mark a complete stage's weights as dropped in its manifest, and then delete the weights.

    Repeated calls are safe.
    """
    manifest = folder.manifest(verify=False)
    if manifest.weights_kept:
        dropped = manifest.model_copy(update={"weights_kept": False, "files": {}})
        write_sealed(folder.manifest_path, dropped.model_dump(mode="json"))
    folder.model.unlink(missing_ok=True)


def find_stage(path: Path) -> StageFolder:
    """Return the stage in `path`, the last complete stage of the run in `path`, or the packaged student named `path`.

    Raises:
        ValueError: if `path` is neither a stage, nor a run with a complete stage, nor a packaged student.
    """
    path = model_path(path)
    if not path.exists():
        named = f", or the name of a packaged student ({', '.join(pretrained())})" if path.parts == (path.name,) else ""
        raise ValueError(f"{path} does not exist. Pass the folder of a run or of one of its stages{named}")
    if path.is_dir() and (path / "manifest.json").exists():
        return StageFolder(path)
    run = RunFolder(path)
    if path.is_dir() and (stages := run.stages()):
        # Even without a readable plan, a started but unfinished stage shows that the run is incomplete.
        if missing := [name for name in run.stage_names() if not run.stage(name).is_complete()]:
            warnings.warn(
                f"{path} is incomplete, because stage {missing[0]} has not finished. Using its last complete stage, "
                f"{stages[-1].name}",
                HalfstepWarning,
                stacklevel=2,
            )
        return stages[-1]
    if (path / "recipe.json").is_file():
        raise ValueError(f"{path} is a run without a complete stage. Resume the run first")
    if (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is a diffusers pipeline, not a halfstep model. Import it (halfstep import diffusers {path}) or "
            f"distil it (halfstep distill {path}), and use the resulting folder"
        )
    raise ValueError(
        f"{path} is not a model. Pass the folder of a run, or the folder of a stage, which contains a manifest.json"
    )


def blank_denoiser(manifest: Manifest, network: nn.Module | None = None) -> NetworkDenoiser:
    """Return the denoiser that a manifest describes, with fresh weights.

    Args:
        network: the network to copy, if the manifest specifies a custom network.

    Raises:
        ValueError: if the manifest specifies an unknown network, process or prediction.
    """
    process, prediction = processes.rebuild(manifest.process), predictions.rebuild(manifest.prediction)
    if network is None or manifest.network.get("type") != OWN:
        return NetworkDenoiser(build_network(manifest.network), process, prediction)
    blank = NetworkDenoiser(network, process, prediction)
    blank.network = rebuild_own(manifest.network, copy_network(blank.network), process)
    return blank


def base_of(folder: StageFolder, manifest: Manifest) -> StageFolder:
    """Return the base stage of a LoRA stage.

    Raises:
        DamagedFile: if the base stage is missing, incomplete or damaged.
    """
    base = StageFolder(folder.path.parent / str(manifest.base))
    held = base.manifest() if base.is_complete() else None
    if held is None or not held.weights_kept or (held.stage, held.run) != (manifest.base, manifest.run):
        raise DamagedFile(
            f"{folder.path} contains LoRA weights for the stage {manifest.base}, which is missing from this run. Copy "
            "the whole run"
        )
    return base


def save(model: Model, path: str | Path) -> None:
    """Save a model as a folder that `load` and the command line can use, with LoRA weights merged into the base.

    Args:
        path: a new folder, or the folder of a saved model, which is overwritten.

    Raises:
        ValueError: if `model` is not a `Model`, or if `path` contains anything other than a saved model.
        DamagedFile: if a weight is not finite. In this case and if the disk is full, the old model remains.
        OSError: if the disk is full or no longer available.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"save needs a model, got {got(model)}. Pass the result of fit or distill, or "
            "halfstep.Model.of(denoiser, shape)"
        )
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(f"save needs the path of a folder, got {path!r}. Pass 'my-student'")
    folder = StageFolder(user_path(path))
    refuse_file(folder.path, "Choose another path")
    if folder.path.parent.name == "stages" and (folder.path.parent.parent / "recipe.json").exists():
        raise ValueError(f"{path} is a stage of a run, and other stages depend on it. Choose another path")
    ours = {folder.manifest_path, folder.model, folder.null, *leftovers(folder.path)}
    if folder.path.is_dir() and (foreign := sorted(set(contents(folder.path)) - ours)):
        raise ValueError(f"{path} contains {foreign[0].name}, which is not part of a saved model. Choose another path")
    whole = model.merged()
    check_finite(own_state(whole.denoiser.network), whole.manifest.source or "the model")
    manifest = whole.manifest.model_copy(update={"run": None, "stage": folder.name})
    sweep(folder.path)
    with scratch(folder.model) as place:
        place.mkdir()
        new = StageFolder(place)
        save_stage(new, whole.denoiser, manifest, whole.null)
        # The manifest is deleted first and moved last, so an incomplete folder never counts as a model.
        folder.manifest_path.unlink(missing_ok=True)
        folder.null.unlink(missing_ok=True)
        for file in (new.model, new.null, new.manifest_path):
            if file.exists():
                file.replace(folder.path / file.name)
                sync(folder.path)


def _read(file: Path) -> dict[str, Tensor]:
    tensors = read_tensors(file)
    check_finite(tensors, file)
    return tensors


def load(path: str | Path, device: str | torch.device = "cpu", network: nn.Module | None = None) -> Model:
    """Load the model of the stage in `path`, or of the last complete stage if `path` is the folder of a run.

    Args:
        path: the folder, or the name of a packaged student, such as "fashion".
        network: a custom network built like the trained network; it is copied.

    Raises:
        ValueError: if no model or device with this name exists, or if `network` does not match the weights.
        DamagedFile: if a file of the model is missing or altered, does not match its manifest, belongs to another stage
            or run, or contains a weight that is not finite. DamagedFile is a subclass of ValueError.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"load needs a path, got {got(path)}. Pass the folder of a run or of a stage")
    device = existing_device(device)
    folder = find_stage(user_path(path))
    manifest = folder.manifest()
    if not manifest.weights_kept:
        raise ValueError(
            f"{folder.path} no longer has weights, because its run was configured not to keep them (see chain.keep). "
            "Load another stage"
        )
    if network is not None and manifest.network.get("type") != OWN:
        raise ValueError(
            f"{folder.path} contains one of halfstep's networks, so the argument `network` has no effect. Remove it"
        )
    denoiser = blank_denoiser(manifest, network)
    try:
        if isinstance(denoiser.network, LoRA):
            denoiser.network.load_base(_read(base_of(folder, manifest).model))
        load_own_state(denoiser.network, _read(folder.model))
    except RuntimeError as error:
        if manifest.network.get("type") == OWN:
            raise ValueError(
                f"the network does not match the weights of {folder.path} ({last_line(error)}). Build it like the "
                "trained network"
            ) from None
        raise DamagedFile(f"{folder.model} does not match its manifest: {last_line(error)}; {folder.remedy}") from None
    denoiser.eval()
    null = _read(folder.null) if folder.null.name in manifest.files else {}
    return Model(denoiser, manifest, null).to(device)
