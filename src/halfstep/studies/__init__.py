"""Studies: the paper's tables and figures as plans of runs, each ending in a table and a figure."""

from halfstep.studies import cost, integrators, sampling, schedules, table1
from halfstep.studies.base import Bench, Cell, Row, Study, Table, run_study, studies
from halfstep.studies.scales import SCALES, Scale
from halfstep.studies.write import write_study
