"""The adversarial term: its critic, its gradient, and no other effect."""

import copy
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import halfstep
from halfstep.core.denoiser import GUIDANCE, Cond, Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.core.draw import Draw
from halfstep.core.noise import VE, NoiseProcess, VPCosine, per_sample, processes
from halfstep.core.oracle import GaussianDenoiser, data_set_denoiser
from halfstep.core.prediction import X0, Denoised, V, Weighting, eps_from_x0
from halfstep.models.students import in_precision
from halfstep.nets import (
    MLP,
    EncoderHalf,
    Network,
    OnProcess,
    Replay,
    UNet2D,
    encoder_half,
    unet2d_config,
    with_lora,
)
from halfstep.objectives import (
    STUDENT,
    Adversarial,
    Auxiliary,
    Batch,
    Denoising,
    Finishing,
    FixedGuidance,
    GuidanceRange,
    Halving,
    Matching,
    Models,
    Objective,
    Plan,
    Stage,
    StepObjective,
    Training,
    objectives,
)
from halfstep.objectives.adversarial import critic_of
from halfstep.runtime.processes import make_accelerator
from halfstep.train.engine import StageTrainer
from support import ToyHalf, ToyNetwork, Watched, members, numbers, toy_denoiser
from support_pipelines import replay

SIZE = 64
LATE = 10**6

every_process = pytest.mark.parametrize("process", members(processes))
several_steps = pytest.mark.parametrize("num_steps", [1, 2, 4])
every_wrapped = pytest.mark.parametrize("objective", [Halving(2), Finishing(2)], ids=["halve", "finish"])


def draw_for(count: int = SIZE, update: int = 3, seed: int = 5) -> Draw:
    return Draw(seed=seed, stream="critic", update=update, batch_size=count, places=range(count))


class Known(nn.Module):
    """A critic that records all calls: D(y) = slope . y + sin(y) . bend + level."""

    def __init__(self, slope: Tensor, bend: float = 0.0, level: float = 0.0) -> None:
        super().__init__()
        self.slope, self.bend, self.level = nn.Parameter(slope), bend, nn.Parameter(torch.tensor(level).double())
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, y: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        self.calls.append((y, tau))
        return (y @ self.slope) + self.bend * y.sin().sum(1) + self.level


class Moved(Denoiser):
    """Another denoiser with its x0 moved by a differentiable amount."""

    def __init__(self, denoiser: Denoiser, by: Tensor) -> None:
        super().__init__()
        self.denoiser, self.process, self.by = denoiser, denoiser.process, by

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t, t, cond).x0 + self.by
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


def models_of(student: Denoiser, teacher: Denoiser, critic: nn.Module) -> Models:
    return Models(student, teacher, {"critic": critic, "auxiliary": teacher, "start": student})


# The student's turn.


@every_process
@several_steps
def test_the_students_gradient_climbs_the_critic_through_the_landing_point(
    process: NoiseProcess, num_steps: int
) -> None:
    """dD/dx0 is D's slope at y times dy/dx_s times dx_s/dx0 = alpha_s - sigma_s alpha_t / sigma_t."""
    point = numbers(1, 3)
    exact = data_set_denoiser(process, point)
    student = Moved(Watched(exact), (0.1 * numbers(SIZE, 3, seed=2)).requires_grad_())
    critic = Known(numbers(3, seed=3), bend=0.7)
    weight = 0.3
    adversarial = Adversarial(Halving(num_steps), weight)

    def gradient(objective: Objective) -> Tensor:
        student.by.grad = None
        losses = objective.loss(models_of(student, exact, critic), Batch(point.expand(SIZE, 3)), draw_for())
        losses.loss.sum().backward()
        assert student.by.grad is not None
        return student.by.grad

    found = gradient(adversarial) - gradient(adversarial.objective)
    ((y, tau),) = critic.calls
    assert isinstance(student.denoiser, Watched)
    t = student.denoiser.times[0]
    s = ((t * num_steps).round() - 1) / num_steps
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.landing(s)
    judged = (y @ critic.slope) + critic.bend * y.sin().sum(1) + critic.level
    up = -weight * torch.sigmoid(-judged)[:, None] * (critic.slope + critic.bend * y.cos())
    factor = process.alpha_sigma(tau)[0] / alpha_s * (alpha_s - sigma_s * alpha_t / sigma_t)
    expected = per_sample(factor, up) * up
    assert float(expected.detach().abs().max()) > 1e-3
    own = float(gradient(adversarial.objective).abs().max())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-10 * (1 + own))


@every_process
@several_steps
def test_the_critic_sees_data_and_landing_points_at_one_noise_level_inside_the_step(
    process: NoiseProcess, num_steps: int
) -> None:
    """For data of one point, the exact student's landing points are distributed like data, at the noise of tau."""
    point, count = numbers(1, 3), 3000
    exact = data_set_denoiser(process, point)
    critic, student = Known(torch.zeros(3).double()), Watched(exact)
    objective = Adversarial(Halving(num_steps), gamma=0.0)
    objective.critic_loss(models_of(student, exact, critic), Batch(point.expand(count, 3)), draw_for(count))
    ((both, taus),) = critic.calls
    real, made = both.chunk(2)
    tau, same = taus.chunk(2)
    assert torch.equal(tau, same)
    t = student.times[0]
    share = (tau - (t - 1 / num_steps)) * num_steps
    assert scipy.stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    noise = [exact(y, tau).eps for y in (real, made)]
    for eps in noise:
        assert scipy.stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = float((noise[0] * noise[1]).mean()) * math.sqrt(noise[0].numel())
    assert abs(correlation) < 4, "the two must not share their noise"


# The critic's turn.


def test_at_equal_laws_an_undecided_critic_has_no_gradient_in_expectation() -> None:
    """The gradient at D = 0 is (E[dD(y)] - E[dD(y+)]) / 2: 0 for equal distributions, but not for a student that is
    off."""
    process, count = VPCosine(), 20_000
    teacher = GaussianDenoiser(process, mean=0.3, std=0.5)
    batch = Batch(0.3 + 0.5 * numbers(count, 1, seed=9))

    def z_score(shift: float) -> float:
        # A one-step student for Gaussian data: x_1 is noise, so x0 = mean + std x_1 is distributed like the data.
        class Onto(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.process = process

            def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
                x0 = 0.3 + 0.5 * x_t + shift
                return Denoised(x0, eps_from_x0(x_t, x0, *process.alpha_sigma(t)))

        critic = Known(torch.zeros(1).double())
        losses = Adversarial(Halving(1), gamma=0.0).critic_loss(
            models_of(Onto(), teacher, critic), batch, draw_for(count)
        )
        torch.testing.assert_close(losses.loss, torch.full_like(losses.loss, 2 * math.log(2)))
        ((both, _),) = critic.calls
        real, made = both.chunk(2)
        each = (made - real)[:, 0] / 2
        (slope,) = torch.autograd.grad(losses.loss.mean(), [critic.slope])
        torch.testing.assert_close(slope[0], each.mean(), rtol=1e-6, atol=1e-9)
        return float(each.mean() / (each.std() / math.sqrt(count)))

    assert abs(z_score(0.0)) < 4
    assert z_score(0.2) > 8


@pytest.mark.parametrize("gamma", [0.5, 3.0])
@pytest.mark.parametrize("delta", [0.01, 0.5])
def test_the_penalty_of_a_linear_critic_is_its_squared_slope(gamma: float, delta: float) -> None:
    """Compare with gamma / 2 E[(w . n)^2] = gamma / 2 |w|^2, for any size of the change."""
    process, count = VPCosine(), 20_000
    exact = data_set_denoiser(process, numbers(1, 3))
    slope = numbers(3, seed=4)
    batch = Batch(numbers(count, 3, seed=6))
    penalised, plain = (
        Adversarial(Halving(2), gamma=g, delta=delta).critic_loss(
            models_of(exact, exact, Known(slope)), batch, draw_for(count)
        )
        for g in (gamma, 0.0)
    )
    penalty = penalised.loss - plain.loss
    expected = gamma / 2 * float(slope.square().sum())
    assert abs(float((penalty.mean() - expected) / (penalty.std() / math.sqrt(count)))) < 4
    assert float(penalty.min()) > -1e-9


def test_every_sample_comes_with_its_own_condition_and_noise_level() -> None:
    """Classes are points far apart, so a sample with little noise reveals its class."""
    process, labels = VPCosine(), torch.arange(SIZE)
    x0 = 100.0 * labels[:, None].double()
    shown: list[tuple[Tensor, Tensor, Tensor]] = []

    class Onto(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.process = process

        def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
            assert cond is not None
            x0 = 100.0 * cond["class_labels"][:, None].double()
            return Denoised(x0, eps_from_x0(x_t, x0, *process.alpha_sigma(t)))

    class Told(nn.Module):
        def forward(self, y: Tensor, tau: Tensor, cond: Cond) -> Tensor:
            shown.append((y, tau, cond["class_labels"]))
            return y[:, 0]

    objective, student = Adversarial(Halving(4)), Onto()
    for turn in objective.turns(LATE):
        turn.loss(models_of(student, student, Told()), Batch(x0, {"class_labels": labels}), draw_for())
    assert [len(y) for y, _, _ in shown] == [SIZE, 3 * SIZE]
    for y, tau, told in shown:
        alpha, sigma = process.alpha_sigma(tau)
        noise = (y[:, 0] - 100 * alpha * told) / sigma.clamp(min=0.2)
        assert float(noise.abs().max()) < 6


def test_the_penalty_is_taken_at_data() -> None:
    """A critic that is steep where the student lands and flat at data has no penalty."""
    process, point = VPCosine(), torch.full((1, 2), 5.0).double()
    real, away = data_set_denoiser(process, point), data_set_denoiser(process, -point)

    class Steep(nn.Module):
        def forward(self, y: Tensor, tau: Tensor, cond: Cond) -> Tensor:
            return 100 * (y[:, 0] + 3).clamp(max=0)

    batch = Batch(point.expand(SIZE, 2))
    losses = [
        Adversarial(Halving(1), gamma=g, delta=1e-3).critic_loss(models_of(away, real, Steep()), batch, draw_for()).loss
        for g in (0.0, 1.0)
    ]
    # At little noise: with more noise, data and landing points mix.
    _, tau = _seen(Adversarial(Halving(1), gamma=0.0), models_of(away, real, Known(torch.ones(2).double())), batch)
    clear = tau.chunk(2)[0] < 0.2
    assert bool(clear.any())
    assert torch.equal(losses[0][clear], losses[1][clear])


def _seen(objective: Adversarial, models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    objective.critic_loss(models, batch, draw_for())
    critic = models.helpers["critic"]
    assert isinstance(critic, Known)
    return critic.calls[0]


# Effects and non-effects.


@every_wrapped
def test_the_own_turns_keep_their_places_losses_and_random_numbers(objective: StepObjective) -> None:
    adversarial = Adversarial(objective, lead_updates=5)
    for update in (0, 4, 5, 70, LATE):
        own, both = objective.turns(update), adversarial.turns(update)
        assert [turn.trains for turn in both] == [*(turn.trains for turn in own), "critic"]
        for before, after in zip(own, both, strict=False):
            assert (before == after) == (update < 5 or before.trains != STUDENT)
    student, teacher = (toy_denoiser(VPCosine(), V(), seed=seed) for seed in (1, 2))
    models = models_of(student, teacher, Known(numbers(3), level=0.4))
    batch = Batch(0.5 * numbers(SIZE, 3))
    plain, with_term = (each.loss(models, batch, draw_for()) for each in (objective, adversarial))
    assert torch.equal(plain.log_snr, with_term.log_snr)
    term = with_term.loss - plain.loss
    assert float(term.min()) > 0
    assert adversarial.outcome == objective.outcome
    assert adversarial.start(teacher) is objective.start(teacher)
    assert (adversarial.refines, adversarial.learns_from_undistilled) == (
        objective.refines,
        objective.learns_from_undistilled,
    )
    assert not adversarial.loss_falls


@every_wrapped
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_costs_count_every_call_of_an_update(objective: StepObjective, gamma: float) -> None:
    """A call on a batch of several parts counts once per part."""
    adversarial, batch = Adversarial(objective, gamma=gamma), Batch(0.5 * numbers(8, 1))
    names = {STUDENT, "teacher", *objective.helpers}
    called = {name: Watched(GaussianDenoiser(VPCosine(), 0.3, 0.5)) for name in names}
    critic = Known(numbers(1))
    helpers: Mapping[str, nn.Module] = {**{name: called[name] for name in objective.helpers}, "critic": critic}
    turns = adversarial.turns(LATE)
    for turn in turns:
        turn.loss(Models(called[STUDENT], called["teacher"], helpers), batch, draw_for(8))
    for name, evals in adversarial.evals.items():
        if name != "critic":
            parts = [len(answer.x0) / 8 for answer in called[name].answers]
            trained = [turn.trains for turn in turns].count(name)
            assert evals.forward == sum(parts), name
            assert evals.backward == trained * (max(parts) if trained else 1), name
    judged = sum(len(y) for y, _ in critic.calls) / 8
    assert adversarial.evals["critic"] == (judged, judged)


def test_the_critic_has_a_training_of_its_own() -> None:
    training = Training(10, 1e-3, weight_decay=0.1, warmup_updates=3, dropout=0.2, ema_decay=0.9)
    helper = Adversarial(Halving(2), rate=3.0).helpers["critic"]
    assert isinstance(helper, Auxiliary)
    own = helper.training(training)
    assert [own.rate_at(update) for update in (0, 9)] == pytest.approx([3e-3, 3e-3])
    assert (own.num_updates, own.batch_size) == (10, training.batch_size)
    assert (own.weight_decay, own.dropout, own.ema_decay, own.adam_betas[0]) == (0, 0, 0, 0)


def test_it_is_described_and_built_again_with_what_it_wraps() -> None:
    for objective in (Halving(2, guidance=FixedGuidance(3.0)), Finishing(4, map_weight=0.3)):
        adversarial = Adversarial(objective, weight=0.2, lead_updates=7)
        data = json.loads(json.dumps(objectives.describe(adversarial)))
        assert objectives.rebuild(data) == adversarial


def test_guidance_of_a_plan_reaches_the_wrapped_objective() -> None:
    training = Training(70, 1e-3)
    plan = Plan.halvings(4, 1, training, updates_at={}).changed(Adversarial) + Plan.finishes([1], training)
    guided = plan.guided(GuidanceRange(1.0, 4.0))
    assert [stage.objective.guidance for stage in guided.stages] == [GuidanceRange(1.0, 4.0)] * 3
    assert plan.names() == ["00-halve-critic-0002", "01-halve-critic-0001", "02-finish-0001"]


@pytest.mark.parametrize("wrapped", [Denoising(), Matching(), Adversarial(Halving(2))])
def test_an_objective_whose_student_takes_no_steps_of_its_own_is_refused(wrapped: Objective) -> None:
    with pytest.raises(ValueError, match=r"which \w+ does not do\. Choose one of .*halve"):
        Adversarial(wrapped)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "weight of a critic must be a finite number above 0"),
        ({"rate": math.inf}, "rate of a critic must be a finite number above 0"),
        ({"delta": 0.0}, "delta of a critic must be a finite number above 0"),
        ({"gamma": -1.0}, "gamma of a critic must be a finite number of at least 0"),
        ({"lead_updates": -1}, "lead_updates must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adversarial(Halving(2), **wrong)


# The encoder half.


def _random(network: Network) -> Network:
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.double().eval()


def unet() -> UNet2D:
    return UNet2D(
        unet2d_config(
            size=(8, 8), in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
            attention=(False, True), attention_head_dim=8, norm_num_groups=8, num_classes=3,
        )
    )  # fmt: skip


def text_unet(**more: Any) -> Replay:
    shown = {"is": "embedding", "width": 8, "default": 1.0} if more else {"is": "value", "value": None}
    return replay(
        "UNet2DConditionModel",
        {
            "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 8, "attention_head_dim": 4, **more,
        },
        {"encoder_hidden_states": (5, 8)},
        timestep_cond=shown,
    )  # fmt: skip


def dit(layers: int = 3) -> Replay:
    return replay(
        "DiTTransformer2DModel",
        {
            "sample_size": 8, "in_channels": 2, "out_channels": 2, "num_layers": layers, "num_attention_heads": 2,
            "attention_head_dim": 4, "norm_num_groups": 2, "num_embeds_ada_norm": 4, "patch_size": 2,
        },
        {"class_labels": ()},
    )  # fmt: skip


def sd3(layers: int = 3) -> Replay:
    return replay(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": layers,
            "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 6, "caption_projection_dim": 8,
            "pooled_projection_dim": 5, "pos_embed_max_size": 8,
        },
        {"encoder_hidden_states": (5, 6), "pooled_projections": (5,)},
    )  # fmt: skip


def mlp(depth: int = 3) -> MLP:
    return MLP((2, 8, 8), width=8, depth=depth, num_classes=3)


def _tokens(output: Any) -> Tensor:
    """Return the features of a transformer's block: tokens, or those of the text followed by those of the latent."""
    both = torch.cat(list(output), dim=1) if isinstance(output, tuple) else output
    return both.transpose(1, 2)


LABELS = {"class_labels": torch.tensor([0, 2, 1])}
TEXT = {"encoder_hidden_states": numbers(3, 5, 8)}
CASES = [
    pytest.param(unet, "model.mid_block", LABELS, id="unet2d"),
    pytest.param(text_unet, "model.mid_block", TEXT, id="unet2d_condition"),
    pytest.param(
        functools.partial(text_unet, time_cond_proj_dim=8),
        "model.mid_block",
        {**TEXT, GUIDANCE: torch.tensor([1.0, 2.0, 7.0]).double()},
        id="unet2d_condition-guided",
    ),
    pytest.param(dit, "model.transformer_blocks.1", LABELS, id="dit"),
    pytest.param(
        sd3,
        "model.transformer_blocks.1",
        {"encoder_hidden_states": numbers(3, 5, 6), "pooled_projections": numbers(3, 5)},
        id="sd3",
    ),
    pytest.param(mlp, "downs.1", LABELS, id="mlp"),
]


@pytest.mark.parametrize(("make", "place", "cond"), CASES)
def test_the_half_computes_what_a_hook_sees_in_the_whole_network(
    make: Any, place: str, cond: Mapping[str, Tensor]
) -> None:
    network = _random(make())
    half = encoder_half(copy.deepcopy(network)).eval()
    x_t, time = numbers(3, 2, 8, 8, seed=3), torch.tensor([0.1, 0.5, 1.0]).double()
    seen: list[Any] = []
    module = network.get_submodule(place if not isinstance(network, MLP) else "norms.2")
    if isinstance(network, MLP):
        # The input of its third block.
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        module.register_forward_hook(lambda _, __, output: seen.append(output))
    network(x_t, time, **cond)
    found = half(x_t, time, **cond)
    expected = seen[0] if found.ndim != 3 else _tokens(seen[0])
    assert torch.equal(found, expected)
    assert found.shape[:2] == (3, half.channels)
    assert float(found.std()) > 0
    fewer = [sum(p.numel() for p in each.parameters()) for each in (half, network)]
    assert fewer[0] < 0.85 * fewer[1], "the decoder must be dropped"


@pytest.mark.parametrize(("make", "place", "cond"), CASES)
def test_every_weight_of_a_critic_takes_part(make: Any, place: str, cond: Mapping[str, Tensor]) -> None:
    """Otherwise DDP would wait for its gradient."""
    denoiser = NetworkDenoiser(_random(make()), VPCosine(), V())
    critic = critic_of(Models(denoiser, denoiser))
    y, tau = numbers(3, 2, 8, 8, seed=3), torch.tensor([0.1, 0.5, 1.0]).double()
    assert torch.equal(critic(y, tau, cond), torch.zeros(3).double()), "a fresh critic is undecided"
    nn.init.normal_(critic.leave.weight)
    critic(y, tau, cond).square().sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None, name


def test_a_critic_is_made_from_any_teacher_and_shares_no_weight() -> None:
    network = _random(unet()).float()
    assert isinstance(network, UNet2D)
    plain = NetworkDenoiser(network, VPCosine(), V())
    lora = NetworkDenoiser(with_lora(network, 2), VPCosine(), V())
    null = {"class_labels": torch.tensor(0)}
    teachers = [plain, in_precision(plain, "bf16"), Guided(plain, null, 2.0), lora]
    y, tau = numbers(3, 2, 8, 8, seed=3).float(), torch.tensor([0.1, 0.5, 1.0]).double()
    reference = critic_of(Models(plain, plain))
    nn.init.normal_(reference.leave.weight)
    for teacher in teachers:
        student = lora if teacher is lora else plain
        critic = critic_of(Models(student, teacher))
        own = {p.data_ptr() for p in critic.parameters()}
        assert not own & {p.data_ptr() for model in (student, teacher) for p in model.parameters()}
        assert all(p.requires_grad and p.dtype == torch.float32 for p in critic.parameters())
        critic.leave.load_state_dict(reference.leave.state_dict())
        # bfloat16 rounds the weights.
        atol = 0.1 if teacher is teachers[1] else 1e-6
        torch.testing.assert_close(critic(y, tau, LABELS), reference(y, tau, LABELS), rtol=0, atol=atol)


def test_only_a_critic_with_a_scale_input_receives_the_guidance_scale() -> None:
    y, tau = numbers(3, 2).float(), torch.tensor([0.1, 0.5, 1.0]).double()
    scale = {GUIDANCE: torch.tensor([1.0, 2.0, 7.0])}
    plain, shown = (
        NetworkDenoiser(MLP((2,), width=8, depth=2, guided=guided), VPCosine(), V()) for guided in (False, True)
    )
    without = critic_of(Models(plain, plain))
    nn.init.normal_(without.leave.weight)
    assert torch.equal(without(y, tau, scale), without(y, tau, {}))
    within = critic_of(Models(shown, plain))
    assert within.takes_guidance
    within(y, tau, scale)
    with pytest.raises(ValueError, match="needs the condition guidance_scale"):
        within(y, tau, {})


def test_a_teacher_without_an_encoder_half_is_rejected_in_one_line() -> None:
    own = GaussianDenoiser(VPCosine(), 0.3, 0.5)
    with pytest.raises(ValueError, match=r"GaussianDenoiser is unknown.*encoder_half\.register\(GaussianDenoiser\)"):
        critic_of(Models(own, own))
    elsewhere = Reprocessed(NetworkDenoiser(mlp(), VE(), V()), VPCosine(log_snr_min=-8, log_snr_max=8))
    with pytest.raises(ValueError, match="the encoder half of a Reprocessed is unknown"):
        critic_of(Models(elsewhere, elsewhere))


def test_a_user_defined_network_registers_its_encoder_half() -> None:
    denoiser = toy_denoiser(VPCosine(), V())
    critic = critic_of(Models(denoiser, denoiser))
    assert isinstance(critic.encoder, ToyHalf)
    assert isinstance(critic.encoder, EncoderHalf)


def test_the_critics_features_on_another_process_are_those_at_the_networks_own_time_and_scale() -> None:
    own, process = VE(0.01, 50.0), VPCosine(-7, 8)
    network = ToyNetwork(V())
    moved = NetworkDenoiser(OnProcess(network, own, process), process, V())
    critic = critic_of(Models(moved, moved))
    assert critic.encoder.channels == ToyHalf.channels
    y, tau = numbers(5, 2), torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0]).double()
    there = own.time_at(process.log_snr(tau))
    scale = own.alpha_sigma(there)[0] / process.alpha_sigma(tau)[0]
    torch.testing.assert_close(critic.encoder(y, tau), encoder_half(network)(scale[:, None] * y, there))
    # The half of a copy contains none of the network's other layers.
    grads = torch.autograd.grad(critic.encoder(y, tau).sum(), list(critic.encoder.parameters()))
    assert all(bool(grad.any()) for grad in grads)


def test_a_chain_with_a_critic_moves_a_users_network_to_another_process() -> None:
    training, x0 = Training(2, 1e-3, 8), numbers(64, 2).float()

    def judged(objective: Objective) -> Objective:
        return Adversarial(objective, lead_updates=0)

    student = halfstep.distill(
        NetworkDenoiser(ToyNetwork(X0()).float(), VPCosine(), X0()), x0,
        plan=halfstep.Plan.halvings(4, 2, training).changed(judged), process=VPCosine(-10, 10), matching=training,
        device="cpu", progress=False,
    )  # fmt: skip
    assert isinstance(student.network, OnProcess)


# In the engine.


def _trainer(objective: Objective, student: Denoiser, teacher: Denoiser, x0: Tensor, updates: int) -> StageTrainer:
    torch.set_num_threads(1)
    return StageTrainer(
        student,
        teacher,
        Stage(objective, Training(updates, 1e-2, 32, grad_clip=1e6)),
        lambda draw: Batch(x0[draw.order(len(x0))]),
        tuple(x0.shape[1:]),
        seed=0,
        stream="stage",
        accelerator=make_accelerator(cpu=True),
    )


def _toy(seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP((2,), width=8, depth=2), VPCosine(), V())


@every_wrapped
def test_in_the_engine_each_players_gradient_reaches_only_itself(objective: StepObjective) -> None:
    """Record the gradients before each optimiser step, in every turn of updates with the critic."""
    trainer = _trainer(Adversarial(objective, lead_updates=0), _toy(1), _toy(2), numbers(64, 2).float(), 70)
    seen: set[str] = set()
    for name, player in trainer.players.items():

        def watched(*arguments: Any, name: str = name, step: Any = player.step) -> None:
            for other_name, other in trainer.players.items():
                grads = [p.grad for p in other.network.parameters()]
                touched = any(grad is not None and bool(grad.any()) for grad in grads)
                assert touched == (other_name == name), (name, other_name)
            if trainer.update >= 65:
                seen.add(name)
            step(*arguments)

        player.step = watched  # type: ignore[method-assign]
    # The head of a fresh critic is 0, so its first gradient is that of the head alone.
    for _ in trainer.run():
        pass
    assert seen == set(trainer.players)


@every_wrapped
def test_a_student_under_the_lead_of_its_critic_is_the_student_without_one(objective: StepObjective) -> None:
    students = []
    for chosen in (objective, Adversarial(objective, lead_updates=70), Adversarial(objective, lead_updates=62)):
        trainer = _trainer(chosen, _toy(1), _toy(2), numbers(64, 2).float(), 64)
        for _ in trainer.run():
            pass
        students.append([p.clone() for p in trainer.student.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(students[0], students[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(students[0], students[2], strict=True))


class Affine(Denoiser):
    """A one-step student that maps to a line: x0 = mean + std x_t."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.process, self.mean = VPCosine(), nn.Parameter(torch.tensor(mean))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.mean + 0.5 * x_t
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


class PointHalf(EncoderHalf):
    """A few features of a number."""

    channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(2, 16)
        self.out = nn.Linear(16, self.channels)

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        features: Tensor = self.out(torch.tanh(self.enter(torch.cat([x_t, time[:, None].to(x_t)], dim=1))))
        return features


@encoder_half.register(Affine)
def _(network: Affine) -> EncoderHalf:
    return PointHalf()


class Nothing(Weighting):
    """A loss that is constant."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(log_snr)


def test_the_term_alone_repairs_a_wrong_mean() -> None:
    data = 0.3 + 0.5 * numbers(2048, 1, seed=4).float()
    teacher, student = Affine(-0.5), Affine(-0.5)
    objective = Adversarial(Halving(1, weighting=Nothing()), weight=1.0, rate=1.0, gamma=0.1, lead_updates=20)
    trainer = _trainer(objective, student, teacher, data, 300)
    means = []
    for _ in trainer.run():
        means.append(float(student.mean))
    assert means[19] == -0.5, "a fresh critic needs its lead updates"
    late = sum(means[-50:]) / 50
    assert abs(late - float(data.mean())) < 0.1
