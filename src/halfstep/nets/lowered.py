"""Networks in lower precision: teachers in bfloat16, and quantised frozen weights for LoRA.

Quantisation replaces linear layers with those of bitsandbytes or torchao, as diffusers does with `BitsAndBytesConfig`
and `TorchAoConfig`. All other weights are stored in bfloat16, except those that the network's class keeps in float32.
The network computes in bfloat16. Weights are always quantised on the CPU, so that they are the same on every device.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE
from halfstep.nets.base import Network

BasePrecision = Literal["float32", "bf16", "int8", "nf4", "int8wo"]
"""The precision of frozen weights: float32, bfloat16, 8 or 4 bits with bitsandbytes, or 8-bit weights with torchao."""
PACKAGES: Final = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int8wo": "torchao"}
"""The package that implements each quantised precision."""
CONFIGS: Final = {
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)',
    "int8wo": "TorchAoConfig(Int8WeightOnlyConfig())",
}
"""The diffusers config that corresponds to each quantised precision."""
BLOCK: Final = 64
"""The number of 4-bit weights that share a scale."""


@final
class InHalf(nn.Module):
    """A bfloat16 copy of a frozen teacher, which halves its weight memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._dtypes = {name: value.dtype for name, value in _tensors(network)}
        # Unlike `to(torch.bfloat16)`, this leaves complex tensors unchanged.
        self.network = copy.deepcopy(network).bfloat16()
        self.restores_norm = bool(getattr(network, "restores_norm", False))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        if isinstance(self.network, Network):
            return called_in_half(self.network, x_t, time, cond)
        # A custom network might not cast its float32 time embedding to bfloat16.
        with torch.autocast(x_t.device.type, torch.bfloat16):
            return called_in_half(self.network, x_t, time, cond)

    def restore_dtypes(self, copied: nn.Module) -> None:
        """Convert a copy of the inner network to the dtypes before the conversion to bfloat16, in place."""
        for name, value in _tensors(copied):
            value.data = value.data.to(self._dtypes[name])


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(network.named_parameters(), network.named_buffers())


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside an `InHalf`, or any other network unchanged."""
    inner: nn.Module = network.network if isinstance(network, InHalf) else network
    return inner


def called_in_half(network: Callable[..., Tensor], x_t: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Call a network in bfloat16, with times and guidance scales in float32, and return its output in x_t's dtype."""
    shown = {
        name: value.to(torch.bfloat16) if value.is_floating_point() and name != GUIDANCE else value
        for name, value in cond.items()
    }
    return network(x_t.to(torch.bfloat16), time, **shown).to(x_t.dtype)


def quantised(module: nn.Module) -> bool:
    """Return whether a module is a quantised linear layer."""
    return isinstance(module, nn.Linear) and type(module.weight).__module__.partition(".")[0] in PACKAGES.values()


def same_layer(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two quantised layers have equal weights."""
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))


def shared_layers(network: nn.Module) -> dict[int, Any]:
    """Return the quantised layers by id, as a memo for deep copies. Copies share these layers, which are frozen."""
    return {id(module): module for module in network.modules() if quantised(module)}


def lower(model: Any, precision: str) -> None:
    """Convert the weights of a stock module, except LoRA weights, to a precision in place.

    Tensors are replaced rather than modified, so other modules that share a tensor keep the old values. On the meta
    device, linear layers become bfloat16 instead of being quantised.

    Raises:
        ValueError: if the package for this precision is missing.
    """
    if precision == "float32":
        return
    for name, module in list(model.named_modules()):
        if _is_kept(model, name) or quantised(module):
            continue
        if precision in PACKAGES and isinstance(module, nn.Linear) and not module.weight.is_meta:
            model.set_submodule(name, _quantised(module, precision))
            continue
        for leaf, value in module.named_parameters(recurse=False):
            setattr(module, leaf, nn.Parameter(value.detach().to(torch.bfloat16), requires_grad=False))
        for leaf, value in module.named_buffers(recurse=False):
            setattr(module, leaf, value.to(torch.bfloat16) if value.is_floating_point() else value)


def _is_kept(model: Any, name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("lora_") or part in (model._keep_in_fp32_modules or ()) for part in parts)


def _quantised(layer: nn.Linear, precision: str) -> nn.Linear:
    weight, bias = layer.weight.detach().float(), layer.bias
    bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
    made: Any
    try:
        if precision == "int8wo":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            made.weight = nn.Parameter(weight, requires_grad=False)
            quantize_(made, Int8WeightOnlyConfig())
        else:
            from bitsandbytes import nn as bnb

            size = (layer.in_features, layer.out_features)
            if precision == "nf4":
                kind = {"quant_type": "nf4", "compress_statistics": False}
                made = bnb.Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind)
                # Otherwise, bitsandbytes repacks the codes of wide layers in place when called without gradients.
                made.support_avx512bf16_for_cpu = False
                made.weight = bnb.Params4bit(weight, requires_grad=False, module=made, **kind).to("cpu")
            else:
                made = bnb.Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
                made.weight = bnb.Int8Params(weight, requires_grad=False).to("cpu")
                made.init_8bit_state()
    except ImportError:
        package = PACKAGES[precision]
        raise ValueError(f"weights in {precision} need the package {package}: pip install {package}") from None
    made.bias = bias
    return made.requires_grad_(False)


def _parts(layer: Any) -> tuple[Tensor, Tensor]:
    """Return a quantised layer's codes and scales. The layer stores no other data."""
    weight = layer.weight
    if hasattr(layer, "state"):
        return weight.data, layer.state.SCB
    if hasattr(weight, "quant_state"):
        return weight.data, weight.quant_state.absmax
    return weight.qdata, weight.scale


def packed_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict, in which quantised layers have codes (`weight`) and scales (`scale`)."""
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        held = {**module._parameters, **module._buffers}
        if quantised(module):
            held["weight"], held["scale"] = _parts(module)
        found |= {
            f"{path}.{leaf}" if path else leaf: value.detach()
            for leaf, value in held.items()
            if value is not None and leaf not in module._non_persistent_buffers_set
        }
    return found


def load_packed(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors that `packed_state` returned, except LoRA weights.

    Raises:
        RuntimeError: if names or shapes do not match.
    """
    own = {name: value for name, value in packed_state(network).items() if ".lora_" not in name}
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise RuntimeError(f"{name} is missing, is unexpected or has a different shape")
        own[name].copy_(state[name])


def settle(model: nn.Module) -> None:
    """Update the state of 8-bit layers after a move to another device, because it does not move with the weights."""
    layers: list[Any] = [module for module in model.modules() if quantised(module) and hasattr(module, "state")]
    for layer in layers:
        layer.weight.CB = layer.weight.SCB = None
        layer.state.CB, layer.state.SCB = layer.weight.data, layer.state.SCB.to(layer.weight.device)


def restore(model: Any) -> None:
    """Dequantise the weights of a stock module to float32 in place."""
    for name, module in list(model.named_modules()):
        if quantised(module):
            made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            made.weight = nn.Parameter(_restored(module), requires_grad=False)
            made.bias = module.bias
            model.set_submodule(name, made)
    nn.Module.float(model)


def _restored(layer: Any) -> Tensor:
    """Return a quantised layer's weights in float32."""
    codes, scale = _parts(layer)
    if not hasattr(layer.weight, "quant_state"):
        return codes.float() * (scale.reshape(-1, 1) / (127 if hasattr(layer, "state") else 1))
    from bitsandbytes import functional

    value: Tensor = functional.dequantize_4bit(codes, layer.weight.quant_state).float()
    return value


def weight_bytes(model: Any, precision: str) -> int:
    """Return the size in bytes of a stock module's weights at a precision, computed from their shapes."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    total = 0
    for name, value in model.named_parameters():
        if precision == "float32" or _is_kept(model, name):
            total += 4 * value.numel()
        elif precision in PACKAGES and name in linear:
            rows, numbers = value.shape[0], value.numel()
            scales, codes = (-(-numbers // BLOCK), -(-numbers // 2)) if precision == "nf4" else (rows, numbers)
            total += 4 * scales + codes
        else:
            total += 2 * value.numel()
    return total
