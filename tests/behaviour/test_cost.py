"""The counts of a dry run are exact: parameters, operations, memory, and the stand-in for the data."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from halfstep.data import DataConfig, StandIn
from halfstep.nets import MLP
from halfstep.objectives import FINISHING, Adversarial, EarlyEnd, Finishing, Halving, Objective, Plan, Stage, Training
from halfstep.recipes import DataFacts, Recipe, UNetConfig, build, recipes
from halfstep.recipes.building import data_or_stand_in
from halfstep.recipes.paper import PAPER_CIFAR10
from halfstep.recipes.schema import ChainConfig, FinishConfig
from halfstep.run import cost
from halfstep.run.cost import Memory, Size, count_forward, memory_of_update, time_updates
from halfstep.train.settings import Engine
from toys import toy_plan, toy_spec, tuned

PAPER = [name for name in recipes if name.endswith("_paper")]


def test_the_flops_of_a_forward_pass_are_those_of_its_matrices() -> None:
    """Linear layers cost two operations per weight, which dominate the cost of a wide MLP."""
    spec = toy_spec(network=lambda: MLP((2,), width=16, depth=1))
    assert spec.network is not None
    linear = [module for module in spec.network().modules() if isinstance(module, torch.nn.Linear)]
    assert count_forward(spec).flops == 2 * sum(module.weight.numel() for module in linear)


def test_what_autograd_keeps_is_counted_without_weights_and_each_tensor_once() -> None:
    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            scaled = x_t * self.weight  # keeps x_t (2 numbers); weights are not activations
            return scaled * scaled  # keeps `scaled` (2 numbers) twice

    counted = count_forward(toy_spec(network=Square))
    assert counted.saved_bytes == 4 * (2 + 2)
    assert counted.parameters == 2


def states(memory: Memory) -> int:
    return sum(memory) - memory.activations


def test_the_memory_of_an_update_counts_every_copy_of_the_weights_and_one_micro_batch() -> None:
    forward = count_forward(toy_spec())
    teacher, student = toy_plan().stages[:2]
    weights = 4 * forward.parameters
    # weights, gradients, two moments, and either an average or a teacher
    assert states(memory_of_update(teacher, forward, Engine(), {})) == 5 * weights
    assert states(memory_of_update(student, forward, Engine(), {})) == 5 * weights
    assert states(memory_of_update(tuned(teacher, ema_decay=0.0), forward, Engine(), {})) == 4 * weights
    assert memory_of_update(teacher, forward, Engine(micro_batch=4), {}).activations == 4 * forward.saved_bytes
    assert memory_of_update(teacher, forward, Engine(micro_batch=10**6), {}).activations == 16 * forward.saved_bytes


def test_activations_are_those_of_all_calls_of_a_turn_and_of_one_turn_only() -> None:
    forward = count_forward(toy_spec())
    whole = forward.parameters
    helpers = {"auxiliary": Size(whole, whole, whole), "start": Size(whole, 0, whole), "critic": Size(whole, whole, 0)}
    training = replace(FINISHING, batch_size=8)

    def calls_kept(objective: Objective) -> float:
        activations = memory_of_update(Stage(objective, training), forward, Engine(), helpers).activations
        return activations / (8 * forward.saved_bytes)

    assert calls_kept(Halving(2)) == 1
    assert calls_kept(Finishing(2, data_weight=0.0, auxiliary_turns=3)) == 1
    assert calls_kept(Finishing(2, auxiliary_turns=3)) == 2, "the landing points and the data"
    assert calls_kept(Adversarial(Halving(2))) == 4, "at most: three in the critic's turn and one in the student's"


def test_a_forward_pass_is_counted_on_the_meta_device_whatever_its_size() -> None:
    recipe = Recipe(
        name="big", network=PAPER_CIFAR10, facts=DataFacts(shape=(3, 32, 32), num_samples=9),
        data=DataConfig(source="nowhere"),
    )  # fmt: skip
    data, _ = data_or_stand_in(recipe)
    forward = count_forward(build(recipe, data=data))
    # A U-Net uses its convolutions once per pixel: far more operations than two per weight.
    assert forward.parameters == 60_004_099
    assert 100 * forward.parameters < forward.flops < 2 * 32 * 32 * forward.parameters


def test_a_large_update_is_extrapolated_from_smaller_ones() -> None:
    spec = toy_spec(plan=Plan(tuple(tuned(s, batch_size=512) for s in toy_plan().stages)))
    forward = count_forward(spec)
    assert time_updates(spec, forward).batch_size == 512


@pytest.mark.parametrize(("own", "each", "timed"), [(0.0, 0.01, 8), (0.5, 0.01, 128), (0.0, 4.0, 8)])
def test_the_extrapolated_time_is_that_of_an_update_with_a_cost_of_its_own_and_one_a_sample(
    own: float, each: float, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If fixed costs hide those of a sample, larger batches are tried until they show."""
    spec = toy_spec(plan=Plan(tuple(tuned(s, batch_size=512) for s in toy_plan().stages)))
    slow = count_forward(spec)._replace(flops=int(1e11 / 3 / 4))
    monkeypatch.setattr(cost, "_seconds", lambda spec, stage: own + each * stage.training.batch_size)
    rate = time_updates(spec, slow)
    assert rate.batch_size == timed
    assert rate.seconds == pytest.approx(own + each * 512)


def test_a_student_s_update_costs_its_teacher_s_steps_more() -> None:
    chain = Plan.halvings(12, training=Training(1, 1.0, batch_size=10), students=(6, 2))
    assert [stage.update_cost for stage in chain.stages] == [50.0, 60.0]


def test_random_pixels_stand_in_only_where_the_data_is_not_at_hand() -> None:
    known = Recipe(name="known", data=DataConfig(source="digits"), facts=DataFacts(shape=(3, 4, 4), num_samples=9))
    data, missing = data_or_stand_in(known)
    assert missing is None
    assert data.shape == (1, 8, 8)
    facts = DataFacts(shape=(3, 4, 4), num_samples=9, num_classes=5)
    for source in ("nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere"):
        data, missing = data_or_stand_in(Recipe(name="far", data=DataConfig(source=source), facts=facts))
        assert isinstance(data, StandIn)
        assert missing is not None
        assert "does not exist" in missing
    batch = data.fetch(torch.arange(9))
    assert batch.x0.shape == (9, 3, 4, 4)
    assert float(batch.x0.abs().max()) <= 1
    assert set(batch.cond["class_labels"].tolist()) <= set(range(5))
    other = DataConfig(source="owner/name", image_size=8, channels=1, labels=False, limit=5)
    data, missing = data_or_stand_in(Recipe(name="hub", data=other, facts=facts))
    assert missing == "owner/name is a data set on the Hub, and a dry run downloads nothing"
    assert (data.shape, len(data), data.num_classes) == ((1, 8, 8), 5, 0)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        data_or_stand_in(Recipe(name="unknown", data=DataConfig(source="nowhere")))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_make_a_run_and_cost_what_the_paper_says(name: str) -> None:
    """Updates down to 4 steps are at most those of base training; 50,000 per stage, and 100,000 for the last two."""
    recipe = recipes[name]()
    facts = recipe.facts
    assert facts is not None
    spec = build(
        recipe, data=StandIn("here", facts.shape, facts.num_samples, tuple(map(str, range(facts.num_classes))))
    )
    teacher, *students = spec.plan.stages
    assert teacher.training.num_updates == {"c": 800_000, "i": 550_000, "l": 400_000}[name[0]]
    assert sum(s.training.num_updates for s in students if (s.num_steps or 0) >= 4) <= teacher.training.num_updates
    assert [s.training.num_updates for s in students[-2:]] == [100_000, 100_000]
    assert recipe.network.num_train_timesteps >= recipe.chain.start_steps  # type: ignore[union-attr]
    trainings = [s.training for s in students]
    assert all(not t.weight_decay and not t.dropout and not t.ema_decay and t.anneal for t in trainings)


def test_settings_of_a_chain_without_effect_are_rejected() -> None:
    idle = {"num_updates": 5, "learning_rate": 1e-3, "early_end": {"window": 7}}
    for settings, said in (
        ({"training": idle}, r"window 7 has no effect while early_end\.patience is 0\. Set early_end\.patience to"),
        ({"students": (8, 4), "end_steps": 2}, "the students end at 4 steps. Remove end_steps 2"),
        ({"students": (8, 4), "factor": 4}, "so a factor of 4 has no effect. Remove it"),
        ({"students": ()}, "the list of students is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe(name="x", chain=recipes["arrays"]().chain.model_validate(settings)).chain_plan()
    with pytest.raises(ValueError, match="early_end has no effect on a finish"):
        FinishConfig(steps=(1,), training=Training(200, 1e-3, early_end=EarlyEnd(patience=2))).plan()
    chain = recipes["arrays"]().chain.model_copy(update={"keep": (8, 3)})
    with pytest.raises(ValueError, match=r"keep contains a 3-step student, .* Choose from 8, 4"):
        Recipe(name="x", chain=chain).chain_plan()
    assert UNetConfig().num_train_timesteps == 1024


def test_a_list_of_students_replaces_the_end_of_the_recipe() -> None:
    chain = ChainConfig(start_steps=16, end_steps=4, students=(8, 2))
    recipe = Recipe(name="x", chain=chain)
    fitted = recipe.fitted({"chain.students"})
    assert [stage.num_steps for stage in fitted.chain_plan().stages] == [8, 2]
    for given in ({"chain.students", "chain.end_steps"}, set[str]()):
        with pytest.raises(ValueError, match=r"the students end at 2 steps\. Remove end_steps 4"):
            recipe.fitted(given)


def test_students_of_further_stages_are_finished() -> None:
    further = [
        {"objective": {"type": "consistency", "num_steps": 2}, "training": {"num_updates": 4, "learning_rate": 1e-3}}
    ]
    settings: dict[str, Any] = {"chain": {"start_steps": 8, "end_steps": 4}, "further": further}
    recipe = Recipe.model_validate({"name": "x", "finish": {"steps": [8, 4, 2, 1]}} | settings)
    assert recipe.fitted(set()).finish.steps == (4, 2)


PUBLISHED = {
    # teacher: batch, rate, weight decay, dropout; chain: rate; first steps; prediction. Paper.md, table e.4.
    "cifar10_paper": (128, 2e-4, 0.001, 0.2, 5e-5, 8192, "x0"),
    "imagenet64_paper": (2048, 3e-4, 0.0, 0.1, 1e-4, 1024, "both"),
    "lsun_bedroom128_paper": (2048, 3e-4, 0.0, 0.1, 1e-4, 1024, "both"),
    "lsun_church128_paper": (2048, 3e-4, 0.0, 0.1, 1e-4, 1024, "both"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_the_authors_settings(name: str) -> None:
    batch, rate, decay, dropout, chain_rate, start, prediction = PUBLISHED[name]
    recipe = recipes[name]()
    teacher, chain = recipe.teacher, recipe.chain.training
    assert (teacher.batch_size, teacher.learning_rate) == (batch, rate)
    assert (teacher.weight_decay, teacher.dropout, teacher.ema_decay) == (decay, dropout, 0.9999)
    assert (teacher.warmup_updates, teacher.anneal, teacher.grad_clip) == (1000, False, 1.0)
    assert (chain.batch_size, chain.learning_rate, chain.warmup_updates) == (batch, chain_rate, 0)
    assert (recipe.chain.start_steps, chain.num_updates, chain.grad_clip) == (start, 50_000, 1.0)
    assert teacher.adam_betas == chain.adam_betas == (0.9, 0.999)
    assert (recipe.model.prediction, recipe.model.weighting) == (prediction, "truncated_snr")
    assert recipe.data.flip
    assert recipe.engine.precision == "float32"
    assert recipe.model.conditional == (name == "imagenet64_paper")
