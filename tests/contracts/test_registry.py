"""Families by name: every member can be named, built and looked up again, and a typo gets a hint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep import registry as registry_module
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import SNR, Constant, LinearPrediction, Weighting, predictions, weightings
from halfstep.models.folder import load, save
from halfstep.models.model import Model
from halfstep.nets import MLP
from halfstep.objectives import objectives
from halfstep.registry import Registry, nearest
from halfstep.samplers import samplers
from support import build

FAMILIES: list[Registry[Any]] = [processes, predictions, weightings, samplers, objectives]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family.replace(" ", "_"))


@every_family
def test_a_member_is_found_by_its_name_and_its_name_by_class_and_by_instance(family: Registry[Any]) -> None:
    assert len(list(family)) >= 1
    for name, member in family.items():
        assert family[name] is member
        assert family.name_of(member) == name
        assert family.name_of(build(member)) == name


@every_family
def test_members_are_values_that_compare_by_their_arguments_and_cannot_be_changed(family: Registry[Any]) -> None:
    for _, member in family.items():
        assert build(member) == build(member)
        with pytest.raises(AttributeError):
            build(member).anything = 1


@every_family
@given(data=st.data())
def test_a_mistyped_name_gets_the_nearest_and_all_others(family: Registry[Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in family if len(name) > 3] or list(family)))
    place = data.draw(st.integers(1, len(name) - 1))
    slip = name[:place] + "_" + name[place:]
    with pytest.raises(ValueError, match="unknown") as error:
        family[slip]
    message = str(error.value)
    assert f"unknown {family.family} {slip!r}" in message
    assert f"did you mean {name!r}" in message
    assert all(known in message for known in family)


def test_an_unrecognisable_name_gets_the_list_without_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown sampler 'qqqq' \(known: ancestral, ddim, "):
        samplers["qqqq"]
    assert nearest("qqqq", list(samplers)) == ""


def test_unregistered_classes_have_no_name() -> None:
    with pytest.raises(ValueError, match="3 is not a registered prediction"):
        predictions.name_of(3)


@dataclass(frozen=True)
class Mixed(LinearPrediction):
    """A prediction with settings in tuples."""

    shares: tuple[float, ...] = (1.0, 0.5)
    nested: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
    weightings: tuple[Weighting, ...] = (SNR(), Constant())

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -self.shares[0] * sigma, self.shares[1] * alpha


@dataclass(frozen=True)
class Named:
    """Settings in a dict."""

    bounds: dict[str, tuple[float, Weighting]]


def test_a_description_survives_json_with_tuples_and_members_in_them(tmp_path: Path) -> None:
    predictions.register("mixed")(Mixed)
    family: Registry[Any] = Registry("named thing")
    family.register("named")(Named)
    try:
        for registry, member in ((predictions, Mixed(shares=(0.5, 2.0))), (family, Named({"x0": (1.0, SNR())}))):
            rebuilt = registry.rebuild(json.loads(json.dumps(registry.describe(member))))
            assert rebuilt == member
        own = MLP((2,), width=8, depth=1)
        model = Model.of(NetworkDenoiser(own, VPCosine(), Mixed(shares=(0.5, 2.0))), (2,))
        save(model, tmp_path / "saved")
        loaded = load(tmp_path / "saved")
        assert loaded.prediction == model.prediction
        assert hash(loaded.prediction) == hash(model.prediction)
        assert torch.equal(loaded.sample(range(3), 2), model.sample(range(3), 2))
    finally:
        del predictions["mixed"]
        registry_module._families.pop("named thing")


def test_a_name_is_given_once_and_the_first_stays() -> None:
    family: Registry[int] = Registry("colour")
    assert family.register("red")(1) == 1
    with pytest.raises(ValueError, match="the colour 'red' is registered twice"):
        family.register("red")(2)
    family.register("blue")(3)
    assert list(family.items()) == [("red", 1), ("blue", 3)]
