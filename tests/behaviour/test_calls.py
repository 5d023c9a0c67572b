"""Recorded calls whose arguments do not correspond to each other."""

from typing import Any

import pytest
import torch

from halfstep.hub.calls import Reading, conditions_in

ONE, TWO = torch.zeros(1, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "values",
    [
        (None, {"mask": TWO}, {"mask": TWO}),
        ({"mask": ONE}, {"mask": TWO}, None),
        (None, [1, 2], [1, 2]),
        ([1], (1, 1), (1, 1)),
        ([1, 2], [1, 2], None),
    ],
)
def test_an_argument_of_another_kind_is_refused(values: tuple[Any, Any, Any]) -> None:
    one, two, later = values
    kinds = [type(value).__name__ for value in values]
    with pytest.raises(ValueError, match=rf"the argument extra is a {kinds[0]} for one prompt, a {kinds[1]} for two"):
        Reading(torch.zeros(2, 4), None, False).node("", {"extra": one}, {"extra": two}, {"extra": later})


def test_texts_without_a_maximum_length_are_refused() -> None:
    """AudioLDM 2 pads a text to the longest of its batch, and its call has no max_sequence_length."""
    arguments = [
        {"encoder_hidden_states_1": torch.zeros(batch, length, 3)} for batch, length in ((1, 2), (2, 5), (2, 5))
    ]
    with pytest.raises(ValueError, match=r"the argument encoder_hidden_states_1 has no maximum length") as said:
        Reading(torch.zeros(2, 4), None, False).node("", *arguments)
    assert "--call max_sequence_length=N" in str(said.value)
    assert "halfstep.distill accepts any conditions" in str(said.value)
    call = Reading(torch.zeros(2, 4), 8, False).node("", *arguments)
    assert call["items"]["encoder_hidden_states_1"]["shape"] == [8, 3]


def test_an_omitted_mask_takes_its_length_from_the_other_conditions() -> None:
    """A pipeline may omit a mask that contains only ones."""
    leaf: dict[str, Any] = {"is": "condition", "dtype": "float32", "ragged": True}
    mask, words = leaf | {"name": "mask", "shape": [5]}, leaf | {"name": "text", "shape": [5, 3]}
    text = torch.ones(2, 4, 3)
    found = conditions_in({"is": "dict", "items": {"mask": mask, "text": words}}, {"mask": None, "text": text}, 2)
    assert torch.equal(found["mask"], torch.tensor([[1.0, 1, 1, 1, 0]]).expand(2, 5))
    assert torch.equal(found["text"][:, :4], text)
    with pytest.raises(ValueError, match="the condition mask is missing, and no other condition tells its length"):
        conditions_in({"is": "dict", "items": {"mask": mask}}, {"mask": None}, 2)
