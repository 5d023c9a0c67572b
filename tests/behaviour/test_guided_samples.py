"""Latents that were sampled with guidance are only used for students that learn the same guidance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.data import Encoder, LatentData, MemoryData, Prompts, encode, open_latents
from halfstep.objectives import (
    FINISHING,
    Adversarial,
    Consistency,
    Finishing,
    FixedGuidance,
    Guidance,
    GuidanceRange,
    Outcome,
    Plan,
    Role,
    Training,
    guidances,
)
from halfstep.run.course import Match, Start, course
from halfstep.run.own_samples import check_guidance_of, effective_scale
from halfstep.runs import Pipeline
from toys import points

NULL = {"text": torch.zeros(2)}
EMBEDDED = Pipeline(kind="FluxPipeline", folder="flux", component="transformer", guidance="guidance_scale", scale=3.5)


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x_t: Tensor, time: Tensor, text: Tensor) -> Tensor:
        moved: Tensor = self.layer(torch.cat([x_t.flatten(1), time[:, None], text], 1))
        return moved.view_as(x_t)


def teacher(
    pipeline: Pipeline | None = None, learned: Guidance | None = None, role: Role = Role.TEACHER
) -> halfstep.Model:
    denoiser = halfstep.NetworkDenoiser(Told(), halfstep.VPCosine(), halfstep.V())
    guidance = None if learned is None else guidances.describe(learned)
    steps = 4 if role is Role.STUDENT else None
    return halfstep.Model.of(
        denoiser, (1, 2), conditions={"text": (2,)}, null=NULL, made=Outcome(role, steps), pipeline=pipeline,
        guidance=guidance,
    )  # fmt: skip


def latents(folder: Path, scale: float | None) -> LatentData:
    """Encode prompts whose samples were drawn at this guidance scale."""

    def sampled(part: range, cond: object) -> Tensor:
        return points(len(part))[:, None]

    encoder = Encoder(lambda pixels: pixels, lambda texts: {"text": torch.ones(len(texts), 2)}, "key", NULL)
    return encode(Prompts("prompts.txt", tuple("abcdefgh"), sampled, scale), encoder, folder)


@pytest.mark.parametrize(
    ("model", "learned", "scale", "message"),
    [
        (teacher(), None, 5.0, "learn no guidance. Add --matching.guidance-scale 5, or draw the samples again"),
        (teacher(), FixedGuidance(3.0), 5.0, "learn FixedGuidance(scale=3.0). Change this guidance, or draw"),
        (teacher(), GuidanceRange(1.0, 4.0), 5.0, "learn GuidanceRange(low=1.0, high=4.0). Change this guidance, or"),
        (teacher(learned=FixedGuidance(3.0)), None, 5.0, "learn FixedGuidance(scale=3.0). Change this guidance, or"),
        (
            teacher(EMBEDDED),
            None,
            5.0,
            "learn guidance scale 3.5. Import the pipeline with --call guidance_scale=5,",
        ),
        (
            teacher(EMBEDDED),
            None,
            1.0,
            "learn guidance scale 3.5. Import the pipeline with --call guidance_scale=1,",
        ),
        # A student may have learned its pipeline's scale, which its manifest does not state as learned guidance.
        (teacher(EMBEDDED, role=Role.STUDENT), None, 3.5, None),
        (teacher(role=Role.STUDENT), None, 5.0, None),
        (teacher(role=Role.MATCHED), None, 5.0, None),
        (teacher(), None, 1.0, None),
        (teacher(), None, None, None),
        (teacher(), FixedGuidance(5.0), 5.0, None),
        (teacher(), FixedGuidance(5.0), 1.0, None),
        (teacher(), GuidanceRange(1.0, 8.0), 5.0, None),
        (teacher(learned=FixedGuidance(5.0)), None, 5.0, None),
        (teacher(EMBEDDED), None, 3.5, None),
    ],
)
def test_guided_samples_need_a_student_of_the_same_guidance(
    model: halfstep.Model, learned: Guidance | None, scale: float | None, message: str | None, tmp_path: Path
) -> None:
    data = latents(tmp_path / "data", scale)
    assert data.guidance_scale == scale
    assert open_latents(tmp_path / "data").is_sampled
    if message is None:
        check_guidance_of(data, model, [learned] if learned else [])
        return
    with pytest.raises(ValueError, match=r"\w") as caught:
        check_guidance_of(data, model, [learned] if learned else [])
    start = f"{tmp_path / 'data'} contains samples drawn at guidance scale {scale:g}, but the student would "
    assert str(caught.value).startswith(start + message)
    assert "\n" not in str(caught.value)


def test_a_call_from_python_is_refused_before_an_update(tmp_path: Path) -> None:
    latents(tmp_path / "data", 5.0)
    with pytest.raises(ValueError, match=r"drawn at guidance scale 5, but") as caught:
        halfstep.distill(teacher(), tmp_path / "data", to=1, start=2)
    meant = "In Python, --matching.guidance-scale is the argument `guidance`, such as halfstep.FixedGuidance(4.0)."
    assert caught.value.__notes__ == [meant]


def test_guidance_of_any_stage_of_the_plan_is_learned(tmp_path: Path) -> None:
    """A later stage than the matching one may learn the guidance, as latent consistency does."""
    plan = Plan.halvings(2, 1, Training(num_updates=1, learning_rate=1e-3))
    late = Plan.of(Consistency(2, guidance=GuidanceRange(1.0, 8.0), guide_teacher=True), plan.stages[0].training)
    assert (plan + late).learned == (GuidanceRange(1.0, 8.0),)
    check_guidance_of(latents(tmp_path / "data", 5.0), teacher(), (plan + late).learned)


def test_other_data_is_accepted_by_each_student() -> None:
    check_guidance_of(MemoryData("memory", points(8)), teacher(), [FixedGuidance(5.0)])


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        (teacher(), None, 1.0),
        (teacher(), 5.0, 5.0),
        (teacher(EMBEDDED), None, 3.5),
        (teacher(learned=FixedGuidance(5.0)), None, 5.0),
        (teacher(learned=GuidanceRange(1.0, 8.0)), None, 4.5),
    ],
)
def test_the_scale_that_is_recorded_is_that_of_the_samples(
    model: halfstep.Model, asked: float | None, expected: float
) -> None:
    assert effective_scale(model, asked) == expected


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [(teacher(), None, None), (teacher(EMBEDDED), None, 0.0), (teacher(EMBEDDED), 0.5, 0.5)],
)
@pytest.mark.parametrize("critic", [False, True])
def test_a_finish_from_a_network_that_takes_the_scale_keeps_to_the_teacher(
    model: halfstep.Model, given: float | None, expected: float | None, critic: bool
) -> None:
    """Such a teacher is guided, although it has learned no guidance, and data is not distributed like its samples."""
    training = Training(num_updates=100, learning_rate=1e-3)
    after = Plan.finishes([1], FINISHING, lambda steps: Finishing(steps, data_weight=given))
    after = after.changed(Adversarial) if critic else after
    plan = course(Start.of(model), Match(training), lambda _: Plan.halvings(2, 1, training), after=after)
    finish: Any = plan.stages[-1].objective
    assert (finish.objective if critic else finish).data_weight == expected


def test_guidance_that_is_learned_keeps_to_the_teacher_as_before() -> None:
    training = Training(num_updates=100, learning_rate=1e-3)
    match = Match(training, guidance=GuidanceRange(1.0, 8.0))
    plan = course(
        Start.of(teacher(EMBEDDED)), match, lambda learned: Plan.halvings(2, 1, training, guidance=learned),
        after=Plan.finishes([1]),
    )  # fmt: skip
    finish: Any = plan.stages[-1].objective
    assert (finish.guidance, finish.data_weight) == (GuidanceRange(1.0, 8.0), None)
