"""Samplers, one file a method, and the one loop that runs them."""

from halfstep.samplers.base import Memory, Sampler, samplers
from halfstep.samplers.ddim import DDIM
from halfstep.samplers.loop import SamplerStep, sample, trajectory

__all__ = ["DDIM", "Memory", "Sampler", "SamplerStep", "sample", "samplers", "trajectory"]
