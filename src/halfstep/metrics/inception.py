"""The features of the FID: the Inception network of 2015 as TensorFlow ran it, through torch-fidelity's port of it.

torch-fidelity's package imports torchvision for parts that are not needed here, and torchvision is a build for one
torch only. So its one module is loaded without the package round it; torchvision need not be there.

Its constructor reads weights with an unpickler that runs code. They are read here instead, from safetensors or by
torch's restricted unpickler, and handed to it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from halfstep.metrics.features import FeatureExtractor, RealData, digest_of, extractors, in_batches
from halfstep.metrics.images import as_rgb, to_uint8
from halfstep.runtime.files import DamagedFile, first_line, last_line

PACKAGE: Final = "torch_fidelity"
MODULE: Final = f"{PACKAGE}.feature_extractor_inceptionv3"


def network_module() -> ModuleType:
    """torch-fidelity's module of the network, without the imports of its package.

    Raises:
        ValueError: if torch-fidelity is not installed; the message says how.
    """
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE}
    for name in known:
        del sys.modules[name]
    try:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ValueError(
                "the features `inception` need torch-fidelity: pip install 'halfstep[inception]', with the torchvision "
                "that fits your torch"
            )
        bare = ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = bare
        return importlib.import_module(MODULE)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(known)


def _weights(module: ModuleType, path: str | None) -> dict[str, Tensor]:
    """The network's weights.

    Raises:
        ValueError: if they cannot be read or fetched.
    """
    if path is None:
        url = module.URL_INCEPTION_V3
        try:
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
            return state
        except (OSError, RuntimeError) as error:  # torch.hub has a RuntimeError for a file of another hash
            raise ValueError(
                f"the weights of `inception` could not be fetched from {url} ({error}): fetch the file elsewhere and "
                "give inception=PATH"
            ) from None
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"inception={path}: no such file; give the file of torch-fidelity's weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile archive raises whatever zipfile or the unpickler stumble over
        raise DamagedFile(f"{file} cannot be read as weights ({first_line(error)})") from None
    if not isinstance(held, dict):
        raise DamagedFile(f"{file} holds no weights by name, but a {type(held).__name__}")
    return held


@final
class Inception(FeatureExtractor):
    """The 2048 features before the last layer: a Frechet distance in them is the FID.

    Args:
        path: torch-fidelity's .pth or a .safetensors of the same tensors; fetched from its own address if None.

    Raises:
        ValueError: if torch-fidelity or the weights are missing, or (DamagedFile) do not fit.
    """

    def __init__(self, path: str | None, device: torch.device | str) -> None:
        module: Any = network_module()
        state = _weights(module, path)
        module.load_state_dict_from_url = lambda *_, **__: state
        try:
            network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except RuntimeError as error:
            raise DamagedFile(
                f"{path or module.URL_INCEPTION_V3} does not hold the weights of torch-fidelity's Inception "
                f"({last_line(error)})"
            ) from None
        self.network = network.to(device)
        self.device = device
        self._sha256 = digest_of(network)

    @property
    def name(self) -> str:
        return f"inception-{self._sha256[:12]}"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weights_sha256": self._sha256}

    @property
    def resize(self) -> str:
        return "299 x 299, TensorFlow 1's bilinear without antialiasing, as in the FID's first code; grey as RGB"

    def features(self, samples: Tensor) -> Tensor:
        return in_batches(lambda part: self.network(as_rgb(to_uint8(part)))[0], samples, self.device, 50)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        # The Inception score's own convention: without the bias.
        logits: Tensor = (features.to(self.device) @ self.network.fc.weight.T).cpu()
        return logits


@extractors.register("inception")
def inception(path: str | None, measured: RealData) -> FeatureExtractor:
    """The FID's network, through torch-fidelity; its weights are fetched, or inception=PATH."""
    return Inception(path, measured.device)
