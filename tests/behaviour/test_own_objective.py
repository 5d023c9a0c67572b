"""A researcher's objective with its own networks, two turns per update and a sampler other than DDIM.

No file of src contains `own_objective`. It passes through everything that the built-in objectives pass through.
"""

import contextlib
import json
import math
import os
import runpy
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halfstep
import own_objective
import teams
from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import V, predictions
from halfstep.models.folder import load
from halfstep.models.students import in_precision
from halfstep.nets import MLP, copy_denoiser, networks
from halfstep.objectives import (
    STUDENT,
    Auxiliary,
    Average,
    Batch,
    Evals,
    Helper,
    Losses,
    Models,
    Stage,
    Training,
    Turn,
    objectives,
)
from halfstep.recipes import recipes
from halfstep.registry import Registry
from halfstep.runs import RunFolder
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import Heun, sample, samplers
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine
from own_objective import Game
from support_cli import refused
from toys import TINY_DIGITS, points

LAST = "02-own_game-0004"
TRAINING = Training(num_updates=8, batch_size=12, learning_rate=1e-2, warmup_updates=2)


def words(folder: Path, out: str, *more: str) -> list[str]:
    """Return the command that runs the researcher's recipe into `folder/out`."""
    data = folder / "points.npy"
    if not data.exists():
        np.save(data, points(64).numpy())
    return ["run", "own_game", "--data", str(data), "--out", str(folder / out), *more]


def final(run: Path) -> dict[str, Tensor]:
    """Return the weights that the game passed on."""
    return load_file(run / "stages" / LAST / "model.safetensors")


def run_here(argv: list[str]) -> None:
    """Run a command, as a target for other processes."""
    own_objective.register()
    main(argv)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register the researcher's objective and recipe for the duration of these tests."""
    own_objective.register()
    yield
    for registry in (objectives, recipes):
        del registry["own_game"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    main(words(folder, "uncut"))
    return folder / "uncut"


def test_the_manifest_says_what_the_objective_declares_and_helpers_are_not_handed_on(uncut: Path) -> None:
    stage = RunFolder(uncut).stage(LAST)
    outcome = stage.manifest().outcome
    assert (outcome.role, outcome.num_steps, outcome.sampler["type"]) == ("student", 4, "heun")
    model = load(stage.path)
    assert model.sampler == Heun()
    assert final(uncut).keys() == load_file(uncut / "stages" / "01-halve-0004" / "model.safetensors").keys()
    assert {file.name for file in stage.path.iterdir()} == {
        "manifest.json", "metrics.json", "model.safetensors", "samples"
    }  # fmt: skip


def test_it_is_sampled_with_its_own_sampler(uncut: Path, tmp_path: Path) -> None:
    main(["sample", str(uncut), "--num-samples", "5", "--out", str(tmp_path / "drawn.npz")])
    model = load(uncut)
    by_hand = sample(model, model.noise(range(5)), 4, Heun())
    drawn = torch.from_numpy(np.load(tmp_path / "drawn.npz")["arr_0"])
    torch.testing.assert_close(drawn, by_hand, atol=1e-6, rtol=0)
    (result,) = json.loads((uncut / "stages" / LAST / "metrics.json").read_text())["results"]
    assert (result["sampler"], result["num_evals"]) == ("heun", Heun().num_evals(4))


@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
def test_a_run_cut_between_two_turns_resumes_bit_for_bit(
    uncut: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = words(tmp_path, "cut")
    if by == "SIGKILL":
        (left,) = teams.ended(teams.start(1, run_killed, tmp_path / "team", cut, by), tmp_path / "team")
        assert left == {}
    else:
        monkeypatch.setenv("KILLED_AT", "5")
        monkeypatch.setenv("KILLED_BY", by)
        with pytest.raises(SystemExit) as ended:
            main(cut)
        assert ended.value.code == 128 + signal.SIGTERM
        monkeypatch.delenv("KILLED_AT")
    assert list((tmp_path / "cut" / "stages" / LAST).glob("checkpoint-*/helper-critic.safetensors"))
    main(cut)
    for name, value in final(uncut).items():
        assert torch.equal(value, final(tmp_path / "cut")[name]), name


def run_killed(argv: list[str], by: str) -> None:
    """Kill a command in the middle of a pair of turns."""
    os.environ |= {"KILLED_AT": "5", "KILLED_BY": by}
    own_objective.register()
    main(argv)


@pytest.mark.parametrize("more", [(), ("--engine.sharding", "full")], ids=["ddp", "sharded"])
def test_two_processes_give_the_weights_of_one(uncut: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    teams.together(2, run_here, tmp_path / "team", words(tmp_path, "two", *more))
    for name, value in final(uncut).items():
        torch.testing.assert_close(final(tmp_path / "two")[name], value, atol=1e-5, rtol=0)


def test_micro_batches_give_the_weights_of_the_batch(uncut: Path, tmp_path: Path) -> None:
    main(words(tmp_path, "micro", "--engine.micro-batch", "5"))
    for name, value in final(uncut).items():
        torch.testing.assert_close(final(tmp_path / "micro")[name], value, atol=1e-5, rtol=0)


def test_the_micro_batch_search_uses_all_players(uncut: Path, tmp_path: Path) -> None:
    main(words(tmp_path, "auto", "--engine.micro-batch", "auto"))
    for name, value in final(uncut).items():
        assert torch.equal(value, final(tmp_path / "auto")[name]), name


def test_a_dry_run_counts_the_helpers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*words(tmp_path, "none"), "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    stage = facts["stages"][-1]
    # Forward passes of networks of one size: student 2 + 2 * 1, teacher 1, critic 2 + 2 * 1, average 1.
    assert stage["update_flops"] == pytest.approx((4 + 1 + 4 + 1) * 16 * facts["forward_flops"])
    weights = 4 * facts["parameters"]
    memory = facts["memory_bytes"]
    assert (memory["helpers"], memory["moments"], memory["gradients"]) == (2 * weights, 4 * weights, 2 * weights)


def test_each_player_is_in_the_log(uncut: Path) -> None:
    rows = [json.loads(line) for line in (uncut / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == LAST][-1]
    assert last["update"] == 12
    assert all(math.isfinite(last[name]) for name in ("loss", "grad_norm", "critic_loss", "critic_grad_norm"))


def test_it_is_evaluated_reported_and_listed_by_its_role_and_sampler(
    uncut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["evaluate", str(uncut), "--num-samples", "24"])
    evaluation = RunFolder(uncut).evaluation()
    assert evaluation is not None
    samplers = {series.name: series.sampler for series in evaluation.series}
    rows = {(row.stage, samplers[row.series], row.num_steps) for row in evaluation.tables[0].rows}
    assert {("01-halve-0004", "ddim", 4), (LAST, "heun", 4), ("00-denoise", "ddim", 8)} <= rows
    main(["report", str(uncut)])
    page = (uncut / "report" / "index.html").read_text()
    assert LAST in page
    assert "heun" in page.lower()
    capsys.readouterr()
    main(["status", str(uncut), "--json"])
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["role"], stage["num_steps"]) for stage in stages] == [
        ("teacher", None),
        ("student", 4),
        ("student", 4),
    ]


def test_its_graph_takes_the_steps_of_its_own_sampler_and_a_stock_pipeline_is_refused(
    uncut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(uncut), "--format", "onnx", "--out", str(tmp_path / "own.onnx")])
    graph = onnxruntime.InferenceSession(tmp_path / "own.onnx")
    model = load(uncut)
    noise = model.noise(range(3)) / model.process.start_scale
    (found,) = graph.run(None, {graph.get_inputs()[0].name: noise.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.sample(range(3)), atol=1e-4, rtol=0)
    assert "diffusers" in refused(["export", str(uncut), "--out", str(tmp_path / "stock")], capsys)
    assert not (tmp_path / "stock").exists()


ADVICE = (
    "If your own file registers it, import that file. On the command line, end the file with halfstep.cli.main() and "
    "run: python FILE VERB ..."
)


@contextlib.contextmanager
def unregistered(registry: Registry[Any], name: str) -> Iterator[None]:
    """Remove a name from a registry, and restore the registry with its order."""
    held = dict(registry)
    del registry[name]
    try:
        yield
    finally:
        registry.clear()
        registry.update(held)


def test_without_its_file_a_verb_says_how_to_make_the_names_known_and_with_it_the_verb_works(
    uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["sample", str(uncut), "--num-samples", "1", "--out", str(tmp_path / "drawn.npz")]
    here = f"{uncut / 'recipe.json'}: further.0.objective: "
    with unregistered(objectives, "own_game"), unregistered(recipes, "own_game"):
        for start, argv in (
            (f"{here}unknown objective 'own_game'", ["run", str(uncut)]),
            (f"{here}unknown objective 'own_game'", ["finish", str(uncut)]),
            (f"{here}unknown objective 'own_game'", ["evaluate", str(uncut)]),
            ("unknown recipe 'own_game'", words(tmp_path, "new")),
            ("--sampler: unknown sampler 'mine'", [*drawn, "--sampler", "mine"]),
            ("--model.weighting: unknown weighting 'mine'", ["run", "arrays", "--model.weighting", "mine"]),
            ("unknown feature extractor 'mine'", ["run", "arrays", "--evaluation.features", "mine"]),
        ):
            message = refused(argv, capsys)
            assert message.startswith(start)
            assert ADVICE in message
        for registry, name in ((samplers, "heun"), (networks, "mlp"), (processes, "vp_cosine"), (predictions, "v")):
            with unregistered(registry, name):
                message = refused(drawn, capsys)
            assert message.startswith(f"unknown {registry.family} {name!r}")
            assert ADVICE in message
        # These verbs need no registration.
        main(["status", str(uncut)])
        main(["report", str(uncut)])
        # Run the file as the message says. It registers both again.
        monkeypatch.setattr("sys.argv", [own_objective.__file__, "run", str(uncut), "--dry-run"])
        runpy.run_path(own_objective.__file__, run_name="__main__")
        assert "own_game" in capsys.readouterr().out


# Compare the engine with the same training written in plain torch.


def denoiser(seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    network = MLP((2,), width=8, depth=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return NetworkDenoiser(network, VPCosine(), V())


def data(draw: Draw) -> Batch:
    return Batch(points()[draw.order(200)])


def made_trainer(objective: Game, training: Training = TRAINING, micro_batch: int | None = None) -> StageTrainer:
    return StageTrainer(
        denoiser(1), denoiser(0), Stage(objective, training), data, (2,),
        seed=0, stream="game", accelerator=make_accelerator(cpu=True), engine=Engine(micro_batch=micro_batch),
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_turns_are_steps_of_adamw_in_their_order_with_random_numbers_of_their_own(micro_batch: int | None) -> None:
    game = Game(pull=2.0)
    trainer = made_trainer(game, micro_batch=micro_batch)
    for _ in trainer.run():
        pass
    teacher, student = denoiser(0), denoiser(1)
    critic, slow = copy_denoiser(student), copy_denoiser(student)
    models = Models(student, teacher, {"critic": critic, "slow": slow})
    optimizers = {
        "critic": torch.optim.AdamW(critic.parameters(), weight_decay=0.0),
        STUDENT: torch.optim.AdamW(student.parameters(), weight_decay=0.0),
    }
    for update in range(TRAINING.num_updates):
        rate = TRAINING.rate_at(update)
        for name, stream, loss in (
            ("critic", "game", game.critic_loss),
            (STUDENT, "game, turn 1", game.loss),
        ):
            draw = Draw(0, stream, update, 12, range(12))
            optimizers[name].zero_grad()
            loss(models, data(draw), draw).loss.mean().backward()
            optimizers[name].param_groups[0]["lr"] = 2 * rate if name == "critic" else rate
            trained = critic if name == "critic" else student
            torch.nn.utils.clip_grad_norm_(trained.parameters(), TRAINING.grad_clip)
            optimizers[name].step()
        decay = min(0.9, (2 + update) / (11 + update))
        with torch.no_grad():
            for average, weight in zip(slow.parameters(), student.parameters(), strict=True):
                average.mul_(decay).add_(weight, alpha=1 - decay)
    found = trainer.finish()
    for mine, theirs in ((found, student), (trainer.players["critic"].model, critic)):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), atol=2e-6, rtol=0)
    for one, other in zip(trainer._copies["slow"].parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), atol=2e-6, rtol=0)


def test_the_gradient_reaches_only_the_player_whose_turn_it_is() -> None:
    trainer = made_trainer(Game(pull=2.0))
    stepped: list[str] = []
    for name, player in trainer.players.items():
        original = player.step

        def step(update: int, rate: float, loss: Tensor, name: str = name, original: Any = original) -> None:
            for other, held in trainer.players.items():
                given = [parameter.grad is not None for parameter in held.network.parameters()]
                assert all(given) if other == name else not any(given), (name, other)
            assert all(parameter.grad is None for parameter in trainer._copies["slow"].parameters())
            stepped.append(name)
            original(update, rate, loss)

        player.step = step  # type: ignore[method-assign]
    for _ in trainer.run():
        pass
    assert stepped == ["critic", STUDENT] * TRAINING.num_updates


class Headed(nn.Module):
    """A critic with a frozen first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)

    def forward(self, x0: Tensor) -> Tensor:
        judged: Tensor = self.head(torch.tanh(self.backbone(x0)))[:, 0]
        return judged


@dataclass(frozen=True)
class Judged(Game):
    """The game with a critic that has a frozen first layer, or only frozen layers."""

    student_first: bool = False
    all_frozen: bool = False

    @property
    def helpers(self) -> Mapping[str, Helper]:
        def start(models: Models, shape: tuple[int, ...]) -> nn.Module:
            return Headed().requires_grad_(False) if self.all_frozen else Headed()

        return {"critic": Auxiliary(start, lambda own: own.of_helper(2.0, weight_decay=0.1)), "slow": Average(0.9)}

    def turns(self, update: int) -> tuple[Turn, ...]:
        critic, student = super().turns(update)
        return (student, critic) if self.student_first else (critic, student)

    def critic_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        with torch.no_grad():
            made, log_snr = self._made(models, batch, draw)
        judge = models.helpers["critic"]
        return Losses(nn.functional.softplus(judge(made)) + nn.functional.softplus(-judge(batch.x0)), log_snr)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        made, log_snr = self._made(models, batch, draw)
        return Losses(nn.functional.softplus(-models.helpers["critic"](made)), log_snr)

    def _made(self, models: Models, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        t, eps = self._noisy(batch, draw)
        process = models.student.process
        return models.student(process.mix(batch.x0, eps, t), t, batch.cond).x0, process.log_snr(t)


@pytest.mark.parametrize("student_first", [False, True])
def test_frozen_layers_of_a_helper_stay_frozen_and_resume(student_first: bool) -> None:
    trainer, again = (made_trainer(Judged(student_first=student_first)) for _ in range(2))
    critic = trainer.players["critic"]
    before = {name: value.clone() for name, value in critic.network.state_dict().items()}
    for update in trainer.run():
        assert [p.requires_grad for p in critic.network.parameters()] == [False, False, True, True]
        assert [torch.equal(value, before[name]) for name, value in critic.network.state_dict().items()] == [
            True, True, False, False
        ]  # fmt: skip
        if update == 4:
            again.load_state(trainer.state(), 4, 0.0)
    assert {name.partition(".")[2] for name in trainer.state()["helper-critic-optimizer"]} == {
        "head.weight", "head.bias"
    }  # fmt: skip
    list(again.run())
    for part, tensors in trainer.state().items():
        assert all(torch.equal(again.state()[part][name], value) for name, value in tensors.items()), part


def test_a_helper_of_only_frozen_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all weights of the network of critic are frozen\. Call requires_grad_"):
        made_trainer(Judged(all_frozen=True))


@dataclass(frozen=True)
class Broken(Game):
    """The game with a critic whose loss is not finite at one update."""

    def critic_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        loss, log_snr = super().critic_loss(models, batch, draw)
        return Losses(loss * (math.inf if draw.update == 3 else 1), log_snr)


def test_a_diverging_helper_is_reported() -> None:
    trainer = made_trainer(Broken())
    for _ in trainer.run():
        pass
    with pytest.raises(NonFinite, match=r"the loss of critic or its gradient was not finite in stage game at update 3"):
        trainer.check_finite()


@dataclass(frozen=True)
class Seldom(Game):
    """The game with a turn of the student in every third update only."""

    def turns(self, update: int) -> tuple[Turn, ...]:
        critic, student = super().turns(update)
        return (critic, student) if update % 3 == 2 else (critic,)


def test_turns_may_differ_from_update_to_update_and_resume() -> None:
    whole = made_trainer(Seldom())
    for _ in whole.run():
        pass
    assert (whole.student.steps, whole.players["critic"].steps) == (2, 8)
    first = made_trainer(Seldom())
    for update in first.run():
        if update == 4:
            break
    rest = made_trainer(Seldom())
    rest.load_state(first.state(), first.update, 0.0)
    assert (rest.student.steps, rest.players["critic"].steps) == (1, 4)
    for _ in rest.run():
        pass
    for name, player in whole.players.items():
        for one, other in zip(player.model.parameters(), rest.players[name].model.parameters(), strict=True):
            assert torch.equal(one, other)


@dataclass(frozen=True)
class Wrong(Game):
    """The game with other helpers or turns."""

    other: str = "average"

    @property
    def helpers(self) -> Mapping[str, Helper]:
        critic = super().helpers["critic"]
        assert isinstance(critic, Auxiliary)
        return {
            "average": {"slow": Average(0.9, "nobody")},
            "name": {"student": critic},
            "capital": {"Critic": critic},
            "updates": {"critic": Auxiliary(critic.start, lambda own: replace(own, num_updates=3))},
            "ema": {"critic": Auxiliary(critic.start, lambda own: replace(own, ema_decay=0.5))},
            "turn": {},
        }[self.other]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("average", "helper slow copies 'nobody', but the players are student"),
        ("name", "a helper cannot be named 'student'"),
        ("capital", "a helper cannot be named 'Critic'"),
        ("updates", "helper critic has num_updates 3, but its stage has 8. Use"),
        ("ema", "ema_decay and early_end of helper critic have no effect. Use an Average"),
        ("turn", "turn 0 of update 0 trains 'critic', but stage game has the players student"),
    ],
)
def test_contradictions_are_refused_in_one_line(other: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(made_trainer(Wrong(other=other)).run()))


def test_a_helper_in_bfloat16_is_refused() -> None:
    @dataclass(frozen=True)
    class OfTheTeacher(Game):
        @property
        def helpers(self) -> Mapping[str, Helper]:
            return {"critic": Auxiliary(lambda models, _: copy_denoiser(models.teacher), lambda own: own)}

    with pytest.raises(
        ValueError, match=r"helper critic is a copy of a teacher in bfloat16\. Start it from the student"
    ):
        StageTrainer(
            denoiser(1), in_precision(denoiser(0), "bf16"), Stage(OfTheTeacher(), TRAINING), data, (2,),
            seed=0, stream="game", accelerator=make_accelerator(cpu=True),
        )  # fmt: skip


def test_the_average_is_none_of_the_student_s_own_and_evals_name_every_network() -> None:
    assert set(Game().evals) == {STUDENT, "teacher", *Game().helpers}
    assert all(isinstance(evals, Evals) for evals in Game().evals.values())
    assert objectives.rebuild(own_objective.own_game().further[0].objective) == Game()
    assert objectives.describe(Game()) == own_objective.own_game().further[0].objective


def test_the_objective_of_the_contributing_guide_runs_as_it_stands_there(tmp_path: Path) -> None:
    """Both blocks of the guide form one file: the command line runs its recipe, and `distill` uses its class."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().partition("**an objective**")[2]
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:3]]
    scope: dict[str, Any] = {"__name__": "my_method"}
    try:
        exec("\n".join(blocks), scope)
        options = [*TINY_DIGITS, "--evaluation.features", "pixels", "--chain.start-steps", "8"]
        small = {"num_updates": 2, "batch_size": 8}
        recipes["my_recipe"] = lambda: _shortened(scope["my_recipe"](), small)
        main(["run", "my_recipe", "--out", str(tmp_path / "run"), "--engine.cpu", *options])
        stages = [stage.manifest() for stage in RunFolder(tmp_path / "run").stages()]
        assert [stage.objective for stage in stages] == ["denoise", "halve", "my_method"]
        assert load(tmp_path / "run").num_steps == 2
        plan = halfstep.Plan.of(scope["MyMethod"](4), TRAINING)
        teacher = NetworkDenoiser(MLP((2,), width=8, depth=1), VPCosine(), V())
        student = halfstep.distill(teacher, points(), plan=plan, engine=Engine(cpu=True))
        assert (student.num_steps, student.manifest.objective) == (4, "my_method")
    finally:
        objectives.pop("my_method", None)
        recipes.pop("my_recipe", None)


def _shortened(recipe: Any, changes: dict[str, Any]) -> Any:
    further = [config.model_copy(update={"training": replace(config.training, **changes)}) for config in recipe.further]
    return recipe.model_copy(update={"further": further})
