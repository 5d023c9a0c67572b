"""Distillation of a problem with a known solution: the student keeps the teacher's map."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halfstep import (
    X0,
    Clipped,
    Consistency,
    Eps,
    FixedGuidance,
    GaussianDenoiser,
    GuidanceRange,
    Model,
    NetworkDenoiser,
    Plan,
    Training,
    V,
    VPCosine,
    VPTable,
    distill,
    sample,
)
from halfstep.core.noise import linear_betas
from halfstep.models.folder import load
from halfstep.nets import MLP
from halfstep.objectives import Finishing
from halfstep.run.course import Match, Start, course
from toys import finish, points, toy_plan, toy_spec

PROCESS = VPCosine()
STEPS = 16
MEAN, STD = 0.3, 0.5


class LinearAtEachTime(nn.Module):
    """x0 = gain x_t + shift, with a gain and a shift per time of the grid: it can represent any Gaussian's denoiser."""

    def __init__(self) -> None:
        super().__init__()
        t = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
        exact = GaussianDenoiser(PROCESS, MEAN, STD)
        shift = exact(torch.zeros(STEPS, 1, dtype=torch.float64), t).x0[:, 0]
        gain = exact(torch.ones(STEPS, 1, dtype=torch.float64), t).x0[:, 0] - shift
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        index = (time * STEPS).round().long() - 1
        return self.gain[index, None] * x_t + self.shift[index, None]


def test_a_gaussian_teacher_distilled_from_16_steps_to_1_keeps_its_map() -> None:
    torch.set_num_threads(1)
    teacher = NetworkDenoiser(LinearAtEachTime(), PROCESS, X0())
    generator = torch.Generator().manual_seed(0)
    data = (MEAN + STD * torch.randn(512, 1, generator=generator)).double()
    plan = Plan.halvings(STEPS, 1, Training(400, 0.02, batch_size=64), updates_at={})
    before = [p.detach().clone() for p in teacher.parameters()]
    # The engine trains in the data's dtype. MemoryData stores arrays as float32, so tensors keep float64.
    student = distill(teacher, data.float(), start=STEPS, to=1, plan=plan)
    noise = torch.randn(256, 1, generator=generator, dtype=torch.float64)
    mapped, expected = sample(student, noise, 1), sample(teacher, noise, STEPS)
    error = float((mapped - expected).square().mean().sqrt())
    undistilled = float((sample(teacher, noise, 1) - expected).square().mean().sqrt())
    assert error < 0.01
    assert undistilled > 0.2, "if the teacher's own single step is good, this test proves nothing"
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_distill_refuses_a_chain_that_cannot_be_halved() -> None:
    teacher = NetworkDenoiser(LinearAtEachTime(), PROCESS, X0())
    with pytest.raises(ValueError, match=r"12 steps cannot be halved to 4.*for example 16"):
        distill(teacher, torch.zeros(10, 1), start=12, to=4)


def test_a_student_is_distilled_further_from_the_steps_that_it_takes(tmp_path: Path) -> None:
    finish(toy_spec(plan=toy_plan(2, 2), keep=(2,)), tmp_path / "run")
    student = load(tmp_path / "run" / "stages" / "01-halve-0002")
    training, stages = Training(2, 1e-3, batch_size=8), list[str]()
    distill(student, points(), to=1, training=training, on_window=lambda stage, _: stages.append(stage))
    assert stages == ["01-halve-0001"]
    with pytest.raises(ValueError, match=r"needs a teacher with 4 steps of DDIM, .* distilled for 2 steps of DDIM"):
        distill(student, points(), to=1, start=4, training=training)


def test_batches_of_pixels_are_rejected_and_a_teacher_is_returned_unchanged() -> None:
    """Integers would be mixed with noise as integers, which would leave nothing."""
    teacher = NetworkDenoiser(LinearAtEachTime(), PROCESS, X0())
    with pytest.raises(ValueError, match=r"x0 must be floats, got torch.uint8: scale pixels to \[-1, 1\]"):
        distill(teacher, [torch.zeros(8, 1, dtype=torch.uint8)], start=16, to=8)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_user_defined_plan_passes_the_matched_scales_to_its_students() -> None:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1, num_classes=3), VPCosine(), V())
    data = [(torch.randn(16, 2), {"class_labels": torch.arange(16) % 2})]
    training = Training(2, 1e-3, batch_size=16)
    plan = Plan.halvings(4, 2, training, updates_at={})
    null = {"class_labels": torch.tensor(2)}
    student = distill(teacher, data, plan=plan, matching=training, guidance=GuidanceRange(1.0, 4.0), null=null)
    cond = {"class_labels": torch.arange(4) % 2, "guidance_scale": torch.linspace(1, 4, 4)}
    assert sample(student, torch.randn(4, 2), 2, cond=cond).isfinite().all()
    assert student.network.guided


def test_a_plan_may_guide_the_teacher_itself_but_only_once_and_a_finish_needs_the_same_guidance() -> None:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1, num_classes=3), VPCosine(), V())
    data = [(torch.randn(16, 2), {"class_labels": torch.arange(16) % 2})]
    training, guidance, null = Training(2, 1e-3, batch_size=16), FixedGuidance(3.0), {"class_labels": torch.tensor(2)}
    plan = Plan.of(Consistency(1, 4, 4, guidance=guidance, guide_teacher=True), training)
    assert isinstance(distill(teacher, data, plan=plan, null=null), Model)
    with pytest.raises(ValueError, match=r"guides a teacher that has already learned FixedGuidance\(scale=3.0\)"):
        distill(teacher, data, plan=plan, null=null, guidance=guidance)
    with pytest.raises(ValueError, match=r"has no guidance, but its student has learned FixedGuidance\(scale=3.0\)"):
        distill(teacher, data, plan=plan, null=null, finish=[1])
    with pytest.raises(ValueError, match="null, the null condition, has no effect"):
        distill(teacher, data, start=2, to=1, null=null)


def test_a_stage_after_matching_guides_its_teacher_in_a_run_folder_as_in_memory(tmp_path: Path) -> None:
    """The folder of a matched stage does not contain the null condition."""
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1, num_classes=3), VPCosine(), Eps())
    data = (points(64), {"class_labels": torch.arange(64) % 2})
    training, null = Training(2, 1e-3, batch_size=16), {"class_labels": torch.tensor(2)}
    plan = Plan.of(Consistency(1, 4, 4, guidance=FixedGuidance(3.0), guide_teacher=True), training)
    settings = {"plan": plan, "null": null, "matching": training}
    alone, stored = (distill(teacher, data, out=out, **settings) for out in (None, tmp_path / "run"))  # type: ignore[arg-type]
    assert (tmp_path / "run" / "stages" / "01-match").is_dir()
    for one, other in zip(alone.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_lora_student_cannot_take_a_guidance_scale_that_its_network_lacks() -> None:
    """The new input's weights would be frozen at 0, so the scale would have no effect."""
    training = Training(2, 1e-3)
    for guidance in (GuidanceRange(1.0, 8.0), FixedGuidance(4.0)):
        plan = Plan.of(Consistency(2, 4, 8, guidance=guidance, guide_teacher=True), training)

        def stages(start: Start, rank: int | None, plan: Plan = plan) -> Plan:
            return course(start, Match(training), lambda _: plan, rank)

        stages(Start(VPCosine(), V()), None)
        stages(Start(VPCosine(), V(), is_embedded=True), 2)
        if guidance.is_shown:
            with pytest.raises(ValueError, match="LoRA needs unchanged network inputs, but a guidance range"):
                stages(Start(VPCosine(), V()), 2)
        else:
            stages(Start(VPCosine(), V()), 2)


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_finish_keeps_to_a_teacher_whose_network_takes_the_scale(at_the_end: bool) -> None:
    training = Training(20, 1e-3, batch_size=16)
    halvings, finishes = Plan.halvings(4, 2, training, updates_at={}), Plan.finishes([2])
    for is_embedded, weight in ((True, 0.0), (False, None)):
        plan = course(
            Start(VPCosine(), V(), is_embedded=is_embedded),
            Match(training),
            lambda _: halvings if at_the_end else halvings + finishes,
            after=finishes if at_the_end else None,
        )
        finish = plan.stages[-1].objective
        assert isinstance(finish, Finishing)
        assert finish.data_weight == weight


def test_a_finish_gets_the_guidance_that_the_chain_has_learned() -> None:
    training, guidance = Training(20, 1e-3, batch_size=16), FixedGuidance(3.0)
    plan = course(
        Start(VPCosine(), V()),
        Match(training, guidance=guidance),
        lambda learned: Plan.halvings(4, 2, training, updates_at={}, guidance=learned),
        after=Plan.finishes([2], training, lambda n: Finishing(n, lead_updates=4)),
    )
    assert [stage.objective.label for stage in plan.stages] == ["match", "halve", "finish"]
    assert all(stage.objective.guidance == guidance for stage in plan.stages)


def test_a_teacher_on_a_table_is_matched_at_the_levels_of_its_table_and_others_at_the_times_asked_for() -> None:
    match = Match(Training(1, 1e-3), prediction=V(), num_times=64)
    for process, may_move, num_times in (
        (VPTable(linear_betas(10, 1e-2, 0.5)), False, 10),
        # It becomes a student on the cosine clock.
        (VPTable(linear_betas(10, 1e-2, 0.5)), True, 64),
        (VPCosine(-10, 10), True, 64),
    ):
        matching = match.objective(Start(process, Eps(), may_move=may_move))
        assert matching is not None
        assert matching.num_times == num_times


def test_distill_gives_the_same_student_twice_and_calls_back() -> None:
    teacher = NetworkDenoiser(LinearAtEachTime(), PROCESS, X0())
    seen: list[tuple[str, int]] = []
    settings = {"start": 16, "to": 8, "training": Training(20, 2e-4, batch_size=16)}
    one = distill(teacher, torch.randn(50, 1), on_window=lambda name, w: seen.append((name, w.update)), **settings)  # type: ignore[arg-type]
    torch.manual_seed(1)
    data = torch.randn(50, 1)
    first = distill(teacher, data, **settings)  # type: ignore[arg-type]
    second = distill(teacher, data, **settings)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert seen == [("01-halve-0008", 20)]
    assert all(p.requires_grad for p in one.parameters())


def test_a_clipped_teacher_is_matched_before_it_is_halved_and_is_not_changed() -> None:
    teacher = Clipped(NetworkDenoiser(MLP((2,), width=8, depth=1), PROCESS, X0()))
    before = [p.detach().clone() for p in teacher.parameters()]
    names: list[str] = []
    training = Training(1, 1e-2)
    student = distill(
        teacher, torch.randn(32, 2), to=1, start=2, training=training, on_window=lambda n, _: names.append(n)
    )
    assert names == ["01-match", "02-halve-0001"]
    assert isinstance(student, Model)
    # Unwrapped, so that another chain can start from it.
    assert isinstance(student.denoiser, NetworkDenoiser)
    assert student.num_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
