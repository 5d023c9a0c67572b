"""A trained denoiser that can be saved, loaded and sampled."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE, Clipped, Cond, Denoiser, Guided, NetworkDenoiser, warn_of_gain
from halfstep.core.door import check_instance, check_real, check_shape, check_whole, got
from halfstep.core.draw import as_seeds, sample_labels, sample_noise, step_noise
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import NoiseProcess, processes
from halfstep.core.prediction import Denoised, Prediction, predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.nets import describe_network, merged
from halfstep.objectives import Guidance, Role, guidances
from halfstep.objectives import Outcome as Made
from halfstep.runs import Manifest, Outcome
from halfstep.runs.schema import shortened
from halfstep.runtime.failures import is_out_of_memory
from halfstep.samplers import Sampler, sample, samplers


def samples_at_once(device: torch.device) -> int:
    """Return the default sampling batch size."""
    return 1024 if device.type == "cuda" else 256


def drawn_in_batches(
    count: int, size: int, draw: Callable[[range], Tensor], may_halve: bool = True
) -> tuple[list[Tensor], int]:
    """Return the results of `draw` for consecutive ranges below `count`, and the length of the ranges at the end.

    Args:
        size: the length of a range. If a range does not fit in memory, its length is halved, unless `may_halve` is
            false or the length is 1.
    """
    parts: list[Tensor] = []
    first = 0
    while first < count:
        places = range(first, min(first + size, count))
        try:
            parts.append(draw(places))
        except Exception as error:
            if not may_halve or size == 1 or not is_out_of_memory(error):
                raise
            size = -(-len(places) // 2)
            continue
        first += len(places)
    return parts, size


@final
class Model(Denoiser):
    """A trained denoiser together with its manifest.

    Calling the model clips x0 if the samples are images. A call also applies guidance if the conditions contain a
    guidance scale that the network does not take as an input. For targets and losses, use the attribute `denoiser`,
    which neither clips x0 nor applies guidance.

    Args:
        null: one sample's values that mean "no condition", which a teacher needs for guidance.
    """

    _takes_number: ClassVar[bool] = True

    def __init__(self, denoiser: NetworkDenoiser, manifest: Manifest, null: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process: NoiseProcess = denoiser.process
        self.manifest = manifest
        self.num_steps = manifest.num_steps
        self.shape: tuple[int, ...] = manifest.shape
        self.sampler: Sampler = samplers.rebuild(manifest.outcome.sampler)
        self.null = dict(null or {})
        self._plain: Denoiser = Clipped(denoiser) if manifest.clip else denoiser
        guided = Guided(denoiser, self.null) if self.null and not self.takes_scale else denoiser
        self._guided: Denoiser = Clipped(guided) if manifest.clip else guided
        self._fitting: int | None = None
        """The batch size that an earlier call has found to fit in memory, if it had to try several."""

    def extra_repr(self) -> str:
        steps = "" if self.num_steps is None else f" of {self.num_steps} step{'s' * (self.num_steps != 1)}"
        shown = [f"{self.num_classes} classes"] * bool(self.num_classes) + sorted(self.manifest.conditions)
        given = f", conditioned on {', '.join(shown)}" if shown else ""
        return f"{self.role}{steps}, samples of shape {list(self.shape)}{given}, {self.denoiser.extra_repr()}"

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        return (self._guided if GUIDANCE in (cond or {}) else self._plain)(x_t, t, cond)

    def num_evals(self, sampler: Sampler, num_steps: int, guidance_scale: float | None = None) -> int:
        """Return the number of network calls per sample, which guidance doubles unless the network takes the scale."""
        is_doubled = self.null and not self.takes_scale and self._scale(guidance_scale) is not None
        return sampler.num_evals(num_steps) * (2 if is_doubled else 1)

    def _scale(self, guidance_scale: float | None) -> float | None:
        """Return the scale for the network or `Guided`, or None, and warn if the scale is outside the learned range."""
        scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        if guidance_scale is not None:
            check_real(guidance_scale=guidance_scale)
        if self.guidance is not None:
            return self.guidance.scale_for(scale)
        if self.takes_scale:
            return scale
        if scale is not None and not self.null:
            raise ValueError(
                f"the guidance scale {scale:g} has no effect, because this model has no guidance. Remove it"
            )
        # Scale 1 disables guidance, so one call is enough.
        return None if scale == 1 else scale

    @classmethod
    def of(
        cls,
        denoiser: NetworkDenoiser,
        shape: Sequence[int],
        *,
        num_classes: int = 0,
        conditions: Mapping[str, tuple[int, ...]] | None = None,
        null: Mapping[str, Tensor] | None = None,
        clip: bool = False,
        made: Made | None = None,
        **facts: Any,
    ) -> "Model":
        """Return a model that wraps a denoiser built in Python, so that it can be saved and sampled with seeds.

        Args:
            shape: the shape of one sample.
            num_classes: the number of classes, if the denoiser takes `class_labels`.
            conditions: the per-sample shapes of other conditions, keyed by name.
            null: one sample's values that mean "no condition", which guidance needs.
            clip: whether the samples are images, in which case sampling clips x0 to [-1, 1].
            made: the denoiser's role, number of steps and sampler; None uses those of a teacher.
            facts: additional fields of the manifest.
        """
        check_instance(
            "the denoiser", denoiser, NetworkDenoiser, "halfstep.NetworkDenoiser(network, process, prediction)"
        )
        check_whole("num_classes", num_classes, 0)
        if foreign := sorted(set(facts) - set(Manifest.model_fields)):
            raise ValueError(f"{foreign[0]} is not a field of a manifest. Remove it")
        if conditions is not None and not isinstance(conditions, Mapping):
            raise ValueError(
                f"conditions must be a mapping of names to shapes, got {got(conditions)}. Pass {{'angle': ()}}"
            )
        made = made or Made(Role.TEACHER)
        known: dict[str, Any] = {
            "stage": made.role.value,
            "objective": "given",
            "parent": None,
            "num_updates": 0,
            "seconds": 0.0,
            "is_image": clip,
        }
        manifest = Manifest(
            outcome=Outcome(role=made.role.value, num_steps=made.num_steps, sampler=samplers.describe(made.sampler)),
            shape=check_shape(shape),
            num_classes=num_classes,
            conditions=dict(conditions or {}),
            clip=clip,
            network=describe_network(denoiser.network),
            process=processes.describe(denoiser.process),
            prediction=predictions.describe(denoiser.prediction),
            files={},
            **known | facts,
        )
        return cls(denoiser, manifest, null)

    @property
    def takes_scale(self) -> bool:
        """Whether this is a teacher whose network takes the guidance scale as an optional input."""
        pipeline = self.manifest.pipeline
        return (
            self.role is Role.TEACHER and self.guidance is None and pipeline is not None and pipeline.scale is not None
        )

    @property
    def network(self) -> Any:
        """The denoiser's network."""
        return self.denoiser.network

    @property
    def prediction(self) -> Prediction:
        """The network's prediction type."""
        return self.denoiser.prediction

    @property
    def guidance(self) -> Guidance | None:
        """The guidance that the network learned, or None."""
        return None if self.manifest.guidance is None else guidances.rebuild(self.manifest.guidance)

    @property
    def role(self) -> Role:
        """The model's role in its chain."""
        return Role(self.manifest.outcome.role)

    @property
    def num_classes(self) -> int:
        """The number of classes, or 0 if the model is not class-conditional."""
        return self.manifest.num_classes

    @property
    def device(self) -> torch.device:
        """The device on which the weights are stored."""
        return next(self.denoiser.parameters()).device

    def merged(self) -> "Model":
        """Return the model with its LoRA weights merged into the base weights, or the model itself if it has none."""
        network = merged(self.network)
        if network is self.network:
            return self
        manifest = self.manifest.model_copy(update={"network": describe_network(network), "base": None})
        return Model(NetworkDenoiser(network, self.process, self.prediction).eval(), manifest, self.null)

    def noise(self, seeds: int | Sequence[int]) -> Tensor:
        """Draw x_t at t = 1, `[len(seeds), *shape]`, scaled for the process. Each row depends only on its own seed."""
        return (sample_noise(seeds, self.shape) * self.process.start_scale).to(self.device)

    def cond(
        self,
        seeds: int | Sequence[int],
        class_label: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        others: Cond | None = None,
    ) -> dict[str, Tensor]:
        """Return the samples' conditions, keyed by name. An unconditional model has none.

        Args:
            class_label: one class for all samples, or one class per sample; None cycles through the data's classes.
            guidance_scale: the guidance scale; None uses the model's own scale.
            others: the conditions in `manifest.conditions`, each `[len(seeds), ...]`.

        Raises:
            ValueError: if the class or the scale is invalid, or if a condition is missing or has the wrong shape.
        """
        seeds = as_seeds(seeds)
        cond = {name: value.to(self.device) for name, value in (others or {}).items()}
        for name, shape in self.manifest.conditions.items():
            if name not in cond:
                raise ValueError(f"this model needs the condition {name} of shape {[len(seeds), *shape]}. Pass it")
            if tuple(cond[name].shape) != (len(seeds), *shape):
                raise ValueError(
                    f"the condition {name} has shape {list(cond[name].shape)}, but the model needs shape "
                    f"{[len(seeds), *shape]}"
                )
        if foreign := sorted(set(cond) - set(self.manifest.conditions)):
            raise ValueError(f"this model does not take the condition {foreign[0]}. Remove it")
        if not self.num_classes:
            if class_label is not None:
                raise ValueError("class_label has no effect, because this model is not class-conditional. Remove it")
        elif class_label is None:
            cond["class_labels"] = sample_labels(seeds, self.manifest.classes_shown or self.num_classes).to(self.device)
        else:
            cond["class_labels"] = self._labels(class_label, len(seeds)).to(self.device)
        scale = self._scale(guidance_scale)
        if scale is not None:
            cond[GUIDANCE] = torch.full((len(seeds),), scale, device=self.device)
        return cond

    def _labels(self, class_label: int | Sequence[int] | Tensor, number: int) -> Tensor:
        """Return the class of each sample, int64 `[number]`."""
        try:
            labels = torch.as_tensor(class_label)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"class_label must be one class or one class per sample, got {class_label!r}") from None
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (number,)):
            raise ValueError(
                f"class_label must be one class, or one class for each of the {number} samples, got {labels.dtype} of "
                f"shape {list(labels.shape)}. Pass class_label=3, or a list with one class per seed"
            )
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if outside.numel():
            raise ValueError(
                f"class {int(outside.flatten()[0])} does not exist. Choose a class from 0 to {self.num_classes - 1}"
                + (f" ({shortened(names)})" if (names := self.manifest.class_names) else "")
            )
        return labels.long().expand(number)

    def check_steps(self, num_steps: int | None) -> int:
        """Return the number of sampler steps, by default the model's own, and warn about any other number.

        Raises:
            ValueError: if the number is invalid, or if it is missing for a model that works with any number.
        """
        own = self.num_steps
        if num_steps is None:
            if own is None:
                raise ValueError(
                    f"this {self.role} model works with any number of steps. Choose one with num_steps (--num-steps), "
                    "such as 32"
                )
            return own
        check_num_steps(num_steps)
        if own is not None and num_steps != own:
            advice = "More steps do not improve it. Use an earlier" if num_steps > own else "Use a later"
            warnings.warn(
                f"the model was distilled for num_steps={own}, not {num_steps}. {advice} stage of the chain",
                HalfstepWarning,
                stacklevel=3,
            )
        return num_steps

    def _computing(self, precision: str) -> torch.autocast:
        """Return an autocast context for this precision."""
        if precision not in ("float32", "bf16"):
            raise ValueError(f"precision must be float32 or bf16, got {precision!r}")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    @torch.no_grad()
    def warm_up(self, others: Cond | None = None, precision: str = "float32") -> None:
        """Call the network once, because the first call is slower and should not be timed.

        Args:
            others: the conditions in `manifest.conditions`, each `[1, ...]`.
            precision: as in `sample`; the first call in each precision is slow.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HalfstepWarning)
            with self._computing(precision):
                self(self.noise([0]), 1.0, self.cond([0], others=others))

    def sample(
        self,
        seeds: int | Sequence[int],
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        class_label: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        guidance_scale: float | None = None,
        cond: Cond | None = None,
        precision: str = "float32",
    ) -> Tensor:
        """Return samples x0 `[len(seeds), *shape]` on the CPU. Each sample depends only on its own seed.

        Args:
            seeds: one seed per sample; a single number draws one sample.
            num_steps: the number of sampler steps; None uses the model's own number.
            sampler: the sampler; None uses the model's own sampler.
            class_label: one class for all samples, or one class per sample; None cycles through the classes.
            batch_size: the number of samples drawn at once; None starts with a large batch and halves it until it fits
                in memory.
            guidance_scale: the guidance scale; None uses the model's own scale, and 1 disables guidance.
            cond: the conditions in `manifest.conditions`, each `[len(seeds), ...]`.
            precision: "float32", or "bf16" to run the network in bfloat16 with samples in float32.

        Raises:
            ValueError: if the number of steps, the class, the scale, a condition or the precision is invalid.
        """
        seeds = as_seeds(seeds)
        steps, method = self.check_steps(num_steps), self.sampler if sampler is None else sampler
        check_instance("the sampler", method, Sampler, "halfstep.DDIM() or halfstep.Heun()")
        if class_label is not None and self.num_classes:
            class_label = self._labels(class_label, len(seeds))
        warn_of_gain(self.process, self.denoiser.prediction, given=True)
        if any(part.training for part in self.modules()):
            # Only if needed, because switching every submodule takes a millisecond.
            self.eval()
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        if cond is not None and not isinstance(cond, Mapping):
            raise ValueError(f"cond must be a mapping of names to tensors, got {got(cond)}. Pass {{'text': tensor}}")
        size = batch_size or self._fitting or samples_at_once(self.device)

        def draw(places: range) -> Tensor:
            rows = slice(places.start, places.stop)
            part = seeds[rows]
            drawn = step_noise(part, self.shape) if method.stochastic else None
            others = {name: value[rows] for name, value in (cond or {}).items()}
            labels = class_label[rows] if isinstance(class_label, Tensor) else class_label
            shown = self.cond(part, labels, guidance_scale, others)
            with self._computing(precision):
                return sample(self, self.noise(part), steps, method, shown, noise=drawn).cpu()

        chunks, fitting = drawn_in_batches(len(seeds), size, draw, may_halve=batch_size is None)
        if fitting < size:
            self._fitting = fitting
        return torch.cat(chunks) if chunks else torch.empty(0, *self.shape)
