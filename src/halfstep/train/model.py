"""A model as it lies in a stage's folder: written, read, and sampled from."""

import warnings
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Cond, Denoiser, NetworkDenoiser, warn_of_gain
from halfstep.core.draw import sample_labels, sample_noise, step_noise
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import NoiseProcess, processes
from halfstep.core.prediction import Denoised, Prediction, predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.nets import build_network
from halfstep.runs import DamagedFile, Manifest, RunFolder, StageFolder, sha256_of, write_json
from halfstep.samplers import Sampler, sample
from halfstep.train.tensors import read_tensors, write_tensors


@final
class Model(Denoiser):
    """A trained denoiser with what is known of it.

    Calling it clips x0 if the manifest says so (images); `denoiser` is the bare one, for targets and losses.
    """

    def __init__(self, denoiser: NetworkDenoiser, manifest: Manifest) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process: NoiseProcess = denoiser.process
        self.manifest = manifest
        self._sampled: Denoiser = Clipped(denoiser) if manifest.clip else denoiser

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        return self._sampled(x_t, t, cond)

    @property
    def num_steps(self) -> int | None:
        """Sampler steps that the model was distilled for; None for a teacher, which takes any number."""
        return self.manifest.num_steps

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.manifest.shape

    @property
    def num_classes(self) -> int:
        """Classes that the model is conditioned on; 0 if it is unconditional."""
        return self.manifest.num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.denoiser.parameters()).device

    def noise(self, seeds: range | list[int]) -> Tensor:
        """Starting noise `[len(seeds), *shape]`, each row a function of its own seed."""
        return sample_noise(seeds, self.shape).to(self.device)

    def cond(self, seeds: range | list[int], class_label: int | None = None) -> dict[str, Tensor]:
        """Conditions for samples of these seeds: the class given, or else classes in turn; empty if unconditional.

        Raises:
            ValueError: if a class is asked for that the model does not have.
        """
        if not self.num_classes:
            if class_label is not None:
                raise ValueError("a class was asked for, but this model is unconditional: leave the class out")
            return {}
        if class_label is None:
            return {"class_labels": sample_labels(seeds, self.num_classes).to(self.device)}
        if not 0 <= class_label < self.num_classes:
            raise ValueError(
                f"class {class_label} was asked for, but this model has classes 0 to {self.num_classes - 1}"
            )
        return {"class_labels": torch.full((len(seeds),), class_label, device=self.device)}

    def check_steps(self, num_steps: int | None) -> int:
        """The number of steps to sample with: `num_steps`, or the model's own if it is None.

        Warns if it is not the number that the model was distilled for.

        Raises:
            ValueError: if neither is known.
        """
        own = self.num_steps
        if num_steps is None:
            if own is None:
                raise ValueError("this is a teacher, which takes any number of steps: say how many (num_steps)")
            return own
        check_num_steps(num_steps)
        if own is not None and num_steps > own:
            warnings.warn(
                f"{num_steps} steps were asked of a model that was distilled for {own}: more steps do not make it "
                "better; use an earlier stage of the chain",
                HalfstepWarning,
                stacklevel=3,
            )
        elif own is not None and num_steps < own:
            warnings.warn(
                f"{num_steps} steps were asked of a model that was distilled for {own}: use a later stage of the chain",
                HalfstepWarning,
                stacklevel=3,
            )
        return num_steps

    def sample(
        self,
        seeds: range | list[int],
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        class_label: int | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Samples x0 `[len(seeds), *shape]`, on the CPU, each a function of its own seed.

        Args:
            num_steps: the model's own number if None.
            sampler: DDIM if None.
            class_label: one class for all; classes in turn if None.

        Raises:
            ValueError: if the number of steps or the class is not possible.
        """
        steps = self.check_steps(num_steps)
        warn_of_gain(self.process, self.denoiser.prediction)
        self.eval()
        chunks = []
        for first in range(0, len(seeds), batch_size):
            part = seeds[first : first + batch_size]
            drawn = step_noise(part, self.shape) if sampler is not None and sampler.stochastic else None
            cond = self.cond(part, class_label)
            chunks.append(sample(self, self.noise(part), steps, sampler, cond, noise=drawn).cpu())
        return torch.cat(chunks) if chunks else torch.empty(0, *self.shape)


def save_stage(folder: StageFolder, denoiser: NetworkDenoiser, manifest: Manifest) -> Manifest:
    """Writes model.safetensors and then manifest.json, whose appearance says that the stage is complete."""
    folder.path.mkdir(parents=True, exist_ok=True)
    temporary = folder.path / ".model.safetensors.tmp"
    state = {name: value.detach().cpu().contiguous() for name, value in denoiser.network.state_dict().items()}
    try:
        write_tensors(state, temporary)
        temporary.replace(folder.model)
    finally:
        temporary.unlink(missing_ok=True)
    complete = manifest.model_copy(update={"files": {folder.model.name: sha256_of(folder.model)}})
    write_json(folder.manifest_path, complete.model_dump(mode="json"))
    return complete


def drop_weights(folder: StageFolder) -> None:
    """Removes a complete stage's weights, and says so in its manifest first: a cut between the two is made good by a
    second call."""
    manifest = folder.manifest(verify=False)
    if manifest.weights_kept:
        dropped = manifest.model_copy(update={"weights_kept": False, "files": {}})
        write_json(folder.manifest_path, dropped.model_dump(mode="json"))
    folder.model.unlink(missing_ok=True)


def find_stage(path: Path) -> StageFolder:
    """The stage that `path` means: itself, or the last complete stage of the run that it is.

    Raises:
        ValueError: if it is neither.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a run or of one of its stages")
    if path.is_dir() and (path / "manifest.json").is_file():
        return StageFolder(path)
    stages = RunFolder(path).stages() if path.is_dir() else []
    if stages:
        return stages[-1]
    if (path / "recipe.json").is_file():
        raise ValueError(f"{path} is a run without a complete stage: let it train first")
    raise ValueError(f"{path} is no model: give the folder of a run or of one of its stages (with a manifest.json)")


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in `path`: the folder of a stage, or of a run, which means its last complete stage.

    Raises:
        ValueError: if there is no model, or (DamagedFile) a file of it is missing, altered or does not fit.
    """
    folder = find_stage(Path(path))
    manifest = folder.manifest()
    if not manifest.weights_kept:
        raise ValueError(
            f"{folder.path} has no weights any more: its run was asked to keep those of other stages only "
            "(chain.keep); load another stage"
        )
    process_arguments = dict(manifest.process)
    process = processes[str(process_arguments.pop("type", ""))](**process_arguments)
    prediction: Prediction = predictions[manifest.prediction]()
    network = build_network(manifest.network)
    try:
        network.load_state_dict(read_tensors(folder.model))
    except RuntimeError as error:
        raise DamagedFile(f"{folder.model} does not fit its manifest: {str(error).splitlines()[-1].strip()}") from None
    network.eval()
    return Model(NetworkDenoiser(network, process, prediction), manifest).to(device)
