"""The stage folder of a model: written, found and loaded."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.door import got
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.models.model import Model
from halfstep.models.pretrained import model_path, pretrained
from halfstep.nets import OWN, LoRA, build_network, load_own_state, own_state
from halfstep.runs import Manifest, RunFolder, StageFolder
from halfstep.runtime.devices import existing_device
from halfstep.runtime.files import DamagedFile, last_line, refuse_file, write_sealed
from halfstep.runtime.tensors import check_finite, read_tensors, write_tensors


def save_stage(
    folder: StageFolder, denoiser: NetworkDenoiser, manifest: Manifest, null: Mapping[str, Tensor] | None = None
) -> Manifest:
    """Write model.safetensors (and null.safetensors), then manifest.json, which marks the stage as complete.

    Raises:
        OSError: if the disk is full or gone.
        DamagedFile: if a weight is not finite, or what is read back is not what was written; there is no manifest then.
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
    """Remove a complete stage's weights, after its manifest says so: rerun it if it was interrupted between."""
    manifest = folder.manifest(verify=False)
    if manifest.weights_kept:
        dropped = manifest.model_copy(update={"weights_kept": False, "files": {}})
        write_sealed(folder.manifest_path, dropped.model_dump(mode="json"))
    folder.model.unlink(missing_ok=True)


def find_stage(path: Path) -> StageFolder:
    """Return the stage that `path` means: itself, the last complete stage of a run, or a packaged student by name.

    Raises:
        ValueError: if it is none of them.
    """
    path = model_path(path)
    if not path.exists():
        named = f", or the name of a packaged student ({', '.join(pretrained())})" if path.parts == (path.name,) else ""
        raise ValueError(f"{path} does not exist: give the folder of a run or of one of its stages{named}")
    if path.is_dir() and (path / "manifest.json").exists():
        return StageFolder(path)
    run = RunFolder(path)
    if path.is_dir() and (stages := run.stages()):
        if missing := [row.name for row in run.plan if not run.stage(row.name).is_complete()]:
            warnings.warn(
                f"{path} is not at its end ({missing[0]} is not complete): its stage {stages[-1].name} is used",
                HalfstepWarning,
                stacklevel=2,
            )
        return stages[-1]
    if (path / "recipe.json").is_file():
        raise ValueError(f"{path} is a run without a complete stage: let it train first")
    raise ValueError(f"{path} is not a model: give the folder of a run or of one of its stages (with a manifest.json)")


def blank_denoiser(manifest: Manifest, network: nn.Module | None = None) -> NetworkDenoiser:
    """Return the denoiser that a manifest describes, with fresh weights.

    Args:
        network: a copy of it is the network, if the manifest names one of the user's own.

    Raises:
        ValueError: if the manifest names a network, process or prediction that is not known here.
    """
    process, prediction = processes.rebuild(manifest.process), predictions.rebuild(manifest.prediction)
    if network is None or manifest.network.get("type") != OWN:
        return NetworkDenoiser(build_network(manifest.network), process, prediction)
    blank = NetworkDenoiser(network, process, prediction)
    blank.network = copy.deepcopy(blank.network).requires_grad_(True)
    return blank


def base_of(folder: StageFolder, manifest: Manifest) -> StageFolder:
    """Return the stage whose weights a LoRA stage adds to, after checking its files.

    Raises:
        DamagedFile: if it is not there or not whole.
    """
    base = StageFolder(folder.path.parent / str(manifest.base))
    held = base.manifest() if base.is_complete() else None
    if held is None or not held.weights_kept or (held.stage, held.run) != (manifest.base, manifest.run):
        raise DamagedFile(
            f"{folder.path} holds low-rank additions to the weights of {manifest.base}, which are not beside it: copy "
            "the run whole"
        )
    return base


def save(model: Model, path: str | Path) -> None:
    """Save a model as a folder that `load` and the command line take; low-rank additions are merged into the weights.

    Args:
        path: a new folder, or that of a saved model, which is replaced.

    Raises:
        ValueError: if it is no model, or the path is something else.
        OSError: if the disk is full or gone.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"what is saved must be a model, got {got(model)}. Pass what fit or distill returns, or "
            "halfstep.Model.of(denoiser, shape)"
        )
    folder = StageFolder(Path(path))
    refuse_file(folder.path, "Choose another path")
    if folder.path.parent.name == "stages" and (folder.path.parent.parent / "recipe.json").exists():
        raise ValueError(f"{path} is a stage of a run, whose other stages depend on it. Choose another path")
    ours = {folder.manifest_path, folder.model, folder.null}
    if folder.path.is_dir() and (foreign := sorted(set(folder.path.iterdir()) - ours)):
        raise ValueError(f"{path} holds {foreign[0].name}, which is no saved model's. Choose another path")
    folder.path.mkdir(parents=True, exist_ok=True)
    # The folder is no model while its weights are replaced.
    folder.manifest_path.unlink(missing_ok=True)
    folder.null.unlink(missing_ok=True)
    whole = model.merged()
    manifest = whole.manifest.model_copy(update={"run": None, "stage": folder.name})
    save_stage(folder, whole.denoiser, manifest, whole.null)


def _read(file: Path) -> dict[str, Tensor]:
    tensors = read_tensors(file)
    check_finite(tensors, file)
    return tensors


def load(path: str | Path, device: str | torch.device = "cpu", network: nn.Module | None = None) -> Model:
    """Load the model in `path`: the folder of a stage, or of a run, which means its last complete stage.

    Args:
        path: the folder, or the name of a packaged student, such as "fashion".
        network: one of the class that the model was trained with, if that is the user's own; it is copied.

    Raises:
        ValueError: if there is no model, the device does not exist, or (DamagedFile) a file of the model is missing,
            altered, of another stage or run, does not fit, or holds a weight that is not finite.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"what is loaded must be a path, got {got(path)}. Pass the folder of a run or of a stage")
    device = existing_device(device)
    folder = find_stage(Path(path))
    manifest = folder.manifest()
    if not manifest.weights_kept:
        raise ValueError(
            f"{folder.path} has no weights any more: its run was asked to keep those of other stages only "
            "(chain.keep); load another stage"
        )
    denoiser = blank_denoiser(manifest, network)
    try:
        if isinstance(denoiser.network, LoRA):
            denoiser.network.load_base(_read(base_of(folder, manifest).model))
        load_own_state(denoiser.network, _read(folder.model))
    except RuntimeError as error:
        raise DamagedFile(f"{folder.model} does not fit its manifest: {last_line(error)}; {folder.remedy}") from None
    denoiser.eval()
    null = _read(folder.null) if folder.null.name in manifest.files else {}
    return Model(denoiser, manifest, null).to(device)
