"""Distil a network that has its own clock and output. The example uses EDM's preconditioning and noise levels.

python examples/own_network.py
"""

from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import halfstep

SIGMA_DATA = 0.5


class MyNetwork(nn.Module):
    """A network that scales its input and computes log(sigma) / 4, as in EDM. halfstep only passes x_t and t."""

    def __init__(self, process: halfstep.VE, width: int = 128) -> None:
        super().__init__()
        self.process = process
        inner = [layer for _ in range(3) for layer in (nn.LazyLinear(width), nn.SiLU())]
        self.layers = nn.Sequential(*inner, nn.LazyLinear(2))
        self(torch.zeros(1, 2), torch.ones(1))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Return the raw residual F `[batch, 2]`."""
        sigma = self.process.alpha_sigma(time)[1][:, None]
        scaled, noise = x_t / torch.sqrt(sigma**2 + SIGMA_DATA**2), sigma.log() / 4
        return self.layers(torch.cat([scaled, noise, noise.sin()], dim=1))


class Spiral:
    """Batches of points. The library restarts the iteration at the end of the data."""

    def __iter__(self) -> Iterator[Tensor]:
        turn = torch.rand(4096, generator=torch.Generator().manual_seed(0)).sqrt() * 9
        yield from (0.1 * turn[:, None] * torch.stack([turn.cos(), turn.sin()], dim=1)).split(256)


def main(teacher_updates: int = 4000, student_updates: int = 1000, out: str = "own.safetensors") -> tuple[float, float]:
    """Return the RMSE from the 64-step teacher's samples for the student and the teacher, both with 4 steps."""
    torch.manual_seed(0)
    process = halfstep.VE(sigma_min=0.01, sigma_max=20.0)
    teacher = halfstep.NetworkDenoiser(MyNetwork(process), process, halfstep.EDM(SIGMA_DATA))
    training = halfstep.Training(teacher_updates, 2e-3, 256, warmup_updates=teacher_updates // 20, ema_decay=0.995)
    halfstep.fit(teacher, Spiral(), training)
    student = halfstep.distill(teacher, Spiral(), to=4, start=64, training=halfstep.Training(student_updates, 1e-3))
    save_file(student.network.state_dict(), out)
    noise = process.start_scale * halfstep.sample_noise(range(1000), (2,))
    slow = halfstep.sample(teacher, noise, 64)
    distances = [float((halfstep.sample(m, noise, 4) - slow).square().mean().sqrt()) for m in (student, teacher)]
    print(f"RMSE to the teacher at 64 steps: student at 4 {distances[0]:.3f}, teacher at 4 {distances[1]:.3f}")
    return distances[0], distances[1]


if __name__ == "__main__":
    main()
