"""The features of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), through transformers.

They are the class token after the last normalisation, of the image at 224 x 224, as in Stein et al. 2023
(arXiv:2306.04675). That paper found that distances in them agree better with human judgement than in Inception
features.
"""

from typing import ClassVar, Final, final

from safetensors import SafetensorError
from torch import Tensor

from halfstep.metrics.features import NetworkFeatures, RealData, extractors
from halfstep.metrics.images import normalised
from halfstep.runtime.files import first_line

DEFAULT: Final = "facebook/dinov2-large"
"""Model size as in Stein et al."""


@final
@extractors.register("dinov2")
class DINOv2(NetworkFeatures):
    """The class token of DINOv2, with transformers; dinov2=FOLDER or a name on the Hub.

    Args:
        path: a folder saved with transformers, or a name on the Hub; only safetensors are read.

    Raises:
        ValueError: if transformers is not installed, or the model is missing or not a DINOv2 model.
    """

    batch_size: ClassVar[int] = 32

    def __init__(self, path: str | None, measured: RealData) -> None:
        source = path or DEFAULT
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise ValueError("the features `dinov2` need transformers: pip install 'halfstep[dinov2]'") from None
        try:
            network, said = Dinov2Model.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            if odd := sorted({*said["missing_keys"], *said["unexpected_keys"], *map(str, said["mismatched_keys"])}):
                # transformers initialises missing weights at random.
                raise ValueError(f"its weights are of another network: {len(odd)} differ, such as {odd[0]}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"dinov2={source}: no DINOv2 model could be read there ({first_line(error)}). Give "
                "dinov2=FOLDER, or a reachable name on the Hub"
            ) from None
        super().__init__("dinov2", network, measured.device)
        self.facts = {"weights": source, **self.facts}
        self.resize = "224 x 224, bicubic with antialiasing; grey as RGB"

    def batch_features(self, samples: Tensor) -> Tensor:
        token: Tensor = self.network(pixel_values=normalised(samples, 224, "bicubic")).last_hidden_state[:, 0]
        return token
