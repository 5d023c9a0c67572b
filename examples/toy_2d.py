"""Train a teacher on two moons in the plane, distil it to 4 steps, and compare samples of both from the same noise.

python examples/toy_2d.py
"""

import math

import torch
from torch import Tensor

import halfstep
from halfstep.nets import MLP


def moons(number: int, seed: int) -> Tensor:
    """Return points `[number, 2]` on two half circles."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(number, generator=generator)
    side = torch.arange(number) % 2
    x = torch.stack([torch.cos(angle) + side - 0.5, (1 - 2 * side) * torch.sin(angle) + 0.5 * side - 0.25], dim=1)
    return 0.6 * x + 0.03 * torch.randn(number, 2, generator=generator)


def train_teacher(points: Tensor, updates: int) -> halfstep.NetworkDenoiser:
    """Train the teacher in a plain loop that uses the library's loss."""
    torch.manual_seed(0)
    teacher = halfstep.NetworkDenoiser(MLP((2,), width=96, depth=3), halfstep.VPCosine(), halfstep.V())
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    for update in range(updates):
        draw = halfstep.Draw(seed=0, stream="teacher", update=update, batch_size=256, places=range(256))
        batch = halfstep.Batch(points[draw.order(len(points))])
        halfstep.Denoising().loss(halfstep.Models(teacher), batch, draw).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return teacher


def main(teacher_updates: int = 3000, student_updates: int = 1000) -> tuple[float, float]:
    """Return the RMSE from the 64-step teacher's samples for the student and the teacher, both with 4 steps."""
    points = moons(4096, seed=0)
    teacher = train_teacher(points, teacher_updates)
    student = halfstep.distill(teacher, points, to=4, start=64, training=halfstep.Training(student_updates, 1e-3, 256))
    noise = halfstep.sample_noise(range(1000), (2,))
    slow = halfstep.sample(teacher, noise, 64)
    distances = [float((halfstep.sample(m, noise, 4) - slow).square().mean().sqrt()) for m in (student, teacher)]
    print(f"RMSE to the teacher at 64 steps: student at 4 {distances[0]:.3f}, teacher at 4 {distances[1]:.3f}")
    return distances[0], distances[1]


if __name__ == "__main__":
    main()
