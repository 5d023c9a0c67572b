"""Write tests/slow_tests.txt: the tests that `make test` leaves to `make test-slow`, besides those marked slow.

The slowest run first (tests/conftest.py).

    pytest --durations=0 --durations-min=0.2 > durations.txt
    python tests/slow_tests.py durations.txt

writes tests/slow_tests.txt, with the seconds. Only the durations of a complete run show which of a test's parameters
are slow, so the list is data. A fast test takes less than `LIMIT` seconds, including setup, on two busy cores.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Final

LIMIT: Final = 3.0
FILE: Final = Path(__file__).with_suffix(".txt")
LINE: Final = re.compile(r"([\d.]+)s (?:call|setup|teardown) +(tests/\S.*)")


def slow_tests() -> dict[str, int]:
    """Return the seconds that each slow test takes, by node id."""
    lines = (line.split(" ", 1) for line in FILE.read_text(encoding="utf-8").splitlines())
    return {test: int(seconds) for seconds, test in lines}


def main(durations: Path) -> None:
    seconds: Counter[str] = Counter()
    for line in durations.read_text(encoding="utf-8").splitlines():
        if found := LINE.fullmatch(line.rstrip()):
            seconds[found[2]] += float(found[1])
    slow = sorted((test, taken) for test, taken in seconds.items() if taken >= LIMIT)
    FILE.write_text("".join(f"{taken:.0f} {test}\n" for test, taken in slow), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
