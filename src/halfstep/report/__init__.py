# PROVISIONAL stand-in; the report room's author replaces this file.
def write_report(run):
    return run / "report" / "index.html"
