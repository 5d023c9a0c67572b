"""A pipeline's VAE, and the mapping between the denoiser's samples and the VAE's latents.

To find the mapping, the end of the pipeline's call is run on known samples, without the denoiser or the VAE. Each
VAE input value must be an affine function of one sample value. The results determine the order of the values (for
example, packed or frames first), the shift and the scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from halfstep.data import SoundPreparation, VideoPreparation
from halfstep.hub.calls import difference
from halfstep.hub.disk import open_part
from halfstep.hub.recording import END, START, TOLERANCE
from halfstep.hub.schedulers import first_order
from halfstep.hub.stock import in_one_line, quiet
from halfstep.hub.trace import STEPS, component_of, prompted

_DIGITS: Final = (1, 1024, 1024**2)
"""Place values of an index's base-1024 digits. Indices pass through the pipeline as digits, which float32 represents
exactly."""
_REMEDY: Final = "Use --prompts instead of --data"


@final
@dataclass(frozen=True)
class Autoencoder:
    """A VAE that encodes images `[n, 3, h, w]`, videos `[n, 3, frames, h, w]` or sounds `[n, channels, m]`."""

    vae: Any
    decoded: tuple[int, ...]
    """Shape of the image, video or sound that one latent decodes to."""
    latent_shape: tuple[int, ...]
    """Shape of one denoiser sample."""
    order: Tensor
    """For each sample value, the index of the corresponding value in the flattened latent."""
    shift: Tensor
    scale: Tensor
    """Each latent value is shift + scale * the corresponding sample value."""

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """Height and width of an image, or None for videos and sounds."""
        return None if len(self.decoded) == 2 or (len(self.decoded) == 4 and self.decoded[1] > 1) else self.decoded[-2:]

    def preparation(self, frame_rate: float | None, options: Mapping[str, Any]) -> VideoPreparation | SoundPreparation:
        """Return the video or sound preparation for a pipeline called with the arguments `options`."""
        if len(self.decoded) == 4:
            return VideoPreparation(*self.decoded[1:], frame_rate)
        (channels, number), rate = self.decoded, int(self.vae.config.sampling_rate)
        end = options.get(END)
        audible = number if end is None else min(number, int(end * rate))
        return SoundPreparation(channels, number, rate, audible, options.get(START, 0.0))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Encode `x` as denoiser samples `[n, *latent_shape]`, using the means of the VAE's distributions.

        Raises:
            ValueError: if the VAE's encoder and decoder use latents of different sizes.
        """
        # Clips are encoded one at a time, because a clip can be as large as a batch of images.
        parts = x.reshape(len(x), *self.decoded).split(1 if self.image_size is None else len(x))
        latents = torch.cat([self._latents(part.to(self.shift.device)) for part in parts])
        return ((latents - self.shift) / self.scale)[:, self.order].reshape(-1, *self.latent_shape)

    def _latents(self, x: Tensor) -> Tensor:
        found = self.vae.encode(x, return_dict=False)[0]
        found = found if isinstance(found, Tensor) else found.mode()
        if found[0].numel() != len(self.order):
            raise ValueError(
                f"the {type(self.vae).__name__} encodes {list(x.shape[1:])} to {list(found.shape[1:])}, but latents "
                f"of that size do not decode to the original shape. {_REMEDY}"
            )
        return found.flatten(1)


def autoencoder_in(
    pipe: Any, folder: Path, shape: tuple[int, ...], device: torch.device, call: Mapping[str, Any]
) -> Autoencoder:
    """Load the VAE from a pipeline's folder onto a device.

    Args:
        pipe: the pipeline; its denoiser and VAE need no weights.
        shape: shape of one denoiser sample.
        call: pipeline call arguments other than the prompts.

    Raises:
        ValueError: if the folder has no VAE, or if its VAE does not encode to samples of this shape.
    """
    if pipe.components.get("vae") is None:
        raise ValueError(
            f"{folder} has no vae, which is needed to encode and decode images. Save the pipeline with its VAE, or use "
            "--prompts instead of --data"
        )
    kind, indices = type(pipe.vae).__name__, torch.arange(torch.Size(shape).numel())
    test = torch.randn(len(indices), generator=torch.Generator().manual_seed(0))
    rows = [torch.zeros(len(indices)), torch.ones(len(indices)), test, *(indices // unit % 1024.0 for unit in _DIGITS)]
    made = _shown(pipe, torch.stack(rows).reshape(-1, *shape).to(device), call)
    shift, one, tested, *digits = made.float().cpu().flatten(1)
    scale = one - shift
    found = [((row - shift) / scale).nan_to_num(-1, -1, -1).round().long() for row in digits]
    places = sum(digit * unit for digit, unit in zip(found, _DIGITS, strict=True))
    if not torch.equal(places.sort().values, indices) or difference(shift + scale * test[places], tested) > TOLERANCE:
        raise ValueError(
            f"{type(pipe).__name__} decodes latents of shape {list(made.shape[1:])}, which are not the "
            f"reordered and rescaled values of a sample of shape {list(shape)}. {_REMEDY}"
        )
    with torch.no_grad(), quiet():
        decoded = pipe.vae.decode(torch.empty(1, *made.shape[1:], device="meta"), return_dict=False)[0].shape[1:]
    is_sound = len(decoded) == 2 and "sampling_rate" in pipe.vae.config
    if not is_sound and not (len(decoded) in (3, 4) and decoded[0] == 3):
        raise ValueError(
            f"the {kind} in {folder} decodes to {list(decoded)}, which is not an RGB image, video or sound. {_REMEDY}"
        )
    vae = open_part(folder / "vae", f"diffusers.{kind}").eval().to(device)
    return Autoencoder(vae, tuple(decoded), shape, places.argsort().to(device), shift.to(device), scale.to(device))


class _Shown(BaseException):
    """Raised when a pipeline calls its VAE."""


def _shown(pipe: Any, samples: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Return the latents that a pipeline passes to its VAE if its last scheduler step returns `samples`.

    Raises:
        ValueError: if the call fails, or if it does not decode all samples in one batch.
    """
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    module, scheduler, shown = getattr(pipe, component_of(pipe)), pipe.scheduler, list[Tensor]()
    (argument,) = prompted(pipe, ())
    prompts = [0 if argument == "class_labels" else ""] * len(samples)

    def denoise(*args: Any, **kwargs: Any) -> Any:
        made = _zeros(*args, **kwargs)
        has_variance = module.config.get("out_channels") == 2 * module.config.get("in_channels", 0)
        return type(made)(sample=torch.cat([made.sample] * 2, 1)) if has_variance else made

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown.append(latents)
        raise _Shown

    def step(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        return SchedulerOutput(samples) if return_dict else (samples,)

    pipe.scheduler = first_order(scheduler)
    pipe.scheduler.step, module.forward, pipe.vae.decode = step, denoise, decode
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), quiet():
            pipe(num_inference_steps=STEPS, **{argument: prompts}, **call)
    except _Shown:
        pass
    except Exception as error:  # pipelines raise many exception types for wrong arguments or parts
        raise ValueError(f"calling {type(pipe).__name__} failed ({in_one_line(error)})") from None
    finally:
        del pipe.scheduler.step, module.forward, pipe.vae.decode
        pipe.scheduler = scheduler
    if len(shown) != 1 or len(shown[0]) != len(samples):
        raise ValueError(f"{type(pipe).__name__} does not decode all its samples in one batch. {_REMEDY}")
    return shown[0]


def _zeros(sample: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return zeros of the sample's shape instead of running the denoiser."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    sample = next(value for name, value in {"": sample, **kwargs}.items() if value is not None)
    return Transformer2DModelOutput(sample=sample if isinstance(sample, list) else torch.zeros_like(sample))
