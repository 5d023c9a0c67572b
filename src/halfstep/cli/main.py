"""Dispatches verbs, reports every error on one line, and exits with one of `verbs.EXIT_CODES`."""

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
from halfstep.runtime.files import first_line
from halfstep.runtime.launch import check_launch, rank, recorded_command, world_size
from halfstep.runtime.storage import FULL, GONE, exit_code
from halfstep.runtime.terminal import Output, one_line, safe_outputs, warn

LESS_MEMORY: Final = "Use a smaller batch, or free some memory"
"""The advice for a command that ran out of memory."""
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

    Usually, all ranks fail with the same error, and rank 0 reports it. Any other rank waits a few seconds for the
    launcher to kill it. If the launcher does not, the error occurred only on that rank, which then reports it.
    """
    text = one_line(message)
    if number := rank():
        from halfstep.runtime.processes import wait_to_be_ended

        # When one process fails, the launcher kills all other processes within a few seconds.
        wait_to_be_ended(4.0, code)
        text = f"(process {number}) {text}"
    print(f"halfstep: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _warning_printer() -> Callable[..., None]:
    """Return a function that prints each halfstep warning only once, even if sampling repeats the warning."""
    from halfstep.core.warnings import HalfstepWarning

    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, HalfstepWarning) and str(message) not in said and not rank():
            said.add(str(message))
            warn(message)

    return show


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Exit a process that has nothing to save. Without this handler, PID 1 in a container would ignore the signal."""
    # If the signal interrupts a print call, the one below raises RuntimeError.
    with contextlib.suppress(RuntimeError):
        print(f"\nhalfstep: stopped by {signal.Signals(number).name}", file=sys.stderr)
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `halfstep` command.

    Raises:
        SystemExit: with one of `verbs.EXIT_CODES`.
    """
    threading.excepthook = _thread_failed
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with safe_outputs() as out, recorded_command(arguments):
            try:
                _main(arguments)
            except SystemExit as end:
                if not end.code:
                    _check_written(out)
                raise
            _check_written(out)
    except SystemExit as end:
        if argv is None and isinstance(end.code, int) and end.code > 128:
            # At this point, everything is saved and printed. A normal exit would spend seconds unloading modules.
            os._exit(end.code)
        raise


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of an error in a thread, except for an OSError: the main thread reports lost disks."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _check_written(out: Output) -> None:
    """Fail if output to stdout was lost, unless the reading program (such as head or less) closed the pipe."""
    out.flush()
    if out.error is not None and out.error.errno != errno.EPIPE:
        fail(f"cannot write to stdout ({out.error.strerror}). The output is lost, but everything else is done")


def _main(arguments: list[str]) -> None:
    # Slow imports come last, because help and usage errors must appear quickly.
    if arguments[:1] == ["help"] and arguments[1:] and arguments[1] in VERBS:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"halfstep {version('halfstep')}")
        raise SystemExit(0)

    if sys.platform == "win32":
        # It lacks signals, and folders cannot be synced there.
        fail("halfstep needs Linux or macOS. On Windows, use WSL")
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
    """Run the verb in one of several processes."""
    if verb.name not in ("run", "train", "distill", "finish", "encode", "sample", "evaluate", "demo"):
        fail(f"halfstep {verb.name} runs in a single process. Start it without torchrun or accelerate launch")
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
        print(f"\nhalfstep: stopped immediately{safe}", file=sys.stderr)
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
        fail(f"out of memory ({one_line(error) or 'malloc failed'}). {LESS_MEMORY}", 1)


def _function_of(verb: Verb) -> Any:
    return getattr(importlib.import_module(f"halfstep.cli.{verb.module}"), verb.function)


def _call_heavy(verb: Verb, rest: Sequence[str]) -> None:
    """Call a verb that needs torch and diffusers."""
    # diffusers imports these optional libraries, which print irrelevant warnings.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    keep_freed_memory()
    from halfstep.core.warnings import HalfstepWarning
    from halfstep.runtime.failures import NonFinite, OutOfMemory, is_out_of_memory
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
            # Rank 0 reports the error for all ranks.
            if not rank():
                fail(error, error.code)
            raise SystemExit(error.code) from None
        except (NonFinite, OutOfMemory, LostProcess) as error:
            fail(error, code=1)
        except Exception as error:
            # cuDNN also reports NOT_SUPPORTED for reasons other than the size of a batch.
            if not is_out_of_memory(error) or "NOT_SUPPORTED" in str(error) or os.environ.get("HALFSTEP_TRACEBACK"):
                raise
            fail(f"out of memory ({first_line(error)}). {LESS_MEMORY}", code=1)
