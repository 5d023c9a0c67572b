"""Draw docs/fashion.png from a measured run: one noise sample per column, the chain above the undistilled teacher.

python docs/chain_picture.py runs/fashion_mnist docs/fashion.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from halfstep.runs import RunFolder, StageFolder
from halfstep.runs.schema import Result

COLUMNS, LABEL, GAP = 16, 190, 14


def rows_of(run: RunFolder) -> tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]]:
    """Return (label, images) pairs for the chain, and for the undistilled teacher at the students' numbers of steps."""
    first, *others = run.stages()

    def images(stage: StageFolder, result: Result) -> np.ndarray:
        return np.load(stage.path / str(result.samples))["arr_0"]

    def results(stage: StageFolder) -> list[Result]:
        found = stage.metrics()
        return [] if found is None else found.results

    finest = max(results(first), key=lambda result: result.num_evals)
    chain = [(f"teacher, {finest.num_evals} calls", images(first, finest))]
    alone = []
    for stage in others:
        made = stage.manifest(verify=False)
        for result in results(stage):
            if made.num_steps is None or made.num_steps > 8:
                continue
            what = "finished" if made.objective == "finish" else "student"
            chain.append((f"{what}, {result.num_steps}", images(stage, result)))
            for other in results(first):
                if (other.sampler, other.num_steps) == ("ddim", result.num_steps) and what == "student":
                    alone.append((f"not distilled, {result.num_steps}", images(first, other)))
    return chain, alone


def main(run: Path, out: Path) -> None:
    """Draw the picture of `run` and save it as `out`."""
    chain, alone = rows_of(RunFolder(run))
    pixels = chain[0][1].shape[1]
    side = pixels * max(2, 40 // pixels)
    height = (len(chain) + len(alone)) * (side + 3) + GAP
    picture = Image.new("RGB", (LABEL + COLUMNS * (side + 3), height), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for group in (chain, alone):
        for label, images in group:
            draw.text((4, top + side // 2 - 8), label, fill="black", font_size=16)
            for column, image in enumerate(images[:COLUMNS]):
                tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
                picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (LABEL + column * (side + 3), top))
            top += side + 3
        top += GAP
    picture.save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
