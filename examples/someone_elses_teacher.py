"""A DDPM of Fashion-MNIST that someone else trained, network and all: its 1,000 steps become 8, 4 and 1.

python examples/someone_elses_teacher.py ddpm_fashion.safetensors fashion-mnist/
"""

import sys
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

import halfstep
from halfstep.metrics import frechet_distance, train_classifier


class Block(nn.Module):
    def __init__(self, a: int, b: int, side: int) -> None:
        super().__init__()
        self.ln, self.conv1 = nn.LayerNorm((a, side, side)), nn.Conv2d(a, b, 3, 1, 1)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return silu(self.conv2(silu(self.conv1(self.ln(x)))))


class Theirs(nn.Module):
    """Their network, with their names and their clock, an integer 0 ... 999; it predicts eps."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        conv, up, self.time_embed = nn.Conv2d, nn.ConvTranspose2d, nn.Embedding(1000, 100).requires_grad_(False)
        down = {"1": (28, 1, 10, 10, 10), "2": (14, 10, 20, 20, 20), "3": (7, 20, 40, 40, 40)}
        back = {"_mid": (3, 40, 20, 20, 40), "4": (7, 80, 40, 20, 20), "5": (14, 40, 20, 10, 10)}
        for name, (side, *w) in (down | back | {"_out": (28, 20, 10, 10, 10)}).items():
            self.add_module("b" + name, nn.Sequential(*(Block(a, b, side) for a, b in pairwise(w))))
            self.add_module("te" + name, nn.Sequential(nn.Linear(100, w[0]), nn.SiLU(), nn.Linear(w[0], w[0])))
        self.b_out[2].ln = nn.Identity()  # its weights were never used
        self.down1, self.down2 = conv(10, 10, 4, 2, 1), conv(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(conv(40, 40, 2), nn.SiLU(), conv(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(up(40, 40, 4, 2, 1), nn.SiLU(), up(40, 40, 2))
        self.up2, self.up3, self.conv_out = up(20, 20, 4, 2, 1), up(10, 10, 4, 2, 1), conv(10, 1, 3, 1, 1)
        held = {name.removeprefix("network."): value for name, value in load_file(weights).items()}
        self.load_state_dict({name: held[name] for name in self.state_dict()})

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = (1000 * time).round().long().clamp(min=1) - 1  # a table's level k is at halfstep's time (k + 1) / 1000

        def at(name: str, h: Tensor) -> Tensor:
            shift = self.get_submodule("te" + name)(self.time_embed(level))
            return self.get_submodule("b" + name)(h + shift[:, :, None, None])

        h1 = at("1", x)
        h2 = at("2", self.down1(h1))
        h3 = at("3", self.down2(h2))
        h4 = at("4", torch.cat([h3, self.up1(at("_mid", self.down3(h3)))], 1))
        h5 = at("5", torch.cat([h2, self.up2(h4)], 1))
        return self.conv_out(at("_out", torch.cat([h1, self.up3(h5)], 1)))


def students(teacher: halfstep.Denoiser, data: halfstep.Data, updates: int, batch: int) -> dict[int, halfstep.Denoiser]:
    """By their steps; they predict v on the cosine clock, within the table's levels: no division by alpha is left."""
    training = halfstep.Training(updates, 3e-4, batch, warmup_updates=updates // 10, ema_decay=0.98)
    clock, heun = halfstep.VPCosine(log_snr_min=-10.0, log_snr_max=9.2), halfstep.Heun()
    eight = halfstep.distill(teacher, data, to=8, start=16, training=training, process=clock, teacher_sampler=heun)
    four = halfstep.distill(eight, data, to=4, start=8, training=training)
    one = halfstep.distill(four, data, plan=halfstep.Plan.halvings(4, 1, training, factor=4))
    return {8: eight, 4: four, 1: one}


def main(weights: str, images: str, updates: int = 300, batch: int = 32, number: int = 1000) -> dict[str, float]:
    """Distances from the data of the teacher and its students."""
    data = halfstep.open_data(halfstep.DataConfig(source=images))
    teacher = halfstep.Clipped(halfstep.NetworkDenoiser(Theirs(weights), halfstep.VPTable(), halfstep.Eps()))
    models = {("teacher", 50): teacher, ("teacher", 8): teacher}
    models |= {("student", n): student for n, student in students(teacher, data, updates, batch).items()}
    real, labels = data.fetch(torch.arange(min(len(data), 10_000)))
    features = train_classifier(real, labels["class_labels"], data.num_classes, "classifier").features
    noise, found = halfstep.sample_noise(range(number), data.shape), {}
    for (name, steps), model in models.items():
        x0 = halfstep.sample(model, noise, steps)
        found[f"{name}, {steps} steps"] = frechet_distance(features(real), features(x0))
        print(f"{name}, {steps} steps: {found[f'{name}, {steps} steps']:.2f} from the data", flush=True)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
