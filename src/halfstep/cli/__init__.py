"""The command line: the verbs, their arguments, and a clear one-line message for every error."""

from halfstep.cli.main import main

__all__ = ["main"]
