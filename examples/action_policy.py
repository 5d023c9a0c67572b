"""A policy for control loops, which plans 16 two-dimensional actions from an observation in 2 sampling steps.

python examples/action_policy.py
"""

import torch
from torch import Tensor

import halfstep
from halfstep.nets import MLP

HORIZON = 16


def demonstrations(number: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return paths `[number, 2, HORIZON]` that bend left or right, and their start and goal as the observation."""
    generator = torch.Generator().manual_seed(seed)
    ends = 0.4 * torch.randn(number, 2, 2, generator=generator).clamp(-2, 2)
    share = torch.linspace(0, 1, HORIZON)
    straight = ends[:, 0, :, None] * (1 - share) + ends[:, 1, :, None] * share
    side = torch.randint(2, (number, 1, 1), generator=generator) * 2.0 - 1
    along = ends[:, 1] - ends[:, 0]
    across = torch.stack([-along[:, 1], along[:, 0]], dim=1)[:, :, None]
    bend = 0.3 * side * across / across.norm(dim=1, keepdim=True).clamp(min=0.1) * torch.sin(torch.pi * share)
    return straight + bend, {"observation": ends.flatten(1)}


def batches(number: int = 8192, size: int = 256) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the demonstrations in batches. Any iterable of (x0, cond) is supported."""
    x0, cond = demonstrations(number, seed=0)
    return [(x0[i : i + size], {k: v[i : i + size] for k, v in cond.items()}) for i in range(0, number, size)]


def main(teacher_updates: int = 3000, student_updates: int = 1000) -> tuple[float, float]:
    """Return the RMSE from the 64-step teacher's samples for the student and the teacher, both with 2 steps."""
    torch.manual_seed(0)
    network = MLP((2, HORIZON), width=192, depth=3, cond_width=4)
    teacher = halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())
    data = batches()
    training = halfstep.Training(teacher_updates, 2e-3, 256, warmup_updates=teacher_updates // 20, ema_decay=0.995)
    halfstep.fit(teacher, data, training)
    student = halfstep.distill(teacher, data, to=2, start=16, training=halfstep.Training(student_updates, 1e-3))
    _, seen = demonstrations(500, seed=1)
    noise = halfstep.sample_noise(range(500), (2, HORIZON))
    goal = seen["observation"][:, 2:]
    misses = []
    for model in (student, teacher):
        plan = halfstep.sample(model, noise, 2, cond=seen)
        misses.append(float((plan[:, :, -1] - goal).norm(dim=1).mean()))
    slow = halfstep.sample(teacher, noise, 64, cond=seen)
    apart = [float((halfstep.sample(m, noise, 2, cond=seen) - slow).square().mean().sqrt()) for m in (student, teacher)]
    print(f"distance to the goal at 2 steps: student {misses[0]:.3f}, teacher {misses[1]:.3f}; "
          f"RMSE to the teacher's 64-step plans: student {apart[0]:.3f}, teacher {apart[1]:.3f}")  # fmt: skip
    return apart[0], apart[1]


if __name__ == "__main__":
    main()
