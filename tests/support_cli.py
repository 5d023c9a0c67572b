"""Shared code of the command-line tests."""

import pytest

from halfstep.cli import main

Capture = pytest.CaptureFixture[str]


def refused(argv: list[str], capsys: Capture, code: int = 2) -> str:
    """Return the single error line of a failing command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    errors = capsys.readouterr().err
    assert end.value.code == code
    lines = [line for line in errors.splitlines() if not line.startswith("halfstep: warning:")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("halfstep: error: ")
    return lines[0].removeprefix("halfstep: error: ")
