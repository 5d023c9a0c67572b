"""Losses, halving targets, DDIM and ancestral samples equal those of the authors' JAX code in float64."""

import itertools
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Denoiser, NetworkDenoiser
from halfstep.core.noise import VPCosine, per_sample
from halfstep.core.prediction import SNR, X0, Both, Constant, Eps, Prediction, SNRPlusOne, TruncatedSNR, V, Weighting
from halfstep.objectives import halving_target, weighted_x0_loss
from halfstep.samplers import DDIM, Ancestral, Sampler, StepNoise, sample

DATA: Final = Path(__file__).parents[1] / "data"
LOSSES: Final = dict(np.load(DATA / "losses.npz"))
SAMPLES: Final = dict(np.load(DATA / "samples.npz"))

PROCESS: Final = VPCosine()
PREDICTIONS: Final[dict[str, Prediction]] = {"x": X0(), "eps": Eps(), "v": V(), "both": Both()}
WEIGHTINGS: Final[dict[str, Weighting]] = {
    "constant": Constant(),
    "snr": SNR(),
    "snr_trunc": TruncatedSNR(),
    "v_mse": SNRPlusOne(),
}

CASES: Final = sorted({tuple(key.split(".")[:2]) for key in LOSSES})
GAMMAS: Final = {"fixed_small": 0.0, "fixed_medium:0.3": 0.3, "fixed_large": 1.0}


class SampleRun(NamedTuple):
    """The settings of one sampling of the reference: `{prediction}.{sampler}.{variance}.{num_steps}.{clip}`."""

    prediction: str
    sampler: str
    variance: str
    num_steps: int
    clip: str

    @property
    def key(self) -> str:
        return ".".join(str(part) for part in self)

    @property
    def parts(self) -> set[str]:
        """Return the stored samples; those of ddim, which draws no noise, are stored under the name of one variance."""
        return {
            f"{self.key}.{part}" for part in ("net", "start", "out", *(["noise"] if self.sampler == "noisy" else []))
        }


RUNS: Final = [
    SampleRun(prediction, sampler, variance, num_steps, clip)
    for prediction, (sampler, variance), num_steps, clip in itertools.product(
        PREDICTIONS,
        [("ddim", "fixed_large"), *(("noisy", variance) for variance in GAMMAS)],
        (1, 2, 4, 16, 128),
        ("clip", "raw"),
    )
]


def column(values: np.ndarray) -> Tensor:
    """Return scalars as samples with one entry, `[n, 1]`."""
    return torch.from_numpy(values).reshape(-1, 1)


def formula(coefficients: np.ndarray, prediction: Prediction, process: VPCosine = PROCESS) -> Denoiser:
    """Return the output of the reference's "network", as `tests/data/README.md` defines it."""
    c: list[float] = coefficients.tolist()

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        level = per_sample(process.log_snr(time.double()), x_t)

        def out(k: int) -> Tensor:
            a, b, phase, d = (c[(k + j) % 8] for j in range(4))
            return a * x_t + b * torch.sin(3 * x_t + phase * level / 10) + d * torch.tanh(level / 8)

        return torch.cat([out(4 * k) for k in range(prediction.channels)], dim=1)

    return NetworkDenoiser(network, process, prediction)


def target_of(name: str, num_steps: str) -> Tensor:
    """Return our target for the rows of a case, `[n, 1]`; if training is in continuous time, it is the data."""
    row = {key: LOSSES[f"{name}.{num_steps}.{key}"] for key in ("x", "eps", "t", "teacher")}
    x0, eps, t = column(row["x"]), column(row["eps"]), torch.from_numpy(row["t"])
    if num_steps == "0":
        return x0
    count = int(num_steps)
    s = ((t * count).round() - 1) / count
    return halving_target(formula(row["teacher"], PREDICTIONS[name]), PROCESS.mix(x0, eps, t), t, s)


def test_the_reference_covers_every_prediction_weighting_and_grid() -> None:
    assert {name for name, _ in CASES} == set(PREDICTIONS)
    assert {int(count) for _, count in CASES} == {0, 1, 2, 4, 64, 1024, 4096}
    assert set().union(*(run.parts for run in RUNS)) == set(SAMPLES)


@pytest.mark.parametrize(("name", "num_steps"), [case for case in CASES if case[1] != "0"])
def test_the_halving_target_is_the_authors(name: str, num_steps: str) -> None:
    # 1e-11: the reference solves for its target by subtraction, with this much rounding at 4096 steps.
    reference = column(LOSSES[f"{name}.{num_steps}.x_target"])
    torch.testing.assert_close(target_of(name, num_steps), reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("name", "num_steps"), CASES)
def test_the_loss_is_the_authors(name: str, num_steps: str, weighting: str) -> None:
    """Compare row by row, to 1e-9 of the error whose weighted square is the loss.

    If the student nearly hits the target, the loss is the square of a difference that consists of the 1e-11 of rounding
    in the reference's own target. Therefore errors in x0 are compared instead of their squares, with a tolerance of
    1e-11. In continuous time the target is the data, and no tolerance is needed.
    """
    row = {key: LOSSES[f"{name}.{num_steps}.{key}"] for key in ("x", "eps", "t", "student", f"loss_{weighting}")}
    t = torch.from_numpy(row["t"])
    log_snr = PROCESS.log_snr(t)
    student = formula(row["student"], PREDICTIONS[name])
    x_t = PROCESS.mix(column(row["x"]), column(row["eps"]), t)
    ours = weighted_x0_loss(student(x_t, t).x0, target_of(name, num_steps), log_snr, WEIGHTINGS[weighting])
    theirs = torch.from_numpy(row[f"loss_{weighting}"])
    weight = WEIGHTINGS[weighting](log_snr)
    torch.testing.assert_close(
        (ours / weight).sqrt(), (theirs / weight).sqrt(), rtol=1e-9, atol=0 if num_steps == "0" else 1e-11
    )
    # Compare plain losses too, unless they consist of this rounding.
    clear = (theirs / weight).sqrt() > 0.02
    assert bool(clear.float().mean() > 0.5)
    torch.testing.assert_close(ours[clear], theirs[clear], rtol=2e-9, atol=0)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.key)
def test_samples_are_the_authors(run: SampleRun) -> None:
    """Test all rows. The reference numbers its noise by loop index, which decreases from num_steps - 1 to 0."""
    denoiser = formula(SAMPLES[f"{run.key}.net"], PREDICTIONS[run.prediction])
    start, reference = column(SAMPLES[f"{run.key}.start"]), column(SAMPLES[f"{run.key}.out"])
    sampler: Sampler = DDIM()
    noise: StepNoise | None = None
    if run.sampler == "noisy":
        sampler = Ancestral(GAMMAS[run.variance])
        stored = SAMPLES[f"{run.key}.noise"]
        assert len(stored) == run.num_steps

        def noise(number: int) -> Tensor:
            return column(stored[run.num_steps - 1 - number])

    chosen = Clipped(denoiser) if run.clip == "clip" else denoiser
    samples = sample(chosen, start, run.num_steps, sampler, noise=noise)
    torch.testing.assert_close(samples, reference, rtol=1e-9, atol=1e-12)
