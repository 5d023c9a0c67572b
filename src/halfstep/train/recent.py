"""The losses of recent updates, for the error report on a non-finite update."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

KEPT: Final = 1000
"""The number of updates for which losses are kept. The engine checks the losses at least this often."""


@final
class Part(NamedTuple):
    """The losses at some positions in an update's batch. The tensors stay on the device."""

    update: int
    places: range
    loss: Tensor
    log_snr: Tensor
    largest_x0: Tensor


@final
class Recent:
    """The losses and gradient norms of a player's latest updates, kept on the device. The player appends to both."""

    def __init__(self) -> None:
        self.parts: deque[Part] = deque()
        self.norms: deque[tuple[int, Tensor]] = deque(maxlen=KEPT)

    def forget(self) -> None:
        """Drop all losses and norms before the next update, except the last norm."""
        self.parts.clear()
        while len(self.norms) > 1:
            self.norms.popleft()

    def statistics(self, update: int) -> dict[str, Any]:
        """Return JSON-ready statistics of a non-finite update. This waits for the device."""
        norms = {held: float(norm) for held, norm in self.norms if held in (update, update - 1)}
        parts = [part for part in self.parts if part.update == update]
        statistics: dict[str, Any] = {"update": update}
        if parts:
            place = [place for part in parts for place in part.places]
            loss = torch.cat([part.loss.cpu().double() for part in parts])
            log_snr = torch.cat([part.log_snr.cpu().double() for part in parts])
            finite = loss.isfinite()
            some = bool(finite.any())
            statistics |= {
                "samples": len(loss),
                "loss_min": _json(loss[finite].min()) if some else None,
                "loss_max": _json(loss[finite].max()) if some else None,
                "log_snr_of_loss_max": _json(log_snr[finite][loss[finite].argmax()]) if some else None,
                "not_finite": [
                    {"place": place[i], "loss": str(float(loss[i])), "log_snr": _json(log_snr[i])}
                    for i in (~finite).nonzero().flatten().tolist()
                ],
                "largest_x0": _json(torch.stack([part.largest_x0 for part in parts]).max()),
            }
        return statistics | {"grad_norm": _json(norms.get(update)), "grad_norm_before": _json(norms.get(update - 1))}


def _json(value: Tensor | float | None) -> float | str | None:
    """Return a number for JSON, or a string if the number is not finite."""
    number = None if value is None else float(value)
    return number if number is None or math.isfinite(number) else str(number)


def _number(value: float | str | None) -> str:
    return "unknown" if value is None else f"{float(value):.3g}"


def in_words(statistics: Mapping[str, Any]) -> str:
    """Return the statistics of a batch as one sentence."""
    parts = []
    if "samples" in statistics:
        bad = statistics["not_finite"]
        if bad:
            levels = sorted(entry["log_snr"] for entry in bad if isinstance(entry["log_snr"], float))
            where = f" at log-SNR {levels[0]:.3g}" if levels else ""
            where += f" to {levels[-1]:.3g}" if len(levels) > 1 else ""
            parts.append(f"{len(bad)} of {statistics['samples']} losses were not finite{where}")
        if statistics["loss_max"] is not None:
            parts.append(
                f"{'the others' if bad else 'losses'} range from {_number(statistics['loss_min'])} to "
                f"{_number(statistics['loss_max'])}, with the largest at log-SNR "
                f"{_number(statistics['log_snr_of_loss_max'])}"
            )
    if "largest_x0" in statistics:
        parts.append(f"largest |x0| {_number(statistics['largest_x0'])}")
    parts.append(f"gradient norm {_number(statistics['grad_norm'])}, {_number(statistics['grad_norm_before'])} before")
    return "; ".join(parts)
