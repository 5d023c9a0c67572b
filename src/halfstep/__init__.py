"""Progressive distillation: diffusion models that sample in four steps instead of hundreds.

    import halfstep

    model = halfstep.load("runs/digits")           # the last student of a run
    x0 = model.sample(seeds=range(64))             # [64, 1, 8, 8] in [-1, 1]

Everything below is documented where it is defined; CONTRIBUTING.md draws the map of the rooms.
"""

from halfstep.core.denoiser import Clipped, Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.core.draw import Draw, sample_labels, sample_noise, step_noise
from halfstep.core.noise import (
    VE,
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_betas,
)
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser, data_set_denoiser
from halfstep.core.prediction import EDM, X0, Both, Denoised, Eps, FlowVelocity, Prediction, V
from halfstep.core.warnings import HalfstepWarning
from halfstep.core.weighting import SNR, Constant, SNRPlusOne, TruncatedSNR, Weighting
from halfstep.data import Data, DataConfig, open_data
from halfstep.objectives import (
    Batch,
    Denoising,
    EarlyEnd,
    GuidanceRange,
    Halving,
    Losses,
    Matching,
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
from halfstep.train import Model, distill, fit, load

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "EDM",
    "RK4",
    "SNR",
    "VE",
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
    "FlowMatching",
    "FlowVelocity",
    "GaussianDenoiser",
    "GuidanceRange",
    "Guided",
    "HalfstepWarning",
    "Halving",
    "Heun",
    "LogSNR",
    "Losses",
    "Matching",
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
    "Reprocessed",
    "SNRPlusOne",
    "Sampler",
    "SamplerStep",
    "Stage",
    "TruncatedSNR",
    "V",
    "VPCosine",
    "VPTable",
    "Weighting",
    "cosine_betas",
    "data_set_denoiser",
    "distill",
    "fit",
    "halving_target",
    "linear_betas",
    "load",
    "open_data",
    "sample",
    "sample_labels",
    "sample_noise",
    "scaled_linear_betas",
    "step_noise",
    "trajectory",
    "zero_terminal_betas",
]
