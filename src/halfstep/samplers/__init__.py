"""Samplers, in one file per method or family, and the loop that runs them."""

from halfstep.samplers.ancestral import Ancestral, ancestral_step
from halfstep.samplers.base import DataPredictionSampler, Memory, Sampler, samplers
from halfstep.samplers.coordinates import Angle, Coordinate, LogSNR, NoiseToSignal, coordinates
from halfstep.samplers.ddim import DDIM
from halfstep.samplers.dpmpp_2m import DPMSolverPP2M
from halfstep.samplers.loop import SamplerStep, StepNoise, sample, trajectory
from halfstep.samplers.runge_kutta import RK4, Euler, Heun, Midpoint
