"""Families by name: every member can be named, built and looked up again, and a typo gets a hint."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.noise import processes
from halfstep.core.prediction import predictions, weightings
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


def test_a_name_is_given_once_and_the_first_stays() -> None:
    family: Registry[int] = Registry("colour")
    assert family.register("red")(1) == 1
    with pytest.raises(ValueError, match="the colour 'red' is registered twice"):
        family.register("red")(2)
    family.register("blue")(3)
    assert list(family.items()) == [("red", 1), ("blue", 3)]
