"""The report of a run, one self-contained HTML file, and the tables of its metrics.

The report needs only the run folder and no torch; the explorer loads the run's models.
"""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
