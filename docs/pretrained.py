"""Add a student to the package, with float16 weights: python docs/pretrained.py STAGE NAME DATA

STAGE is the folder of a stage, such as runs/fashion_mnist/stages/08-finish-0001. `halfstep.load(NAME)` then loads it.
DATA describes the training data in words. The model card, README.md in the student's folder, is written by hand.
"""

import argparse
from pathlib import Path

import halfstep
from halfstep.models.folder import PRETRAINED, save_stage
from halfstep.runs import Manifest, StageFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("name")
    parser.add_argument("data")
    options = parser.parse_args()
    model = halfstep.load(options.stage)
    out = PRETRAINED / options.name
    # The package contains neither the run's other stages nor its files.
    lineage = {"run": None, "parent": None, "teacher": None, "data": options.data, "stage": options.name}
    manifest: Manifest = model.manifest.model_copy(update=lineage)
    save_stage(StageFolder(out), model.denoiser.half(), manifest)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
