"""The features of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), through transformers.

The class token after the last normalisation of the image at 224 x 224, as in Stein et al. 2023 (arXiv:2306.04675), who
found distances in it nearer to people's judgement than Inception's.
"""

from collections.abc import Mapping
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from torch import Tensor

from halfstep.metrics.features import FeatureExtractor, RealData, digest_of, extractors, in_batches
from halfstep.metrics.images import unit_range
from halfstep.runtime.files import first_line

DEFAULT: Final = "facebook/dinov2-large"
"""The size that Stein et al. used."""
SIDE: Final = 224
MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)
"""ImageNet's, on which it was trained."""


@final
class DINOv2(FeatureExtractor):
    """The class token of a DINOv2 model.

    Args:
        source: a folder that transformers has saved, or a name on the Hub; safetensors only.

    Raises:
        ValueError: if transformers is missing, or the model is not there or another one.
    """

    def __init__(self, source: str, device: torch.device | str) -> None:
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise ValueError("the features `dinov2` need transformers: pip install 'halfstep[dinov2]'") from None
        try:
            network, said = Dinov2Model.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            if odd := sorted({*said["missing_keys"], *said["unexpected_keys"], *map(str, said["mismatched_keys"])}):
                # transformers draws at random what it does not find.
                raise ValueError(f"its weights are of another network, {len(odd)} differ, such as {odd[0]}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"dinov2={source}: no DINOv2 model could be read there ({first_line(error)}); give "
                "dinov2=FOLDER, or a name on the Hub that can be reached"
            ) from None
        self.source = source
        self.network = network.eval().to(device)
        self.device = device
        self._sha256 = digest_of(network)

    @property
    def name(self) -> str:
        return f"dinov2-{self._sha256[:12]}"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weights": self.source, "weights_sha256": self._sha256}

    @property
    def resize(self) -> str:
        return f"{SIDE} x {SIDE}, bicubic with antialiasing; grey as RGB"

    def features(self, samples: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD))

        def token(part: Tensor) -> Tensor:
            shown = (unit_range(part, SIDE, "bicubic") - mean) / std
            out: Tensor = self.network(pixel_values=shown).last_hidden_state[:, 0]
            return out

        return in_batches(token, samples, self.device, 32)

    def logits(self, features: Tensor) -> Tensor | None:
        return None


@extractors.register("dinov2")
def dinov2(path: str | None, measured: RealData) -> FeatureExtractor:
    """The class token of DINOv2, through transformers; dinov2=FOLDER or a name on the Hub."""
    return DINOv2(path or DEFAULT, measured.device)
