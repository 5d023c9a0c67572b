"""Dispatch of verbs, and the exit codes.

0: done. 1: the run failed and would fail again (training diverged, or does not fit into memory). 2: bad input. 3: the
disk of the run is full or gone; the last good state is named. 130, 143, 138: stopped by Ctrl-C, SIGTERM or SIGUSR1,
with the state saved (--engine.requeue-code puts another code in the place of the last two).
"""

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

USAGE = """\
usage: halfstep VERB ...

  run RECIPE        the whole plan: train a teacher, halve it to few steps, measure, report; resumable
  train RECIPE      the teacher only
  import FORMAT     a model from elsewhere as a stage: halfstep import diffusers google/ddpm-cifar10-32
  encode PIPELINE   images and texts to latents, once: halfstep encode PIPELINE --data FOLDER --out latents
  distill MODEL     halve a model to fewer steps: halfstep distill runs/digits --to 4; MODEL may be a diffusers pipeline
  sample MODEL      draw samples: halfstep sample runs/digits --num-samples 64 --out grid.png
  export MODEL      to a stock diffusers pipeline or one ONNX graph: halfstep export runs/digits --out digits-1
  evaluate MODEL    measure a run or one of its stages
  report RUN        write RUN/report/index.html
  explore RUN       a local page: teacher and students side by side from the same noise (needs gradio)
  study NAME        one of the paper's tables and figures: halfstep study table1 --scale smoke
  ls                recipes, samplers, predictions, weightings, studies, ...
  demo              the same as `run digits`

MODEL is the folder of a run (its last stage is meant) or of a stage. `halfstep VERB --help` shows all options."""


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
        from halfstep.train.processes import wait_to_be_ended

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
        SystemExit: with one of the codes above.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Heavy imports come after the cheap answers, so that help and typing errors are quick.
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        raise SystemExit(0)
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"halfstep {version('halfstep')}")
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)

    from halfstep.registry import nearest

    verbs = (
        "run",
        "train",
        "import",
        "encode",
        "distill",
        "sample",
        "export",
        "evaluate",
        "report",
        "explore",
        "study",
        "ls",
        "demo",
    )
    verb, rest = arguments[0], arguments[1:]
    if verb not in verbs:
        fail(f"unknown verb {verb!r}{nearest(verb, verbs)} (known: {', '.join(verbs)})")

    with warnings.catch_warnings():
        from halfstep.core.warnings import HalfstepWarning

        warnings.showwarning = _warning_printer()
        warnings.simplefilter("always", HalfstepWarning)
        if int(os.environ.get("WORLD_SIZE", "1") or "1") > 1:
            _dispatch_together(verb, rest)
        else:
            _dispatch(verb, rest)


SHARED_VERBS = ("run", "train", "distill", "sample", "evaluate", "demo")
"""Verbs that several processes do together."""


def _dispatch_together(verb: str, rest: Sequence[str]) -> None:
    """The verb in one of several processes."""
    if verb not in SHARED_VERBS:
        fail(f"halfstep {verb} is done by one process: start it without torchrun or accelerate launch")
    from halfstep.train.processes import leave

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


def _dispatch(verb: str, rest: Sequence[str]) -> None:
    # An optional library that diffusers looks for and that warns at its import of what it cannot do here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from halfstep.cli import commands
    from halfstep.train import FailedElsewhere, Interrupted, LostProcess, NonFinite, NoStorage, OutOfMemory

    try:
        getattr(commands, {"import": "import_"}.get(verb, verb))(rest)
    except Interrupted as stopped:
        if not _index():
            print(f"\nhalfstep: {stopped}; the state is saved: run the same command again to go on", file=sys.stderr)
        raise SystemExit(stopped.code) from None
    except FailedElsewhere as error:
        # The first process has said its own, and speaks for the others.
        if not _index():
            fail(error, error.code)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        print("\nhalfstep: stopped at once; what the last checkpoint holds is safe", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; say nothing more to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (NonFinite, OutOfMemory, LostProcess) as error:
        fail(error, code=1)
    except NoStorage as error:
        fail(error.strerror, code=3)
    except (ValueError, OSError) as error:
        if os.environ.get("HALFSTEP_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:
            fail(f"{error.strerror}" + (f": {error.filename}" if error.filename else ""))
        fail(error)
