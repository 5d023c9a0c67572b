"""Dispatch of verbs, and one line and an exit code for every error; `verbs.EXIT_CODES` tells what the codes mean."""

import importlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from halfstep.cli.verbs import COMMANDS, VERBS, Verb, overview

PATIENCE_SECONDS = 4.0
"""Time in which a launcher ends all processes of a run once one of them has failed."""


def _index() -> int:
    """Which of the processes that `torchrun` or `accelerate launch` has started this is; 0 without them."""
    return int(os.environ.get("RANK", "0") or "0")


def fail(message: object, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr.

    Of several processes, which mostly fail alike, the first speaks for all. Another one speaks if nobody has ended it
    in a while, so that the failure was its own.
    """
    text = " ".join(str(message).split())
    if _index():
        from halfstep.runtime.processes import wait_to_be_ended

        wait_to_be_ended(PATIENCE_SECONDS, code)
        text = f"(process {_index()}) {text}"
    print(f"halfstep: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _warning_printer() -> Callable[..., None]:
    """Prints each warning of ours once: the models of a chain have the same to say each time that they are sampled."""
    from halfstep.core.warnings import HalfstepWarning

    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, HalfstepWarning) and str(message) not in said and not _index():
            said.add(str(message))
            print(f"halfstep: warning: {message}", file=sys.stderr)

    return show


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends a process that has nothing to save. The first process of a container needs a handler to be ended at all."""
    print(f"\nhalfstep: stopped by {signal.Signals(number).name}", file=sys.stderr)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `halfstep`.

    Raises:
        SystemExit: with one of `verbs.EXIT_CODES`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Heavy imports come after the cheap answers, so that help and typing errors are quick.
    if arguments[:1] == ["help"] and arguments[1:] and arguments[1] in VERBS:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"halfstep {version('halfstep')}")
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)

    from halfstep.registry import nearest

    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        fail(f"unknown verb {name!r}{nearest(name, VERBS)} (known: {', '.join(VERBS)})")
    verb = VERBS[name]
    if int(os.environ.get("WORLD_SIZE", "1") or "1") > 1:
        _dispatch_together(verb, rest)
    else:
        _dispatch(verb, rest)


SHARED_VERBS = ("run", "train", "distill", "sample", "evaluate", "demo")
"""Verbs that several processes do together."""


def _dispatch_together(verb: Verb, rest: Sequence[str]) -> None:
    """The verb in one of several processes."""
    if verb.name not in SHARED_VERBS:
        fail(f"halfstep {verb.name} is done by one process: start it without torchrun or accelerate launch")
    from halfstep.runtime.processes import leave

    try:
        _dispatch(verb, rest)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # What else ends with a process would wait for the others, or be broken off by their end.
        os._exit(code if isinstance(code, int) else 1)
    leave()


def _dispatch(verb: Verb, rest: Sequence[str]) -> None:
    try:
        if verb.module == COMMANDS:
            _command(verb, rest)
        else:
            getattr(importlib.import_module(verb.module), verb.function)(rest)
    except KeyboardInterrupt:
        print("\nhalfstep: stopped at once; what the last checkpoint holds is safe", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; say nothing more to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        if os.environ.get("HALFSTEP_TRACEBACK"):
            raise
        from halfstep.runtime.storage import exit_code

        code = exit_code(error)
        if isinstance(error, OSError) and error.strerror:
            fail(f"{error.strerror}" + (f": {error.filename}" if error.filename else ""), code)
        fail(error, code)


def _command(verb: Verb, rest: Sequence[str]) -> None:
    """A verb that needs torch and diffusers."""
    # An optional library that diffusers looks for and that warns at its import of what it cannot do here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from halfstep.cli import commands
    from halfstep.core.warnings import HalfstepWarning
    from halfstep.runtime.failures import NonFinite, OutOfMemory
    from halfstep.runtime.processes import FailedElsewhere, LostProcess
    from halfstep.runtime.stop import Interrupted

    with warnings.catch_warnings():
        warnings.showwarning = _warning_printer()
        warnings.simplefilter("always", HalfstepWarning)
        try:
            getattr(commands, verb.function)(rest)
        except Interrupted as stopped:
            if not _index():
                print(
                    f"\nhalfstep: {stopped}; the state is saved: run the same command again to go on", file=sys.stderr
                )
            raise SystemExit(stopped.code) from None
        except FailedElsewhere as error:
            # The first process has said its own, and speaks for the others.
            if not _index():
                fail(error, error.code)
            raise SystemExit(error.code) from None
        except (NonFinite, OutOfMemory, LostProcess) as error:
            fail(error, code=1)
