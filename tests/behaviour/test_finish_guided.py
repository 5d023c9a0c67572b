"""Finishes of guided, conditional and LoRA students, from the command to samples."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from halfstep.cli import main
from halfstep.core.denoiser import GUIDANCE, Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import Denoised
from halfstep.models.folder import load
from halfstep.nets import LoRA
from halfstep.objectives import Batch, Finishing, FixedGuidance, Guidance, GuidanceRange, Models
from support import gaussian, numbers
from support_cli import Capture
from support_pipelines import save_sd


class Recording(Denoiser):
    """Another denoiser that records the conditions of its calls."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.shown: list[dict[str, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        self.shown.append(dict(cond or {}))
        return self.denoiser(x_t, t, cond)


@pytest.mark.parametrize("guidance", [None, FixedGuidance(3.0), GuidanceRange(1.0, 4.0)])
def test_every_network_of_a_turn_receives_the_classes_and_one_scale_if_a_range_was_learned(
    guidance: Guidance | None,
) -> None:
    count, objective = 16, Finishing(2, guidance=guidance)
    draw = Draw(seed=5, stream="finish", update=3, batch_size=count, places=range(count))
    batch = Batch(numbers(count, 2), {"class_labels": torch.arange(count) % 3})
    found = {name: Recording(gaussian(VPCosine())) for name in ("student", "teacher", "auxiliary", "start")}
    helpers = {name: found[name] for name in ("auxiliary", "start")}
    models = Models(found["student"], found["teacher"], helpers)
    for turn in (objective.loss, objective.auxiliary_loss):
        for recorder in found.values():
            recorder.shown.clear()
        turn(models, batch, draw)
        shown = [cond for recorder in found.values() for cond in recorder.shown]
        calls_of_auxiliary_turn = 3 if guidance is None else 2  # with data, the teacher is called, too
        assert len(shown) == (4 if turn == objective.loss else calls_of_auxiliary_turn)
        for cond in shown:
            labels = batch.cond["class_labels"]
            assert torch.equal(cond["class_labels"], labels.repeat(len(cond["class_labels"]) // count))
            assert (GUIDANCE in cond) == isinstance(guidance, GuidanceRange)
            if GUIDANCE in cond:
                assert torch.equal(cond[GUIDANCE], shown[0][GUIDANCE])
                assert float(cond[GUIDANCE].min()) >= 1
                assert 1 < float(cond[GUIDANCE].max()) <= 4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a text-to-image pipeline and encoded images with captions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("texts")
    made = save_sd(folder / "sd", folder / "tokens")
    (folder / "images").mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8), (40 * index, 10, 200)).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text("ab"[index % 2])
    main(["encode", str(made), "--data", str(folder / "images"), "--out", str(folder / "latents")])
    return str(made), str(folder / "latents")


BUDGET = [
    *("--to", "1", "--start", "4", "--matching.num-updates", "3", "--matching.batch-size", "4"),
    *("--chain.num-updates", "2", "--chain.batch-size", "4", "--chain.updates-at", "2", "2"),
    *("--finish.num-updates", "4", "--finish.batch-size", "4", "--finish.lead-updates", "2", "--engine.threads", "1"),
    *("--evaluation.no-enabled", "--engine.log-every", "1"),
]


@pytest.mark.parametrize(
    "settings",
    [("--matching.guidance-range", "1", "4"), ("--matching.guidance-scale", "3", "--chain.lora-rank", "2")],
    ids=["range", "fixed-lora"],
)
def test_a_text_conditional_student_is_finished(
    pipeline: tuple[str, str], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    teacher, latents = pipeline
    out = tmp_path / "run"
    main(["distill", teacher, "--data", latents, "--out", str(out), "--finish.steps", "2", "1", *settings, *BUDGET])
    finished = load(out)
    assert finished.manifest.stage == "05-finish-0001"
    assert (finished.manifest.parent, finished.manifest.teacher) == ("03-halve-0001", "01-match")
    assert finished.guidance == load(out / "stages" / "01-match").guidance
    assert finished.guidance is not None
    assert finished.num_steps == 1
    assert isinstance(finished.denoiser.network, LoRA) == ("--chain.lora-rank" in settings)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["stage"] == "05-finish-0001"]
    assert ["loss" in row for row in own] == [False, False, True, True]
    assert all("auxiliary_loss" in row for row in own)


def test_a_dry_run_of_lora_students_counts_the_shared_weights_once(
    pipeline: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    teacher, latents = pipeline
    words = ["distill", teacher, "--data", latents, "--out", str(tmp_path / "none"), "--finish.steps", "1"]
    settings = ["--matching.guidance-scale", "3", "--chain.lora-rank", "2", "--chain.updates-at", "2", "2"]
    capsys.readouterr()
    main([*words, *settings, *BUDGET, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    own, memory = facts["trainable_parameters"], facts["memory_bytes"]
    assert own < facts["parameters"] / 5
    # Student and auxiliary are trained. Teacher, auxiliary and start only have LoRA weights of their own.
    assert memory["weights"] == 4 * facts["parameters"]
    assert (memory["teacher"], memory["helpers"], memory["average"]) == (4 * own, 2 * 4 * own, 4 * own)
    assert (memory["gradients"], memory["moments"]) == (2 * 4 * own, 2 * 8 * own)
