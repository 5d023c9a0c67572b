"""The command line: verbs, arguments and one-line error messages."""

from halfstep.cli.main import main

__all__ = ["main"]
