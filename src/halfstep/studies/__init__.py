"""Studies that reproduce the paper's tables and figures and compare distillation methods."""

from halfstep.studies import cost, integrators, roads, sampling, schedules, table1
from halfstep.studies.base import Bench, Finding, Study, Table, Trial, run_study, studies, write_study
from halfstep.studies.scales import SCALES, Scale
