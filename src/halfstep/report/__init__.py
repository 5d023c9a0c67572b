"""What a run looks like: its report, one HTML file that needs nothing else, and the explorer, a local page.

The report is made from the run folder alone, without torch; the explorer loads the run's models.
"""

from halfstep.report.nearest import save_nearest
from halfstep.report.page import headline, write_report
from halfstep.report.reading import read_run
