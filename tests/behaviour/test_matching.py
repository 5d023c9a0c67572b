"""Matching: the student has the teacher's x0 with another prediction, on another clock, or with guidance."""

import math
from collections.abc import Callable
from typing import Final, final

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.core.denoiser import GUIDANCE, Clipped, Cond, Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.core.noise import (
    VE,
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    as_clock,
    linear_betas,
    zero_terminal_betas,
)
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser
from halfstep.core.prediction import Constant, Denoised, Eps, V
from halfstep.nets import MLP, UNet2D, copy_denoiser, on_clock, unet2d_config, with_guidance
from halfstep.objectives import (
    Batch,
    Denoising,
    FixedGuidance,
    GuidanceRange,
    Matching,
    Models,
    Plan,
    Stage,
    Training,
)
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import sample
from halfstep.train.engine import StageTrainer
from support import Watched, numbers

MEANS: Final = torch.tensor([[[0.8, 0.3], [0.2, 0.9]], [[-0.7, 0.1], [-0.1, -0.8]]], dtype=torch.float64)
"""The mixtures of two classes, with two Gaussians each."""
STD: Final = 0.35
LOW, HIGH = 1.0, 4.0


@final
class ByClass(Denoiser):
    """The exact denoiser of a class's mixture; the class after the last stands for all classes."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        self.each = [MixtureDenoiser(process, means, STD) for means in (*MEANS, MEANS.flatten(0, 1))]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        assert cond is not None
        answers = [denoiser(x_t, t) for denoiser in self.each]
        rows, label = torch.arange(len(x_t)), cond["class_labels"]
        return Denoised(
            torch.stack([a.x0 for a in answers])[label, rows], torch.stack([a.eps for a in answers])[label, rows]
        )


def batches(draw: halfstep.Draw) -> Batch:
    """Return samples of the mixture with their classes."""
    label, part = draw.integers("class", 2), draw.integers("part", 2)
    x0 = MEANS[label, part] + STD * draw.normal("data", (2,), torch.float64)
    return Batch(x0.float(), {"class_labels": label})


def guided_exactly(teacher: ByClass, x_t: Tensor, t: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Return the guided x0 from the closed forms of the two mixtures."""
    without = teacher(x_t, t, {"class_labels": torch.full_like(label, 2)}).x0
    return without + scale[:, None] * (teacher(x_t, t, {"class_labels": label}).x0 - without)


def trained(student: NetworkDenoiser, teacher: Denoiser, plan: Plan) -> NetworkDenoiser:
    torch.set_num_threads(1)
    for name, stage in zip(plan.names(), plan.stages, strict=True):
        trainer = StageTrainer(
            student, teacher, stage, batches, (2,), seed=0, stream=name, accelerator=make_accelerator()
        )
        for _ in trainer.run():
            pass
        teacher = trainer.finish()
        student = copy_denoiser(teacher)
    assert isinstance(teacher, NetworkDenoiser)
    return teacher


@pytest.mark.parametrize(
    ("num_updates", "num_scales", "bound"),
    [(500, 3, 0.07), pytest.param(4000, 7, 0.02, marks=pytest.mark.slow)],
    ids=["quick", "accurate"],
)
def test_guidance_of_a_mixture_is_taken_in_at_every_scale_and_halved_to_4_steps(
    num_updates: int, num_scales: int, bound: float
) -> None:
    process = VPCosine(-10.0, 10.0)
    teacher = ByClass(process)
    guided = Guided(teacher, {"class_labels": torch.tensor(2)})
    scales = GuidanceRange(LOW, HIGH)
    torch.manual_seed(0)
    student = NetworkDenoiser(MLP((2,), width=96, depth=3, num_classes=2, guided=True), process, V())
    matching = Plan.of(
        Matching(guidance=scales),
        Training(num_updates, 4e-3, 256, warmup_updates=50, adam_betas=(0.9, 0.99), ema_decay=0.995),
    )
    matched = trained(student, guided, matching)

    for scale in torch.linspace(LOW, HIGH, num_scales):
        generator = torch.Generator().manual_seed(1)
        label = torch.randint(2, (4000,), generator=generator)
        part = torch.randint(2, (4000,), generator=generator)
        eps = torch.randn(2, 4000, 2, generator=generator, dtype=torch.float64)
        t = as_clock(torch.rand(4000, generator=generator, dtype=torch.float64), eps[0])
        x_t = process.mix(MEANS[label, part] + STD * eps[0], eps[1], t).float()
        shown = scale.expand(4000)
        with torch.no_grad():
            found = matched(x_t, t, {"class_labels": label, GUIDANCE: shown}).x0
        exact = guided_exactly(teacher, x_t, t, label, shown)
        assert float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < bound, float(scale)

    training = Training(num_updates // 6, 2e-3, 256, warmup_updates=20, adam_betas=(0.9, 0.99))
    chain = Plan.halvings(16, 4, training, guidance=scales)
    final_ = trained(copy_denoiser(matched), matched, chain)
    x_1 = numbers(500, 2).float()
    label = torch.arange(500) % 2
    for scale in (LOW, 2.5, HIGH):
        cond = {"class_labels": label, GUIDANCE: torch.full((500,), scale)}
        watched = Watched(final_)
        fast = sample(watched, x_1, 4, cond=cond)
        calls = Watched(teacher)
        slow = sample(Guided(calls, guided.null), x_1, 16, cond=cond)
        coarse = sample(guided, x_1, 4, cond=cond)
        # One call in 500 per step, and the teacher's times are near 1000.
        assert [len(answer.x0) for answer in watched.answers] == [500] * 4
        assert [len(answer.x0) for answer in calls.answers] == [1000] * 16
        assert float((fast - slow).square().mean()) < 0.25 * float((coarse - slow).square().mean())


@pytest.mark.parametrize("shown", [None, GuidanceRange(1.0, 3.0)])
def test_the_loss_is_0_for_a_student_that_is_the_guided_teacher_and_reaches_no_teacher(
    shown: GuidanceRange | None,
) -> None:
    teacher = ByClass(VPCosine())
    guided = Guided(teacher, {"class_labels": torch.tensor(2)}, None if shown else 2.5)
    draw = halfstep.Draw(0, "s", 3, 64, range(64))
    result = Matching(100, guidance=shown).loss(Models(guided, guided), batches(draw), draw)
    assert float(result.loss.abs().max()) == 0
    assert len(set(result.log_snr.tolist())) > 30


def test_each_sample_draws_its_own_scale_from_the_whole_range() -> None:
    teacher = Watched(Guided(ByClass(VPCosine()), {"class_labels": torch.tensor(2)}))
    seen: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor, class_labels: Tensor, guidance_scale: Tensor) -> Tensor:
        seen.append(guidance_scale)
        return x_t

    draw = halfstep.Draw(0, "s", 3, 512, range(512))
    objective = Matching(100, guidance=GuidanceRange(1.0, 3.0))
    objective.loss(Models(NetworkDenoiser(network, VPCosine(), V()), teacher), batches(draw), draw)
    assert 1.0 <= float(seen[0].min()) < 1.02
    assert 2.98 < float(seen[0].max()) <= 3.0
    assert abs(float(seen[0].mean()) - 2) < 0.1


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (2.0, 2.0), (3.0, 1.0), (1.0, float("inf"))])
def test_an_empty_range_is_rejected(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must satisfy 0 <= low < high"):
        GuidanceRange(low, high)


def test_an_eps_teacher_on_a_table_becomes_a_v_student_on_the_cosine_clock_that_samples_like_it() -> None:
    """Match in memory from an iterable of batches; before the stage, the student is far off."""
    torch.manual_seed(0)
    table = VPTable()
    points = [(batches(halfstep.Draw(5, "data", k, 256, range(256))).x0, {}) for k in range(8)]
    teacher = NetworkDenoiser(MLP((2,), width=64, depth=2), table, Eps())
    stage = Stage(
        Denoising(halfstep.SNR()),
        Training(500, 3e-3, 256, warmup_updates=50, adam_betas=(0.9, 0.99), ema_decay=0.99),
    )
    from halfstep.run.sources import StreamedBatches

    torch.set_num_threads(1)
    trainer = StageTrainer(
        teacher, None, stage, StreamedBatches(points), (2,), seed=0, stream="t", accelerator=make_accelerator()
    )
    for _ in trainer.run():
        pass
    teacher = trainer.finish()
    clock = VPCosine(*table.log_snr(torch.tensor([1.0, 1 / 1000], dtype=torch.float64)).tolist())
    student = halfstep.distill(
        teacher, points, to=4, start=16, prediction=V(), process=clock,
        training=Training(166, 2e-3, batch_size=256), matching=Training(500, 2e-3, batch_size=256),
    )  # fmt: skip
    assert (student.process, student.prediction) == (clock, V())
    x_1 = numbers(1000, 2).float()
    slow = sample(Reprocessed(teacher, clock), x_1, 256)
    fast = sample(student, x_1, 4)
    coarse = sample(Reprocessed(teacher, clock), x_1, 4)
    assert float((fast - slow).square().mean().sqrt()) < 0.12
    assert float((fast - slow).square().mean()) < 0.5 * float((coarse - slow).square().mean())


def small_unet(seed: int = 0) -> UNet2D:
    torch.manual_seed(seed)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        attention=(False, False), attention_head_dim=8, mid_attention=False, norm_num_groups=8,
    )  # fmt: skip
    return UNet2D(config, num_train_timesteps=1000).eval()


@torch.no_grad()
def test_a_network_on_another_clock_starts_near_what_it_was() -> None:
    """The first layer of the time embedding is fitted. Without this, the network would be called at very different
    times: like a trained network, this one distinguishes times by more than single timesteps."""
    table, cosine = VPTable(), VPCosine(-10.0, 9.0)
    network = small_unet()
    half = network.model.time_embedding.linear_1.weight.shape[1] // 2
    slow = torch.exp(-math.log(10_000) * torch.arange(half) / half) < 0.05
    network.model.time_embedding.linear_1.weight *= slow.repeat(2)
    moved = on_clock(network, lambda t: table.time_at(cosine.log_snr(t)).clamp(0, 1), 1024)
    plain = UNet2D(network.config, 1024)
    plain.load_state_dict(network.state_dict())
    x_t = numbers(64, 1, 8, 8).float()
    t = torch.linspace(0.05, 1, 64, dtype=torch.float64)
    wanted = network(x_t, table.time_at(cosine.log_snr(t)).float())
    assert float((moved(x_t, t.float()) - wanted).abs().mean()) < 0.2 * float(
        (plain.eval()(x_t, t.float()) - wanted).abs().mean()
    )


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 64, 320])
def test_the_weights_of_a_clock_that_was_replaced_are_as_large_as_those_of_the_old_one(width: int) -> None:
    """Weights fitted to the last bit were 1e6 and cancelled. Their float32 sum had an error of 0.1, so any other order
    of summation, such as that of another batch size or library, gave other samples."""
    table = VPTable()
    clock = VPCosine(*table.log_snr(torch.tensor([1.0, 1 / 1000], dtype=torch.float64)).tolist())
    torch.manual_seed(0)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(width,), layers_per_block=1,
        attention=(False,), attention_head_dim=8, mid_attention=False, norm_num_groups=8,
    )  # fmt: skip
    network = UNet2D(config, num_train_timesteps=1000).eval()
    moved = on_clock(network, lambda t: table.time_at(clock.log_snr(t)).clamp(0, 1), 1024)
    old, new = (made.model.time_embedding.linear_1 for made in (network, moved))
    assert float(new.weight.abs().max()) < 30 * float(old.weight.abs().max())
    t = torch.linspace(0.01, 1, 100)
    embedded = new(moved.model.time_proj(moved.timestep(t)))
    exact = moved.model.time_proj(moved.timestep(t)).double() @ new.weight.double().T + new.bias.double()
    assert float((embedded - exact).abs().max()) < 1e-5


@torch.no_grad()
def test_a_network_with_a_scale_input_starts_unchanged_for_any_scale() -> None:
    network = MLP((2,), width=16, depth=1, num_classes=3)
    shown = with_guidance(network)
    x_t, time, label = numbers(5, 2).float(), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    for scale in (0.0, 1.0, 7.5):
        found = shown(x_t, time, class_labels=label, guidance_scale=torch.full((5,), scale))
        assert torch.equal(found, network(x_t, time, class_labels=label))


def test_networks_without_an_input_for_a_scale_and_heads_of_another_number_are_refused() -> None:
    teacher = NetworkDenoiser(small_unet(), VPTable(), Eps())
    with pytest.raises(ValueError, match=r"UNet2DModel has no such input\. Distil with a single guidance scale"):
        Matching(prediction=V(), guidance=GuidanceRange(1, 2)).start(teacher)
    with pytest.raises(ValueError, match="has 1 outputs for each channel, but Both needs 2"):
        Matching(prediction=halfstep.Both()).start(teacher)


def test_guidance_without_anything_for_no_condition_is_refused() -> None:
    teacher = NetworkDenoiser(MLP((2,), num_classes=2), VPCosine(), V())
    with pytest.raises(ValueError, match="guidance needs a value that replaces each dropped condition"):
        Matching(guidance=FixedGuidance(2.0)).view(teacher, teacher, {})


class Sines(nn.Module):
    """A user's network that depends on its time and on the scale of its input."""

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        return torch.sin(3 * x_t + 40 * time[:, None].to(x_t))


@pytest.mark.parametrize(("own", "process"), [(VPTable(), VPCosine(-10.0, 9.0)), (VE(0.01, 50.0), VPCosine(-7.0, 9.0))])
def test_a_user_defined_network_starts_unchanged_on_another_process(own: NoiseProcess, process: NoiseProcess) -> None:
    teacher = NetworkDenoiser(Sines(), own, Eps())
    objective = Matching(100, process=process)
    student = objective.start(teacher)
    assert student.process == process
    draw = halfstep.Draw(0, "s", 3, 64, range(64))
    x0 = numbers(64, 2).double()
    result = objective.loss(Models(student, objective.view(teacher, student, {})), Batch(x0), draw)
    assert float(result.loss.max()) < 1e-9


def test_the_x0_of_a_teacher_is_clipped_by_its_bounds() -> None:
    teacher = NetworkDenoiser(Sines(), VPCosine(-10.0, 9.0), Eps())
    process, draw = VPCosine(-8.0, 8.0), halfstep.Draw(0, "s", 3, 64, range(64))
    perfect = Clipped(Reprocessed(teacher, process), -0.5, 0.75)
    losses = []
    for clip in ((-0.5, 0.75), None):
        objective = Matching(100, process=process, prediction=V(), clip=clip)
        seen = objective.view(teacher, objective.start(teacher), {})
        losses.append(objective.loss(Models(perfect, seen), Batch(numbers(64, 2).double()), draw).loss)
    assert float(losses[0].max()) == 0
    assert float(losses[1].mean()) > 0.1


def test_guidance_comes_before_clipping() -> None:
    teacher, null = ByClass(VPCosine()), {"class_labels": torch.tensor(2)}
    seen = Matching(100, guidance=FixedGuidance(4.0), clip=(-0.3, 0.3)).view(teacher, ByClass(VPCosine()), null)
    draw = halfstep.Draw(0, "s", 3, 64, range(64))
    x0, cond = batches(draw)
    t = torch.full((64,), 0.5, dtype=torch.float64)
    x_t = VPCosine().mix(x0, draw.normal("noise", x0.shape[1:]).to(x0), t)
    guided = Guided(teacher, null, 4.0)(x_t, t, cond).x0
    assert float(guided.abs().max()) > 0.4
    assert torch.equal(seen(x_t, t, cond).x0, guided.clamp(-0.3, 0.3))


def zero_terminal(levels: int) -> VPTable:
    return VPTable(zero_terminal_betas(linear_betas(levels)))


class Noise(nn.Module):
    """The exact eps of Gaussian data with mean 0.3 and standard deviation 0.5, with or without a class."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.exact = GaussianDenoiser(process, 0.3, 0.5)

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.exact(x_t, time).eps


def _exact_eps(process: NoiseProcess) -> NetworkDenoiser:
    return NetworkDenoiser(Noise(process), process, Eps())


at_zero_snr = pytest.mark.parametrize(
    ("process", "last"),
    [(zero_terminal(100), 0.99), (FlowMatching(), 1000 / 1001), (FlowMatching(3.0), 1000 / 1003)],
    ids=["table", "flow", "shifted"],
)


@at_zero_snr
@pytest.mark.parametrize(
    "seen",
    [
        _exact_eps,
        lambda process: Clipped(_exact_eps(process), -9.0, 9.0),
        lambda process: Guided(_exact_eps(process), {"class_labels": torch.tensor(2)}, 3.0),
        lambda process: Clipped(Reprocessed(_exact_eps(FlowMatching(5.0)), process), -9.0, 9.0),
    ],
    ids=["plain", "clipped", "guided", "reprocessed"],
)
def test_where_eps_does_not_determine_x0_the_target_is_that_of_the_last_level_with_signal(
    process: NoiseProcess, last: float, seen: Callable[[NoiseProcess], Denoiser]
) -> None:
    """At t = 1, the exact student returns the mean. The root of its loss is therefore the teacher's distance from the
    mean at the last level, alpha std^2 / (alpha^2 std^2 + sigma^2) |x_t - alpha mean|."""
    student, teacher = Watched(GaussianDenoiser(process, 0.3, 0.5)), Watched(seen(process))
    draw = halfstep.Draw(0, "s", 3, 256, range(256))
    x0 = 0.3 + 0.5 * numbers(256, 1)
    batch = Batch(x0, {"class_labels": torch.zeros(256, dtype=torch.int64)})
    result = Matching(4, weighting=Constant()).loss(Models(student, teacher), batch, draw)
    (t,), (answer,) = student.times, student.answers
    assert t.unique().tolist() == [0.25, 0.5, 0.75, 1.0], "the student is trained at t = 1"
    torch.testing.assert_close(teacher.times[0], torch.where(t == 1, last, t), rtol=0, atol=1e-12)
    assert torch.equal(result.log_snr, process.log_snr(t))
    alpha, sigma = (float(value) for value in process.alpha_sigma(torch.tensor(last, dtype=torch.float64)))
    assert 0 < alpha < 0.02
    # At t = 1, the exact student's eps is the noise that was mixed in.
    away = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (alpha * (x0 - 0.3) + sigma * answer.eps)
    expected = torch.where(t == 1, away[:, 0].abs(), 0.0)
    # Rounding in eps is sigma / alpha = 1000 times as large in x0.
    torch.testing.assert_close(result.loss.sqrt(), expected, rtol=0, atol=1e-11)
    assert float(expected.max()) < 0.25 * 4 * alpha / sigma


@at_zero_snr
def test_an_eps_teacher_at_zero_terminal_snr_is_distilled_through_its_matching_stage(
    process: NoiseProcess, last: float
) -> None:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1), process, Eps())
    names: list[str] = []
    training = Training(2, 1e-3, batch_size=256)
    for each in (teacher, Clipped(teacher)):
        student = halfstep.distill(
            each, numbers(256, 2).float().clamp(-1, 1), start=2, to=1, training=training,
            matching=Training(20, 1e-3, batch_size=256), engine=halfstep.Engine(cpu=True, trackers=()),
            on_stage=lambda name, model: names.append(name),
        )  # fmt: skip
        assert bool(student.sample(range(4)).isfinite().all())
    assert names == ["01-match", "02-halve-0001"] * 2


def test_lora_students_of_an_eps_teacher_at_zero_terminal_snr_keep_its_schedule() -> None:
    """Full students of such a U-Net move to the cosine process, which keeps some signal."""
    torch.manual_seed(0)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(16, 16), layers_per_block=1,
        attention=(False, True), attention_head_dim=8, mid_attention=False, norm_num_groups=8,
    )  # fmt: skip
    table = zero_terminal(8)
    teacher = NetworkDenoiser(UNet2D(config, num_train_timesteps=8), table, Eps())
    training = Training(2, 1e-3, batch_size=32)
    for lora_rank, bound in ((2, -math.inf), (None, -20.0)):
        student = halfstep.distill(
            teacher, numbers(32, 1, 8, 8).float().clamp(-1, 1), start=2, to=1, training=training, lora_rank=lora_rank,
            engine=halfstep.Engine(cpu=True, trackers=()),
        )  # fmt: skip
        assert float(student.process.log_snr(torch.ones(1, dtype=torch.float64))) == pytest.approx(bound)
        assert (student.process == table) == (lora_rank == 2)
        assert student.prediction == V()
        assert bool(student.sample(range(2)).isfinite().all())


@at_zero_snr
def test_a_student_whose_output_does_not_determine_x0_is_refused(process: NoiseProcess, last: float) -> None:
    teacher = NetworkDenoiser(MLP((2,)), process, Eps())
    for objective in (Matching(), Matching(prediction=Eps())):
        # As in a dry run.
        for device in ("cpu", "meta"):
            with torch.device(device), pytest.raises(ValueError, match="predicts Eps has no x0 at t = 1") as caught:
                objective.start(teacher)
        assert str(caught.value).endswith("Choose another prediction for the student, such as V()")
    with torch.device("meta"):
        assert Matching(prediction=V()).start(teacher).prediction == V()
