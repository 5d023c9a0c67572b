"""Dispatch verbs; report every error in one line and exit with one of `verbs.EXIT_CODES`."""

import contextlib
import errno
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
from typing import Any, Final, NoReturn

from halfstep.cli.verbs import VERBS, Verb, overview
from halfstep.registry import nearest
from halfstep.runtime.allocator import keep_freed_memory
from halfstep.runtime.launch import check_launch, rank, world_size
from halfstep.runtime.storage import FULL, GONE, exit_code
from halfstep.runtime.terminal import Output, one_line, safe_outputs, warn

REMEDIES: Final = {
    **dict.fromkeys((errno.ENOENT, errno.EINVAL, errno.ELOOP), "Check the path"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS), "Choose another path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Check its permissions, or choose another path"),
    **dict.fromkeys(FULL, "Free some space, or choose another disk"),
    **dict.fromkeys(GONE, "Reconnect the disk"),
    errno.ENAMETOOLONG: "Choose a shorter name",
}
"""Remedies for system errors, by errno."""


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one line to stderr and exit.

    All ranks usually fail with the same error, which rank 0 reports. If another rank is still alive after a
    while, the error is its own.
    """
    text = one_line(message)
    if number := rank():
        from halfstep.runtime.processes import wait_to_be_ended

        # When one process fails, a launcher kills all others within this time.
        wait_to_be_ended(4.0, code)
        text = f"(process {number}) {text}"
    print(f"halfstep: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _warning_printer() -> Callable[..., None]:
    """Return a printer that shows each halfstep warning once, although sampling repeats them."""
    from halfstep.core.warnings import HalfstepWarning

    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, HalfstepWarning) and str(message) not in said and not rank():
            said.add(str(message))
            warn(message)

    return show


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Exit a process that has nothing to save. PID 1 of a container ignores signals without a handler."""
    # The signal may interrupt another print.
    with contextlib.suppress(RuntimeError):
        print(f"\nhalfstep: stopped by {signal.Signals(number).name}", file=sys.stderr)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `halfstep`.

    Raises:
        SystemExit: with one of `verbs.EXIT_CODES`.
    """
    threading.excepthook = _thread_failed
    try:
        with safe_outputs() as out:
            try:
                _main(list(sys.argv[1:] if argv is None else argv))
            except SystemExit as end:
                if not end.code:
                    _check_written(out)
                raise
            _check_written(out)
    except SystemExit as end:
        if argv is None and isinstance(end.code, int) and end.code > 128:
            # After a signal, everything is saved and printed. A normal exit would unload modules for seconds.
            os._exit(end.code)
        raise


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread's error. The main thread reports a lost disk."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _check_written(out: Output) -> None:
    """Fail if output to stdout was lost, unless the reader (head, less) closed the pipe."""
    out.flush()
    if out.error is not None and out.error.errno != errno.EPIPE:
        fail(f"stdout cannot be written ({out.error.strerror}). The output is lost, but everything else is done")


def _main(arguments: list[str]) -> None:
    # Slow imports come last, because help and usage errors must be fast.
    if arguments[:1] == ["help"] and arguments[1:] and arguments[1] in VERBS:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"halfstep {version('halfstep')}")
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)

    name, *rest = arguments
    if name not in VERBS:
        fail(f"unknown verb {name!r}{nearest(name, VERBS)} (known: {', '.join(VERBS)})")
    try:
        check_launch()
    except ValueError as error:
        fail(error)
    if world_size() > 1:
        _dispatch_together(VERBS[name], rest)
    else:
        _dispatch(VERBS[name], rest)


def _dispatch_together(verb: Verb, rest: Sequence[str]) -> None:
    """Run the verb as one of several processes."""
    if verb.name not in ("run", "train", "distill", "finish", "encode", "sample", "evaluate", "demo"):
        fail(f"halfstep {verb.name} uses one process. Start it without torchrun or accelerate launch")
    from halfstep.runtime.processes import leave

    try:
        _dispatch(verb, rest)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # A normal exit would wait for the other ranks, or crash when they exit.
        os._exit(code if isinstance(code, int) else 1)
    leave()


def _dispatch(verb: Verb, rest: Sequence[str]) -> None:
    try:
        if verb.is_light:
            _function_of(verb)(rest)
        else:
            _call_heavy(verb, rest)
    except KeyboardInterrupt:
        safe = "; the last checkpoint is safe" if 130 in verb.codes else ""
        print(f"\nhalfstep: stopped at once{safe}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        if os.environ.get("HALFSTEP_TRACEBACK"):
            raise
        code = exit_code(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            fail(
                f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}). "
                f"{REMEDIES.get(error.errno or 0, 'Check it')}",
                code,
            )
        fail(error.strerror if isinstance(error, OSError) and error.strerror else error, code)
    except MemoryError as error:
        fail(f"out of memory ({one_line(error) or 'malloc failed'}). Reduce the size, or free some memory", 1)


def _function_of(verb: Verb) -> Any:
    return getattr(importlib.import_module(f"halfstep.cli.{verb.module}"), verb.function)


def _call_heavy(verb: Verb, rest: Sequence[str]) -> None:
    """Call a verb that needs torch and diffusers."""
    # diffusers imports these optional libraries, which print irrelevant warnings.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    keep_freed_memory()
    from halfstep.core.warnings import HalfstepWarning
    from halfstep.runtime.failures import NonFinite, OutOfMemory
    from halfstep.runtime.processes import FailedElsewhere, LostProcess
    from halfstep.runtime.stop import Interrupted

    function = _function_of(verb)
    with warnings.catch_warnings():
        warnings.showwarning = _warning_printer()
        warnings.simplefilter("always", HalfstepWarning)
        try:
            function(rest)
        except Interrupted as stopped:
            if not rank():
                text = f"{stopped}; the state is saved. Run the same command again to resume"
                print(f"\nhalfstep: {text}", file=sys.stderr)
            raise SystemExit(stopped.code) from None
        except FailedElsewhere as error:
            # Rank 0 reports for all ranks.
            if not rank():
                fail(error, error.code)
            raise SystemExit(error.code) from None
        except (NonFinite, OutOfMemory, LostProcess) as error:
            fail(error, code=1)
