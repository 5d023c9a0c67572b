"""The report of a run, one self-contained HTML file, and the tables of its figures.

The report is made from the run folder alone, without torch; the explorer loads the run's models.
"""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
