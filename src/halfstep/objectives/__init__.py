"""Objectives, one file a method, and the plan: the chain of stages as data."""

from halfstep.objectives.base import Batch, Losses, Models, Objective, objectives, weighted_x0_loss
from halfstep.objectives.denoising import Denoising
from halfstep.objectives.halving import Halving, halving_target
from halfstep.objectives.matching import GuidanceRange, Matching
from halfstep.objectives.plan import EarlyEnd, Plan, Stage
