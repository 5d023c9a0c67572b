"""Verified results from the paper and its code, shown next to ours.

An FID is not comparable with a distance in a different feature space, so compare rankings and ratios. Results that
could not be verified are omitted: the integrators of appendix C, the fast schedules and figure 6.

Source: Salimans & Ho 2022 (arXiv:2202.00512), tables 1 and 2 and section 5.2. Figure 4 was digitised from the authors'
    README with an accuracy of 0.5%. The values for CIFAR-10 with 1 to 8 steps are taken from table 2.
"""

from typing import Final

TABLE_1: Final[dict[tuple[str, str], tuple[float, float] | None]] = {
    ("both", "snr"): (2.54, 2.78),
    ("both", "truncated_snr"): (2.47, 2.76),
    ("both", "snr_plus_one"): (2.52, 2.87),
    ("x0", "snr"): (2.65, 2.75),
    ("x0", "truncated_snr"): (2.53, 2.51),
    ("x0", "snr_plus_one"): (2.56, 2.65),
    ("eps", "snr"): (2.59, 2.91),
    ("eps", "truncated_snr"): None,
    ("eps", "snr_plus_one"): (2.56, 3.27),
    ("v", "snr"): (2.65, 3.05),
    ("v", "truncated_snr"): (2.45, 2.75),
    ("v", "snr_plus_one"): (2.49, 2.87),
}
"""The FIDs of undistilled, unconditional models on CIFAR-10 with stochastic sampling and with DDIM, by prediction and
weighting, or None if the model diverged."""

TABLE_2: Final[dict[str, dict[int, float]]] = {
    "student": {1: 9.12, 2: 4.51, 4: 3.00, 8: 2.57},
    "ddim": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16},
    "FastDPM": {10: 9.90, 20: 5.05, 50: 3.20, 100: 2.86},
    "Improved DDPM, respaced": {25: 7.53, 50: 4.99},
    "Luhman & Luhman": {1: 9.36},
    "dynamic step-size extrapolation": {48: 82.42, 151: 2.73, 180: 2.44, 274: 2.60, 330: 2.56},
    "LSGM": {138: 2.10},
}
"""The FID on CIFAR-10 by method and number of network calls."""

FIGURE_4: Final[dict[str, dict[str, dict[int, float]]]] = {
    "CIFAR-10": {
        "student": {
            1: 9.12, 2: 4.51, 4: 3.00, 8: 2.57, 16: 2.46, 32: 2.40, 64: 2.40, 128: 2.38, 256: 2.38, 512: 2.39,
        },
        "ddim": {16: 9.68, 32: 6.00, 64: 4.27, 128: 3.28, 256: 2.80, 512: 2.59},
        "ancestral": {16: 9.94, 32: 4.54, 64: 3.05, 128: 2.46, 256: 2.36, 512: 2.36},
    },
    "ImageNet 64x64": {
        "student": {
            1: 16.1, 2: 7.37, 4: 3.88, 8: 2.95, 16: 2.66, 32: 2.60, 64: 2.57, 128: 2.57, 256: 2.56, 512: 2.55,
        },
        "ddim": {8: 13.6, 16: 6.75, 32: 4.52, 64: 3.64, 128: 3.05, 256: 2.76, 512: 2.65},
        "ancestral": {16: 9.72, 32: 4.58, 64: 3.10, 128: 2.33, 256: 2.16, 512: 2.14},
    },
}  # fmt: skip
"""The FID by data set, method and number of steps. The paper's figure does not show FIDs above 20."""

COST: Final[dict[str, tuple[int, int, int]]] = {
    "CIFAR-10": (800_000, 550_000, 750_000),
    "ImageNet 64x64": (550_000, 400_000, 600_000),
    "LSUN 128x128": (400_000, 400_000, 600_000),
}
"""The numbers of updates for base training, distillation to 4 steps and distillation to 1 step, by data set."""
