"""Distil a Fashion-MNIST DDPM from another project, with that project's network, from 1,000 steps to 8, 4 and 1.

python examples/someone_elses_teacher.py ddpm_fashion.safetensors fashion-mnist/
"""

import sys
from collections import OrderedDict
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halfstep
from halfstep.metrics import frechet_distance, rmse, train_classifier


def block(a: int, b: int, side: int) -> nn.Module:
    first = {"ln": nn.LayerNorm((a, side, side)), "conv1": nn.Conv2d(a, b, 3, 1, 1), "act1": nn.SiLU()}
    return nn.Sequential(OrderedDict(first | {"conv2": nn.Conv2d(b, b, 3, 1, 1), "act2": nn.SiLU()}))


class Theirs(nn.Module):
    """The eps-prediction network of the other project, with the original names and the integer clock 0 ... 999."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        conv, up, self.time_embed = nn.Conv2d, nn.ConvTranspose2d, nn.Embedding(1000, 100).requires_grad_(False)
        down = {"1": (28, 1, 10, 10, 10), "2": (14, 10, 20, 20, 20), "3": (7, 20, 40, 40, 40)}
        back = {"_mid": (3, 40, 20, 20, 40), "4": (7, 80, 40, 20, 20), "5": (14, 40, 20, 10, 10)}
        for name, (side, *w) in (down | back | {"_out": (28, 20, 10, 10, 10)}).items():
            self.add_module("b" + name, nn.Sequential(*(block(a, b, side) for a, b in pairwise(w))))
            self.add_module("te" + name, nn.Sequential(nn.Linear(100, w[0]), nn.SiLU(), nn.Linear(w[0], w[0])))
        self.b_out[2].ln = nn.Identity()  # the weights of this layer were never used
        self.down1, self.down2 = conv(10, 10, 4, 2, 1), conv(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(conv(40, 40, 2), nn.SiLU(), conv(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(up(40, 40, 4, 2, 1), nn.SiLU(), up(40, 40, 2))
        self.up2, self.up3, self.conv_out = up(20, 20, 4, 2, 1), up(10, 10, 4, 2, 1), conv(10, 1, 3, 1, 1)
        self.load_state_dict({k.removeprefix("network."): v for k, v in load_file(weights).items()}, strict=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        embedded = self.time_embed((1000 * time).round().long().clamp(min=1) - 1)  # level k is at time (k + 1) / 1000
        te = {n: getattr(self, "te" + n)(embedded)[:, :, None, None] for n in ("1", "2", "3", "_mid", "4", "5", "_out")}
        h1 = self.b1(x + te["1"])
        h2 = self.b2(self.down1(h1) + te["2"])
        h3 = self.b3(self.down2(h2) + te["3"])
        h = self.up1(self.b_mid(self.down3(h3) + te["_mid"]))
        h = self.up2(self.b4(torch.cat([h3, h], 1) + te["4"]))
        h = self.up3(self.b5(torch.cat([h2, h], 1) + te["5"]))
        return self.conv_out(self.b_out(torch.cat([h1, h], 1) + te["_out"]))


def students(teacher: halfstep.Denoiser, data: halfstep.Data, updates: int, batch: int) -> dict[str, halfstep.Denoiser]:
    """Return students with 8, 4 and 1 steps that predict v on a cosine clock within the noise levels of the table."""
    training = halfstep.Training(updates, 5e-4, batch, warmup_updates=updates // 10, ema_decay=0.98)
    clock, heun = halfstep.VPCosine(log_snr_min=-10.0, log_snr_max=9.2), halfstep.Heun()
    eight = halfstep.distill(teacher, data, to=8, start=16, training=training, process=clock, teacher_sampler=heun)
    four = halfstep.distill(eight, data, to=4, start=8, training=training)
    one = halfstep.distill(four, data, plan=halfstep.Plan.halvings(4, 1, training, factor=4))
    return {f"student, {steps}": student for steps, student in ((8, eight), (4, four), (1, one))}


def main(weights: str, images: str, updates: int = 400, batch: int = 16, number: int = 500) -> dict[str, float]:
    """Return the distances from the data. Also print the RMSE to the 50-step teacher's samples from the same noise."""
    data, labelled = (halfstep.open_data(halfstep.DataConfig(source=images, labels=kept)) for kept in (False, True))
    teacher = halfstep.Clipped(halfstep.NetworkDenoiser(Theirs(weights), halfstep.VPTable(), halfstep.Eps()))
    models = {"teacher, 50": teacher, "teacher, 8": teacher} | students(teacher, data, updates, batch)
    real, cond = labelled.fetch(torch.arange(min(len(data), 10_000)))
    features = train_classifier(real, cond["class_labels"], labelled.num_classes, "classifier").features
    noise, found, made = halfstep.sample_noise(range(number), data.shape), {}, []
    for name, model in models.items():
        made.append(halfstep.sample(model, noise, int(name.split()[1])))
        found[name] = frechet_distance(features(real), features(made[-1]))
        print(f"{name} steps: Frechet distance {found[name]:.2f}, RMSE {rmse(made[-1], made[0]):.3f}", flush=True)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
