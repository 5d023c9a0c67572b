"""Objectives (one file per method), their training hyperparameters, and the plan, which describes a chain of stages."""

from halfstep.objectives.adversarial import Adversarial
from halfstep.objectives.auxiliary import AUXILIARY, auxiliary_denoiser
from halfstep.objectives.base import (
    STUDENT,
    Auxiliary,
    Average,
    Batch,
    Evals,
    Frozen,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    StepObjective,
    Training,
    Turn,
    objectives,
    weighted_x0_loss,
)
from halfstep.objectives.consistency import Consistency, consistency_target
from halfstep.objectives.denoising import Denoising
from halfstep.objectives.early_end import EarlyEnd
from halfstep.objectives.finishing import Finishing
from halfstep.objectives.guidance import FixedGuidance, Guidance, GuidanceRange, guidances
from halfstep.objectives.halving import Halving, halving_target
from halfstep.objectives.matching import Matching
from halfstep.objectives.metric import LossMetric, PseudoHuber, Squared, loss_metrics
from halfstep.objectives.moments import MomentMatching
from halfstep.objectives.plan import FINISHING, HALVING, Parents, Plan, Stage, divided, parents_of
