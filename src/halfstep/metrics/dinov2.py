"""The features of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), computed with transformers.

As in Stein et al. 2023 (arXiv:2306.04675), the image is resized to 224 x 224 pixels, and the features are the class
token after the last normalisation. According to that paper, distances between DINOv2 features agree better with human
judgement than distances between Inception features.
"""

from typing import ClassVar, Final, final

from safetensors import SafetensorError
from torch import Tensor

from halfstep.metrics.features import NetworkFeatures, RealData, extractors
from halfstep.metrics.images import normalised
from halfstep.runtime.files import first_line, user_path

DEFAULT: Final = "facebook/dinov2-large"
"""The model size that Stein et al. used."""


@final
@extractors.register("dinov2")
class DINOv2(NetworkFeatures):
    """The class token of DINOv2, from transformers; NAME in dinov2=NAME is a folder or a model on the Hub.

    Args:
        path: a folder saved with transformers, or a model name on the Hub. Only safetensors files are read.

    Raises:
        ValueError: if transformers is not installed, or the model is missing or not a DINOv2 model.
    """

    batch_size: ClassVar[int] = 32

    def __init__(self, path: str | None, measured: RealData) -> None:
        source = path or DEFAULT
        if source.startswith("~"):
            source = str(user_path(source))
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise ValueError("the `dinov2` features need transformers: pip install 'halfstep[dinov2]'") from None
        try:
            network, said = Dinov2Model.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            if odd := sorted({*said["missing_keys"], *said["unexpected_keys"], *map(str, said["mismatched_keys"])}):
                # transformers initialises missing weights randomly.
                raise ValueError(
                    f"its weights are for a different network (mismatched tensors: {len(odd)}, such as {odd[0]})"
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"dinov2={source}: cannot load a DINOv2 model ({first_line(error)}). Set dinov2 to a folder, or to a "
                "model on the Hub that this machine can reach"
            ) from None
        super().__init__("dinov2", network, measured.device)
        self.facts = {"weights": source, **self.facts}
        self.resize = "224 x 224, bicubic with antialiasing; grey as RGB"

    def batch_features(self, samples: Tensor) -> Tensor:
        token: Tensor = self.network(pixel_values=normalised(samples, 224, "bicubic")).last_hidden_state[:, 0]
        return token
