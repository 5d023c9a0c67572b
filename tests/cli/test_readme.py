"""The README's Python example runs as printed."""

import re
from pathlib import Path

import torch
from torch import nn

from halfstep.cli import main
from toys import TINY_DIGITS

README = Path(__file__).parents[2] / "README.md"


class Toy(nn.Module):
    """A network of a few weights, for `my_network`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(torch.cat([x_t, time[:, None]], dim=1))
        return output


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    main(["run", "digits", "--out", str(run), *TINY_DIGITS])
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    code = found[1].replace("runs/digits", str(run)).replace("num_updates=2000", "num_updates=3")
    names = {"my_network": Toy(), "my_data": torch.randn(64, 2), "x_t": torch.randn(5, 2)}
    exec(compile(code, str(README), "exec"), names)
    assert tuple(names["images"].shape) == (64, 1, 8, 8)
    assert tuple(names["x0"].shape) == (16, 2)
    assert tuple(names["target"].shape) == (5, 2)
