"""Stress a run with kills, signals, damaged files, full disks and killed ranks, and check that nothing is lost.

python benchmarks/torture.py            50 SIGKILLs, 10 SIGTERMs, 10 damaged checkpoints, 3 full disks, 5 killed ranks
python benchmarks/torture.py --short    a fifth of them

--seed N repeats the same faults, except for differences in timing.

The chain and the faults are those of the tests (tests/torture.py). The chain trains a teacher, two students and their
finishes on points in the plane, saves a checkpoint at every third update, and measures each stage. Every fault occurs
at a random moment. The weights and metrics of a completed run must be bit-for-bit identical to those of an
uninterrupted run with the same number of processes. The run must not leave checkpoint files behind, and each fault must
have stopped the run with the right exit code. The first failure ends the test with an error. Finally, the script
measures how much the memory grows in a stage with 2,060 updates and 206 checkpoints.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

TESTS: Final = Path(__file__).parent.parent / "tests"
BLOWS: Final = {"sigkill": 50, "sigterm": 10, "damage": 10, "full_disk": 3, "killed_rank": 5}


def main() -> None:
    """Run the faults, print the result and write it."""
    # This file's folder would precede the standard library on the path, and contains modules with the same names.
    sys.path[0] = str(TESTS)
    import teams
    import torture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="inject only a fifth of the faults, and write no file")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    counts = {kind: -(-count // 5) for kind, count in BLOWS.items()} if options.short else BLOWS
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ordeal = torture.Ordeal(Path(folder), seed=options.seed)
        ordeal.deal(counts)
        told = Path(folder) / "growth.json"
        process = teams.context().Process(target=torture.write_growth, args=(f"{folder}/growth", str(told)))
        process.start()
        process.join()
        growth = json.loads(told.read_text())
    from halfstep.runtime.environment import environment

    result: dict[str, Any] = {
        "what": "faults at random moments in a chain with finishes; all runs end with the weights of a fault-free run",
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "environment": environment(),
        "seed": options.seed,
        "asked": counts,
        "dealt": dict(ordeal.dealt),
        "met": dict(ordeal.where),
        "runs_compared_with_the_uncut_one": ordeal.finished,
        "seconds_of_a_run": round(ordeal.duration, 2),
        "longest_seconds_from_sigterm_to_end": round(ordeal.slowest_stop, 2),
        "longest_seconds_from_a_killed_rank_to_the_end_of_the_other": round(ordeal.slowest_loss, 2),
        "growth_over_2000_updates_after_the_first_50": growth,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(result, indent=1))
    if not options.short:
        (TESTS.parent / "docs" / "results" / "torture.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
