"""Builds a run's report (one self-contained HTML file) and tables of metrics from its folder, without torch."""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
