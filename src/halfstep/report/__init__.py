"""Build a run's report (a single self-contained HTML file) and tables of metrics from the run folder, without torch."""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
