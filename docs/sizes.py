"""Write the memory table in docs/pages/pipelines.md from the estimates of `halfstep distill NAME --dry-run`.

python docs/sizes.py
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from halfstep.cli import main
from halfstep.cli.dry_run import DEVICES
from halfstep.hub import PUBLISHED

PAGE = Path(__file__).parent / "pages" / "pipelines.md"
LORA = ["--chain.lora-rank", "16"]
ROWS = {
    "whole, float32": [],
    "LoRA over float32": LORA,
    **{f"LoRA over {name}": [*LORA, "--base-precision", name] for name in ("bf16", "int8", "nf4")},
}
"""The options for each kind of student."""


def counted(name: str, words: list[str]) -> dict[str, Any]:
    """Return the JSON of a dry run with micro batches of one sample and gradient checkpointing."""
    common = ["--to", "64", "--engine.micro-batch", "1", "--engine.gradient-checkpointing", "--evaluation.no-enabled"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["distill", name, *common, *words, "--dry-run", "--json"])
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def table() -> str:
    """Return the table of all published sizes."""
    lines = [
        "| network | student | weights | gradients, moments, teacher | activations | GiB | fits (GiB) |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, held in PUBLISHED.items():
        for student, words in ROWS.items():
            facts = counted(name, words)
            memory = {part: size / 2**30 for part, size in facts["memory_bytes"].items()}
            total, weights, activations = sum(memory.values()), memory["weights"], memory["activations"]
            fits = ", ".join(map(str, facts["fits_gib"])) or f"more than {DEVICES[-1]}"
            numbers = (weights, total - weights - activations, activations, total)
            cells = " | ".join(f"{number:,.1f}" for number in numbers)
            lines.append(f"| `{name}` ({held.title}) | {student} | {cells} | {fits} |")
    return "\n".join(lines)


if __name__ == "__main__":
    marks = r"(<!-- sizes -->\n).*?(\n<!-- end of sizes -->)"
    PAGE.write_text(re.sub(marks, lambda found: found[1] + table() + found[2], PAGE.read_text(), flags=re.DOTALL))
