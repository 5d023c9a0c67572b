"""Measure the float32 error of three ways to compute the halving target, and plot it for docs/pages/target.md.

python docs/target_error.py    writes docs/results/target-error.json and docs/pages/target-error.svg

The teacher is the exact denoiser of a Gaussian. Every step of the student's grid is measured, including the first and
the last, with 2^18 errors per point. The reference is the convex form in float64 from the same float32 samples.
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from halfstep import GaussianDenoiser, VPCosine, halving_target
from halfstep.core.denoiser import ddim_step

DOCS: Final = Path(__file__).parent
PROCESS: Final = VPCosine()
TEACHER: Final = GaussianDenoiser(PROCESS, mean=0.3, std=0.5)
ERRORS: Final = 2**18
DRAWN: Final = {"subtractive": ("subtractive", "#c25b12", "s"), "convex": ("convex", "#2a7f3f", "o")}


def two_steps(x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_s after two DDIM steps of the teacher, and the x0 of the second step."""
    middle = (t + s) / 2
    x_m = ddim_step(TEACHER(x_t, t), PROCESS, middle)
    second = TEACHER(x_m, middle)
    return ddim_step(second, PROCESS, s), second.x0


def subtractive(x_t: Tensor, t: Tensor, s: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the paper's target, with coefficients computed in `dtype`."""
    x_s, last = two_steps(x_t, t, s)
    alpha_t, sigma_t = (a.to(dtype) for a in PROCESS.alpha_sigma(t))
    alpha_s, sigma_s = (a.to(dtype) for a in PROCESS.landing(s))
    ratio = sigma_s / sigma_t
    width = alpha_s - ratio * alpha_t
    x0 = (x_s - ratio.to(x_t)[:, None] * x_t) / width.to(x_t)[:, None]
    return torch.where((s == 0)[:, None], last, x0)


def rounded(value: Tensor) -> float:
    """Round a measurement to two digits."""
    return float(f"{float(value):.1e}")


def measure(num_steps: int) -> dict[str, Any]:
    """Return the largest and rms errors for a student with `num_steps` steps, and the rms correction to learn."""
    index = torch.arange(num_steps, dtype=torch.float64)
    t, s = (index + 1) / num_steps, index / num_steps
    generator = torch.Generator().manual_seed(num_steps)
    shape = (num_steps, ERRORS // num_steps)
    x0 = TEACHER.mean + TEACHER.std * torch.randn(shape, generator=generator, dtype=torch.float64)
    x_t = PROCESS.mix(x0, torch.randn(shape, generator=generator, dtype=torch.float64), t).float()
    exact = halving_target(TEACHER, x_t.double(), t, s)
    forms: dict[str, Callable[[], Tensor]] = {
        "convex": lambda: halving_target(TEACHER, x_t, t, s),
        "subtractive": lambda: subtractive(x_t, t, s),
        "subtractive_float32": lambda: subtractive(x_t, t, s, torch.float32),
    }
    row: dict[str, Any] = {"teacher_steps": 2 * num_steps}
    for name, form in forms.items():
        target = form()
        if target.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {target.dtype}")
        error = target.double() - exact
        row[name] = {"max": rounded(error.abs().max()), "rms": rounded(error.square().mean().sqrt())}
    row["to_learn_rms"] = rounded((exact - TEACHER(x_t.double(), t).x0).square().mean().sqrt())
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the errors of the two forms with float64 coefficients against the teacher's steps."""
    mpl.rcParams.update({"svg.hashsalt": "halfstep", "svg.fonttype": "none", "font.family": "DejaVu Sans, sans-serif"})
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    steps = [row["teacher_steps"] for row in rows]
    for name, (label, colour, marker) in DRAWN.items():
        rms, largest = ([row[name][which] for row in rows] for which in ("rms", "max"))
        axes.loglog(steps, largest, color=colour, linestyle=":", label=f"{label} form, largest error")
        axes.loglog(steps, rms, color=colour, marker=marker, markersize=4, label=f"{label} form, rms error")
    learned = [row["to_learn_rms"] for row in rows]
    axes.loglog(
        steps,
        learned,
        color="0.45",
        linestyle="--",
        label="correction to learn, rms",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(count) for count in steps], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("steps of the teacher")
    axes.set_ylabel("size, in units of x0")
    axes.grid(color="0.9")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the measurements and the figure."""
    torch.set_num_threads(1)
    rows = [measure(2**k) for k in range(13)]
    result = {
        "what": "error of the float32 halving target against float64, over all steps of the student's grid",
        "teacher": "GaussianDenoiser(VPCosine(), mean=0.3, std=0.5)",
        "errors_per_point": ERRORS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    (DOCS / "results" / "target-error.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, DOCS / "pages" / "target-error.svg")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
