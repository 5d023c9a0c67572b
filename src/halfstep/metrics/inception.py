"""The features of the FID: the Inception network of 2015 as in TensorFlow, with torch-fidelity's port.

torch-fidelity imports torchvision, which the network does not need and which works with only one torch build. The
module of the network is therefore loaded without its package.

Its constructor reads weights with an unpickler that runs code. This module passes it weights that were read from
safetensors, or from the published file alone, identified by its hash, with torch's restricted unpickler.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from halfstep.metrics.features import FeatureExtractor, NetworkFeatures, RealData, extractors
from halfstep.metrics.images import as_rgb, to_uint8
from halfstep.runtime.files import DamagedFile, first_line, last_line, sha256_of, user_path

PACKAGE: Final = "torch_fidelity"


def network_module() -> ModuleType:
    """Import torch-fidelity's module without its package's imports; raise ValueError if it is not installed."""
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE}
    for name in known:
        del sys.modules[name]
    try:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ValueError(
                "the features `inception` need torch-fidelity: pip install 'halfstep[inception]', with the torchvision "
                "for your torch version"
            )
        bare = ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = bare
        return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(known)


def _weights(module: ModuleType, path: str | None) -> dict[str, Tensor]:
    """Return the network's weights; raise ValueError if they cannot be read or fetched."""
    if path is None:
        url = module.URL_INCEPTION_V3
        try:
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
            return state
        except (OSError, RuntimeError) as error:  # torch.hub raises RuntimeError for a file with another hash
            raise ValueError(
                f"the weights of `inception` could not be downloaded from {url} ({error}). Download the file elsewhere "
                "and give inception=PATH"
            ) from None
    file = user_path(path)
    if not file.is_file():
        raise ValueError(f"inception={path}: no such file. Give the file of torch-fidelity's weights")
    is_plain = file.suffix == ".safetensors"
    # The address contains the beginning of the file's hash, which torch.hub checks.
    published = Path(module.URL_INCEPTION_V3).stem.rpartition("-")[2]
    if not is_plain and not (found := sha256_of(file)).startswith(published):
        raise ValueError(
            f"inception={path} is not torch-fidelity's own file (its sha256 starts with {found[:8]}, not {published}). "
            "Give that file, or a .safetensors file with the same tensors"
        )
    try:
        held = load_file(file) if is_plain else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious archive can raise any error of zipfile or the unpickler
        raise DamagedFile(f"{file} cannot be read as weights ({first_line(error)})") from None
    if not isinstance(held, dict):
        raise DamagedFile(f"{file} contains a {type(held).__name__} instead of weights by name")
    return held


@final
class Inception(NetworkFeatures):
    """The 2048 features before the last layer: a Frechet distance in them is the FID.

    Args:
        path: torch-fidelity's own .pth file, or a .safetensors file with the same tensors; downloaded if None.

    Raises:
        ValueError: if torch-fidelity or the weights are missing, or (DamagedFile) the weights do not match.
    """

    batch_size: ClassVar[int] = 50

    def __init__(self, path: str | None, device: torch.device | str) -> None:
        module: Any = network_module()
        state = _weights(module, path)
        module.load_state_dict_from_url = lambda *_, **__: state
        try:
            network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except RuntimeError as error:
            raise DamagedFile(
                f"{path or module.URL_INCEPTION_V3} does not contain the weights of torch-fidelity's Inception "
                f"({last_line(error)})"
            ) from None
        super().__init__("inception", network, device)
        self.resize = "299 x 299, TensorFlow 1's bilinear without antialiasing, as in the FID's first code; grey as RGB"

    def batch_features(self, samples: Tensor) -> Tensor:
        features: Tensor = self.network(as_rgb(to_uint8(samples)))[0]
        return features

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        # By convention, the Inception score omits the bias.
        logits: Tensor = (features.to(self.device) @ self.network.fc.weight.T).cpu()
        return logits


@extractors.register("inception")
def inception(path: str | None, measured: RealData) -> FeatureExtractor:
    """The network of the FID, with torch-fidelity; downloads its weights, or inception=PATH."""
    return Inception(path, measured.device)
