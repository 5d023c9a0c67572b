"""Progressive distillation: diffusion models that sample in four steps instead of hundreds.

    import halfstep

    model = halfstep.load("runs/digits")           # the last student of a run
    x0 = model.sample(seeds=range(64))             # [64, 1, 8, 8] in [-1, 1]

Everything below is documented where it is defined; CONTRIBUTING.md draws the map of the rooms.
"""

from halfstep.core.denoiser import Clipped, Denoiser, NetworkDenoiser
from halfstep.core.draw import Draw, sample_labels, sample_noise, step_noise
from halfstep.core.noise import NoiseProcess, VPCosine
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser, data_set_denoiser
from halfstep.core.prediction import X0, Both, Denoised, Eps, Prediction, V
from halfstep.core.warnings import HalfstepWarning
from halfstep.core.weighting import SNR, Constant, SNRPlusOne, TruncatedSNR, Weighting
from halfstep.data import Data, DataConfig, open_data
from halfstep.objectives import (
    Batch,
    Denoising,
    EarlyEnd,
    Halving,
    Losses,
    Models,
    Objective,
    Plan,
    Stage,
    halving_target,
)
from halfstep.samplers import (
    DDIM,
    RK4,
    Ancestral,
    Angle,
    DPMSolverPP2M,
    Euler,
    Heun,
    LogSNR,
    Midpoint,
    NoiseToSignal,
    Sampler,
    SamplerStep,
    sample,
    trajectory,
)
from halfstep.train import Model, distill, load

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "RK4",
    "SNR",
    "X0",
    "Ancestral",
    "Angle",
    "Batch",
    "Both",
    "Clipped",
    "Constant",
    "DPMSolverPP2M",
    "Data",
    "DataConfig",
    "Denoised",
    "Denoiser",
    "Denoising",
    "Draw",
    "EarlyEnd",
    "Eps",
    "Euler",
    "GaussianDenoiser",
    "HalfstepWarning",
    "Halving",
    "Heun",
    "LogSNR",
    "Losses",
    "Midpoint",
    "MixtureDenoiser",
    "Model",
    "Models",
    "NetworkDenoiser",
    "NoiseProcess",
    "NoiseToSignal",
    "Objective",
    "Plan",
    "Prediction",
    "SNRPlusOne",
    "Sampler",
    "SamplerStep",
    "Stage",
    "TruncatedSNR",
    "V",
    "VPCosine",
    "Weighting",
    "data_set_denoiser",
    "distill",
    "halving_target",
    "load",
    "open_data",
    "sample",
    "sample_labels",
    "sample_noise",
    "step_noise",
    "trajectory",
]
