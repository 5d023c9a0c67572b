"""Distil a teacher that predicts the flow-matching velocity, without changing its prediction or process.

python examples/flow_matching_teacher.py
"""

import torch

import halfstep
from halfstep.nets import MLP


def rings(number: int, seed: int) -> torch.Tensor:
    """Return points `[number, 2]` on two circles."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(number, generator=generator)
    radius = 0.4 + 0.5 * (torch.arange(number) % 2)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


def main(teacher_updates: int = 3000, student_updates: int = 1000, shift: float = 2.0) -> tuple[float, float]:
    """Return the RMSE from the 64-step teacher's samples for the student and the teacher, both with 4 steps."""
    torch.manual_seed(0)
    points = rings(4096, seed=0)
    # x_t = (1 - s) x0 + s eps, where s = shift t / (1 + (shift - 1) t). The network predicts eps - x0.
    process, velocity = halfstep.FlowMatching(shift), halfstep.FlowVelocity()
    teacher = halfstep.NetworkDenoiser(MLP((2,), width=96, depth=3), process, velocity)
    training = halfstep.Training(teacher_updates, 3e-3, 256, warmup_updates=teacher_updates // 20, ema_decay=0.995)
    halfstep.fit(teacher, points, training)
    student = halfstep.distill(teacher, points, to=4, start=64, training=halfstep.Training(student_updates, 1e-3, 256))
    assert (student.process, student.prediction) == (process, velocity)
    noise = halfstep.sample_noise(range(1000), (2,))
    slow = halfstep.sample(teacher, noise, 64)
    distances = [float((halfstep.sample(m, noise, 4) - slow).square().mean().sqrt()) for m in (student, teacher)]
    print(f"RMSE to the teacher at 64 steps: student at 4 {distances[0]:.3f}, teacher at 4 {distances[1]:.3f}")
    return distances[0], distances[1]


if __name__ == "__main__":
    main()
