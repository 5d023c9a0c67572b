"""Studies: the paper's tables and figures as plans of runs, each with a table and a figure as its result."""

from halfstep.studies import cost, integrators, roads, sampling, schedules, table1
from halfstep.studies.base import Bench, Finding, Study, Table, Trial, run_study, studies, write_study
from halfstep.studies.scales import SCALES, Scale
