"""Class-conditional digits: guidance is baked into a student with 4 steps and one network call per step.

python examples/class_conditional_guidance.py
"""

from collections.abc import Iterator

import torch

import halfstep
from halfstep.nets import UNet2D, unet2d_config

NONE, SCALE = 10, 3.0  # the null class, after the last class; the guidance scale


def make_teacher() -> halfstep.NetworkDenoiser:
    """Return an untrained denoiser (a U-Net) for 8x8 images with 10 classes and a null class."""
    torch.manual_seed(0)
    shape = {"size": (8, 8), "in_channels": 1, "out_channels": 1, "num_classes": NONE + 1}
    levels = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention": (False, False)}
    config = unet2d_config(**shape, **levels, attention_head_dim=8, mid_attention=False, norm_num_groups=8)
    return halfstep.NetworkDenoiser(UNet2D(config), halfstep.VPCosine(), halfstep.V())


class Digits:
    """Batches of images and classes, with some of the classes dropped. Each iteration is a new epoch."""

    def __init__(self, drop: float, seed: int) -> None:
        self.data, self.drop = halfstep.open_data(halfstep.DataConfig(source="digits")), drop
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        for rows in torch.randperm(len(self.data), generator=self.generator).split(128):
            x0, cond = self.data.fetch(rows)
            dropped = torch.rand(len(rows), generator=self.generator) < self.drop
            yield x0, {"class_labels": torch.where(dropped, NONE, cond["class_labels"])}


def main(teacher_updates: int = 1500, student_updates: int = 600, start: int = 32) -> tuple[float, float]:
    """Return the RMSE from the guided teacher's `start`-step samples for the student and this teacher at 4 steps."""
    teacher = make_teacher()
    training = halfstep.Training(teacher_updates, 2e-3, warmup_updates=teacher_updates // 20, ema_decay=0.995)
    halfstep.fit(teacher, Digits(drop=0.2, seed=0), training)
    null = {"class_labels": torch.tensor(NONE)}
    student = halfstep.distill(
        teacher, Digits(drop=0.0, seed=1), to=4, start=start, guidance=halfstep.FixedGuidance(SCALE), null=null,
        training=halfstep.Training(student_updates, 1e-3), matching=halfstep.Training(2 * student_updates, 1e-3),
    )  # fmt: skip
    guided = halfstep.Clipped(halfstep.Guided(teacher, null, SCALE))  # two calls per step
    noise, cond = halfstep.sample_noise(range(100), (1, 8, 8)), {"class_labels": torch.arange(100) % 10}
    slow = halfstep.sample(guided, noise, start, cond=cond)
    fast, coarse = (halfstep.sample(m, noise, 4, cond=cond) for m in (halfstep.Clipped(student), guided))
    distances = [float((x - slow).square().mean().sqrt()) for x in (fast, coarse)]
    print(f"RMSE to {start} steps: student (4 calls) {distances[0]:.3f}, teacher (8 calls) {distances[1]:.3f}")
    return distances[0], distances[1]


if __name__ == "__main__":
    main()
