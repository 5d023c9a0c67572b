"""Progressive distillation: diffusion models that sample in four steps instead of hundreds.

    import halfstep

    model = halfstep.load("runs/digits")           # the last student of a run
    x0 = model.sample(seeds=range(64))             # [64, 1, 8, 8] in [-1, 1]

Everything below is documented where it is defined; CONTRIBUTING.md draws the map of the rooms.
The names are in __init__.pyi, and each is imported when it is first used: so `halfstep status` need not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
