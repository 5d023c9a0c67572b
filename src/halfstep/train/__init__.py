"""The engine: trains the stages of a plan into a run folder, survives kills, measures what comes out."""

from halfstep.runs.storage import NoStorage
from halfstep.train.distill import distill, fit
from halfstep.train.engine import StageTrainer, Window
from halfstep.train.evaluate import Evaluation, Reference, measure
from halfstep.train.failures import NonFinite, OutOfMemory
from halfstep.train.matching import matched_student, viewed
from halfstep.train.model import Model, blank_denoiser, load, save_stage
from halfstep.train.nearest import Neighbours, nearest_samples
from halfstep.train.pipeline import (
    DifferentRecipe,
    Event,
    Measured,
    Notice,
    Progress,
    RunSpec,
    StageEnd,
    StageStart,
    run,
)
from halfstep.train.processes import FailedElsewhere, LostProcess, Processes, make_accelerator
from halfstep.train.stop import Interrupted, StopSignal

__all__ = [
    "DifferentRecipe",
    "Evaluation",
    "Event",
    "FailedElsewhere",
    "Interrupted",
    "LostProcess",
    "Measured",
    "Model",
    "Neighbours",
    "NoStorage",
    "NonFinite",
    "Notice",
    "OutOfMemory",
    "Processes",
    "Progress",
    "Reference",
    "RunSpec",
    "StageEnd",
    "StageStart",
    "StageTrainer",
    "StopSignal",
    "Window",
    "blank_denoiser",
    "distill",
    "fit",
    "load",
    "make_accelerator",
    "matched_student",
    "measure",
    "nearest_samples",
    "run",
    "save_stage",
    "viewed",
]
