"""Students packaged with halfstep, by name: stage folders in `halfstep/pretrained`, with float16 weights."""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent.parent / "pretrained"


def pretrained() -> dict[str, Path]:
    """Return the folder of each packaged student, by name."""
    return {found.parent.name: found.parent for found in sorted(FOLDER.glob("*/manifest.json"))}


def model_path(path: str | Path) -> Path:
    """Return `path` if it exists, otherwise the folder of the packaged student with that name, otherwise `path`."""
    path = Path(path)
    return path if path.exists() else pretrained().get(str(path), path)
