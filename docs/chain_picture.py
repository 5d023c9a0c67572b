"""Draws docs/chain.png from a measured run: one noise a column, the chain above, the undistilled teacher below.

python docs/chain_picture.py runs/digits docs/chain.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from halfstep.runs import RunFolder

COLUMNS, SCALE, LABEL, GAP = 16, 5, 190, 14


def rows_of(run: RunFolder) -> tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]]:
    """(label, images) of the chain, and of the teacher alone at the students' numbers of steps."""
    chain, alone = [], []
    stages = run.stages()
    teacher = {int(file.stem.rpartition("-")[2]): file for file in stages[0].samples.glob("steps-*.npz")}
    start = max(teacher)
    chain.append((f"teacher, {start} steps", np.load(teacher[start])["arr_0"]))
    for stage in stages[1:]:
        steps = stage.manifest(verify=False).num_steps
        if steps is None or steps > 8:
            continue
        chain.append((f"student, {steps}", np.load(stage.samples / f"steps-{steps:04d}.npz")["arr_0"]))
        if steps in teacher:
            alone.append((f"not distilled, {steps}", np.load(teacher[steps])["arr_0"]))
    return chain, alone


def main(run: Path, out: Path) -> None:
    """Writes the picture."""
    chain, alone = rows_of(RunFolder(run))
    side = chain[0][1].shape[1] * SCALE
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
