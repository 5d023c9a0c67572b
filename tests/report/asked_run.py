"""Runs with models that can be sampled: networks with random weights, a teacher and its students, and gaps."""

from pathlib import Path

import torch

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import V
from halfstep.models.folder import save_stage
from halfstep.nets import MLP, Network, describe_network
from halfstep.recipes import UNetConfig
from halfstep.runs import Manifest, Outcome, RunFolder
from halfstep.runtime.files import write_sealed

STAGES = (("00-denoise", None), ("01-halve-0004", 4), ("02-halve-0002", 2), ("03-halve-0001", 1))
NUM_CLASSES = 3


def image_network(seed: int) -> Network:
    """Return a tiny network for 8x8 grey images of three classes in which every weight matters."""
    torch.manual_seed(seed)
    config = UNetConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention=(False, False),
        mid_attention=False,
        norm_num_groups=4,
    )
    network = config.build((1, 8, 8), NUM_CLASSES, 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def write_asked_run(run: Path, points: bool = False, trained: int = 3) -> Path:
    """Write the first `trained` of `STAGES`; the plan contains all of them."""
    for index, (name, num_steps) in enumerate(STAGES[:trained]):
        torch.manual_seed(index)
        network = MLP((2,), width=16, depth=1) if points else image_network(index)
        manifest = Manifest(
            stage=name,
            objective="halve" if index else "denoise",
            parent=STAGES[index - 1][0] if index else None,
            outcome=Outcome(role="student" if index else "teacher", num_steps=num_steps),
            start_steps=8,
            num_updates=1,
            seconds=1.0,
            shape=(2,) if points else (1, 8, 8),
            num_classes=0 if points else NUM_CLASSES,
            is_image=not points,
            clip=not points,
            network=describe_network(network),
            process=processes.describe(VPCosine()),
            prediction={"type": "v"},
            files={},
        )
        save_stage(RunFolder(run).stage(name), NetworkDenoiser(network, VPCosine(), V()), manifest)
    plan = [
        {"stage": name, "role": "student" if steps else "teacher", "num_steps": steps, "num_updates": 1}
        for name, steps in STAGES
    ]
    write_sealed(run / "recipe.json", {"recipe": {"name": "asked"}, "plan": plan, "environment": {}})
    return run
