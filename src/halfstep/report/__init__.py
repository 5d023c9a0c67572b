"""Build a run's report, which is a single self-contained HTML file, and its tables of metrics, without torch."""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
