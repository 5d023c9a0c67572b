"""The command line: verbs, their arguments, and one clear line for every error."""

from halfstep.cli.main import main

__all__ = ["main"]
