"""The FID's features, computed with TensorFlow's 2015 Inception network as ported by torch-fidelity.

torch-fidelity imports torchvision, which the network does not need and which only works with a matching torch build.
The network's module is therefore imported without its package.

The network's constructor would download the published weights and unpickle them. Instead, this module loads the weights
from a safetensors file, which users create once from the published file.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from halfstep.metrics.features import NetworkFeatures, RealData, conversion, extractors, read_weights
from halfstep.metrics.images import as_rgb, to_uint8
from halfstep.runtime.files import DamagedFile, last_line

PACKAGE: Final = "torch_fidelity"


def network_module() -> ModuleType:
    """Import the network's module without its package; raise ValueError if torch-fidelity is not installed."""
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE}
    for name in known:
        del sys.modules[name]
    try:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ValueError(
                "the `inception` features need torch-fidelity: run pip install 'halfstep[inception]', and install the "
                "version of torchvision that matches your torch"
            )
        bare = ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = bare
        return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(known)


@final
@extractors.register("inception")
class Inception(NetworkFeatures):
    """2048 features of the FID's Inception network, from torch-fidelity; PATH in inception=PATH is a safetensors file.

    Args:
        path: a safetensors file with the tensors of torch-fidelity's published file.

    Raises:
        ValueError: if torch-fidelity or the weights are missing. The message contains the command that converts the
            published file.
        DamagedFile: if the weights are damaged or do not match the network.
    """

    batch_size: ClassVar[int] = 50

    def __init__(self, path: str | None, measured: RealData) -> None:
        module: Any = network_module()
        url = module.URL_INCEPTION_V3
        needed = f"a safetensors file: download {url} and convert it once with {conversion(Path(Path(url).name))}"
        state = read_weights("inception", path, needed)
        module.load_state_dict_from_url = lambda *_, **__: state
        try:
            network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except RuntimeError as error:
            raise DamagedFile(
                f"{path} does not contain the weights of torch-fidelity's Inception ({last_line(error)})"
            ) from None
        super().__init__("inception", network, measured.device)
        self.resize = (
            "299 x 299, TensorFlow 1's bilinear without antialiasing, as in the original FID code; grey as RGB"
        )

    def batch_features(self, samples: Tensor) -> Tensor:
        features: Tensor = self.network(as_rgb(to_uint8(samples)))[0]
        return features

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        # By convention, the Inception score omits the bias.
        logits: Tensor = (features.to(self.device) @ self.network.fc.weight.T).cpu()
        return logits
