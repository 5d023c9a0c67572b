"""Progressive distillation: diffusion models that sample in four steps instead of hundreds.

    import halfstep

    model = halfstep.load("runs/digits")           # the last student of a run
    x0 = model.sample(seeds=range(64))             # [64, 1, 8, 8] in [-1, 1]

    teacher = halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())
    student = halfstep.distill(teacher, data, start=64, to=4)
    x0 = halfstep.sample(student, noise)           # in the student's 4 steps
    halfstep.save(student, "my-student")           # for halfstep.load and the command line

| to | use |
|---|---|
| train, distil | `fit` and `distill`, which return a `Model`; options: `Training`, `Plan`, `Engine`, `Evaluation` |
| sample | `Model.sample(seeds)`, `sample(model, noise)`, `trajectory`; samplers `DDIM`, `Heun`, `Ancestral`, ... |
| save, load | `load`, `save`, `Model.of` |
| wrap a network | `NetworkDenoiser` with a process (`VPCosine`, `VPTable`) and a prediction (`V`, `Eps`) |
| implement a new method | `Objective`, `Sampler`, `Denoiser`, `halving_target` |

Each name is documented where it is defined. CONTRIBUTING.md describes the packages. The names are listed in
__init__.pyi and imported on first use, so `halfstep status` does not have to import torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
