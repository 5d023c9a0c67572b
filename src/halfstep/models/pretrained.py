"""Students that come with the package, by name: folders of a stage in `halfstep/pretrained`, weights as float16."""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent.parent / "pretrained"


def pretrained() -> dict[str, Path]:
    """Return the folder of each packaged student by its name."""
    return {found.parent.name: found.parent for found in sorted(FOLDER.glob("*/manifest.json"))}


def model_path(path: str | Path) -> Path:
    """Return `path` if it exists, else the folder of the packaged student that it names, else `path`."""
    path = Path(path)
    return path if path.exists() else pretrained().get(str(path), path)
