"""Pipelines without specific code in the library: the inputs of their networks are recorded from their own calls.

Our samples equal the pipeline's from the same noise, prompts, steps and guidance.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from scipy.io import wavfile
from torch import Tensor

import support_pipelines
from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import FlowMatching, processes
from halfstep.core.prediction import X0
from halfstep.hub import decoder_of, export_pipeline, import_pipeline, text_conditions
from halfstep.hub.card import call_of, lora_card
from halfstep.hub.clock import grid_of
from halfstep.hub.pipelines import load_pipeline
from halfstep.hub.recording import SCALE, Recording, _guiding, record, verify
from halfstep.hub.schedulers import (
    SOLVERS,
    StockSchedule,
    config_of,
    first_order,
    multistep,
    read_schedule,
    write_schedule,
)
from halfstep.hub.stock import stock
from halfstep.hub.trace import Call, Step, Trace, component_of, prompted, trace
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import Replay, on_integers
from halfstep.runs import Outcome, RunFolder
from halfstep.samplers import DDIM, sample
from support_cli import Capture, refused
from support_pipelines import assert_same, noise, quietly, times_of

PROMPTS: Final = ["a cat", "b on a mat"]


class Family(NamedTuple):
    """A tiny pipeline and its call."""

    options: dict[str, Any]
    facts: dict[str, Any]
    """The facts that the recording must find."""
    steps: tuple[int, int] = (4, 12)
    """A table of 1000 levels cannot be divided into 12 equal steps."""


SQUARE: Final = {"height": 8, "width": 8}
VIDEO: Final = {"height": 16, "width": 16, "num_frames": 5}
PLAIN: Final = {"use_resolution_binning": False}
FAMILIES: Final = {
    "sdxl": Family(SQUARE, {"of": "u", "prediction": "eps"}, (4, 10)),
    "lcm": Family(SQUARE, {"of": "u", "prediction": "v"}, (4, 10)),
    "flux": Family({"height": 16, "width": 8}, {"of": "sigma", "scale": 1, "prediction": "flow_velocity"}),
    "flux_schnell": Family(SQUARE, {"of": "sigma", "scale": 1}),
    "pixart": Family(SQUARE | PLAIN, {"part": "first"}, (4, 10)),
    "wan": Family(VIDEO | {"max_sequence_length": 16}, {"of": "sigma", "scale": 1000}),
    "qwen": Family({"height": 16, "width": 16}, {"restores_norm": True}),
    "sana": Family({"height": 32, "width": 32} | PLAIN, {"scale": 1000}),
    "cogvideox": Family(VIDEO, {"of": "u", "prediction": "v"}, (4, 10)),
    "lumina2": Family({"height": 16, "width": 16}, {"scale": -1, "offset": 1, "sign": -1, "restores_norm": True}),
    "z_image": Family({"height": 16, "width": 16, "max_sequence_length": 32}, {"scale": -1, "offset": 1, "sign": -1}),
    "stable_audio": Family({}, {"of": "u", "prediction": "v"}),
    "auraflow": Family(SQUARE, {"of": "sigma", "scale": 1}),
    "chroma": Family(SQUARE | {"max_sequence_length": 32}, {"of": "sigma", "scale": 1}),
}


NEEDS: Final = {"stable_audio": "torchsde"}
"""Packages that diffusers needs for a family."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return each family's pipeline as it saves itself, built once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            pytest.skip(f"needs the package {NEEDS[name]}")
        if not (root / name).exists():
            getattr(support_pipelines, f"tiny_{name}")(root / f"tokens-{name}").save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def teacher(saved: Callable[[str], Path]) -> Callable[[str], Model]:
    """Return each family's imported model, imported once."""
    return functools.cache(lambda name: import_pipeline(saved(name), FAMILIES[name].options))


def called(pipe: Any, x_1: Tensor, num_steps: int, **options: Any) -> Tensor:
    """Return the latents that the stock pipeline samples from `x_1`."""
    with torch.no_grad():
        made = pipe(prompt=list(PROMPTS), latents=x_1, num_inference_steps=num_steps, output_type="latent", **options)
    return torch.as_tensor(made[0])


def guided(model: Model, pipe: Any) -> list[tuple[dict[str, Any], float | None]]:
    """Return the pipeline's arguments without and with guidance, and our scale for each."""
    pipeline = model.manifest.pipeline
    assert pipeline is not None
    if pipeline.guidance is None or pipeline.off is None:
        return [({}, None)]
    # Pipelines with distilled guidance call a second time only if they are given a negative prompt.
    negative = {"negative_prompt": [" ", " "]} if pipeline.guidance == "true_cfg_scale" else {}
    return [({pipeline.guidance: scale, **negative}, scale + 1 - pipeline.off) for scale in (pipeline.off, 4.0)]


@pytest.mark.parametrize("name", FAMILIES)
def test_our_samples_are_those_of_the_pipeline(
    name: str, saved: Callable[[str], Path], teacher: Callable[[str], Model]
) -> None:
    family, folder = FAMILIES[name], saved(name)
    model = teacher(name)
    assert isinstance(model.denoiser.network, Replay)
    found = {**model.denoiser.network.clock, **model.denoiser.network.output}
    found["prediction"] = model.manifest.prediction["type"]
    assert {fact: found[fact] for fact in family.facts} == pytest.approx(family.facts)
    assert model.manifest.pipeline is not None
    pipe = load_pipeline(folder, model.manifest.pipeline.kind)
    pipe.scheduler = first_order(pipe.scheduler)
    quietly(pipe)
    schedule = read_schedule({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}, mu=1.0)
    schedule = replace(schedule, process=model.process)
    conditions = text_conditions(model.manifest, PROMPTS)
    swapped = {name: value.flip(0) for name, value in conditions.items()}
    x_1 = noise(2, *model.shape)
    made: list[Tensor] = []
    for options, scale in guided(model, pipe):
        call = family.options | options
        for num_steps in family.steps:
            times = grid_of(schedule, trace(pipe, num_steps, of=num_steps, **prompted(pipe, PROMPTS), **call))

            def ours(cond: dict[str, Tensor], scale: float | None = scale, times: Tensor = times) -> Tensor:
                shown = model.cond(range(2), guidance_scale=scale, others=cond)
                return sample(model, x_1, len(times) - 1, cond=shown, grid=lambda _: times)

            made.append(ours(conditions))
            assert_same(made[-1], called(pipe, x_1, num_steps, **call))
            # Both a prompt and a scale have an effect.
            assert all(float((other - made[-1]).abs().max()) > 1e-3 for other in (ours(swapped), *made[:-1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scale_in_the_card_is_that_of_one_network_call(
    name: str, saved: Callable[[str], Path], teacher: Callable[[str], Model]
) -> None:
    """A card that names another argument or value makes its readers guide twice."""
    manifest = teacher(name).manifest
    pipeline = manifest.pipeline
    assert pipeline is not None
    student = manifest.model_copy(update={"outcome": Outcome(role="student", num_steps=4)})
    guided = student.model_copy(update={"guidance": {"type": "fixed", "scale": 3.0}, "guidance_scale": 3.0})
    sections = [
        lora_card("mine", one, pipeline, StockSchedule("DDIMScheduler", {})).partition("## Guidance")[2]
        for one in ((manifest, student) if pipeline.off is None else (manifest, student, guided))
    ]
    told = [dict(re.findall(r"(\w+_scale) (\d+(?:\.\d+)?)", section)) for section in sections]
    scales = {argument: float(value) for argument, value in told[0].items()}
    assert all(found == told[0] for found in told)
    assert scales == {pipeline.guidance: call_of(student, 4)[str(pipeline.guidance)]}
    assert ("(cond + scale (cond - uncond))" in sections[0]) == (pipeline.off == 0)
    assert ("and a negative prompt" in sections[0]) == (pipeline.guidance == "true_cfg_scale")
    pipe = quietly(load_pipeline(saved(name), pipeline.kind))
    # Some pipelines apply guidance only if they are given a negative prompt.
    negative = {"negative_prompt": [" ", " "]} if pipeline.off is not None else {}
    called_once_a_step(pipe, noise(2, *manifest.shape), 2, **FAMILIES[name].options, **scales, **negative)


@pytest.mark.parametrize("name", ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "lcm"))])
def test_twelve_steps_on_a_table_of_a_thousand_levels(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A scheduler accepts our times if its steps end where the next one starts. DDIM's do not, so they are rejected."""
    family, folder = FAMILIES[name], saved(name)
    model = import_pipeline(folder, family.options)
    assert model.manifest.pipeline is not None
    pipe = quietly(load_pipeline(folder, model.manifest.pipeline.kind))
    with pytest.raises(ValueError, match=r"DDIMScheduler lands at (\d+), but the next step starts from (?!\1;)\d+;"):
        times_of(first_order(pipe.scheduler), 12)
    told = multistep(write_schedule(model.process, model.denoiser.prediction, 1000, False), SOLVERS[DDIM()], False)
    pipe.scheduler = stock(told.kind)(**told.config)
    schedule = read_schedule({"_class_name": told.kind, **told.config})
    options, scale = guided(model, pipe)[0]
    call = family.options | options
    times = grid_of(schedule, trace(pipe, 12, of=12, **prompted(pipe, PROMPTS), **call))
    assert len({round(1000 * float(step)) for step in times.diff()}) == 2
    x_1 = noise(2, *model.shape)
    cond = model.cond(range(2), guidance_scale=scale, others=text_conditions(model.manifest, PROMPTS))
    assert_same(sample(model, x_1, 12, cond=cond, grid=lambda _: times), called(pipe, x_1, 12, **call))
    with pytest.raises(
        ValueError, match=r"with 1000 .* cannot represent 12 steps exactly; it can only represent 1, 2, 4, 5"
    ):
        export_pipeline(with_steps(model, 12), tmp_path / "out")


BUDGET: Final = [
    *("--matching.num-updates", "2", "--matching.batch-size", "4", "--chain.num-updates", "2"),
    *("--chain.batch-size", "4", "--chain.start-steps", "8", "--engine.threads", "1", "--evaluation.no-enabled"),
]


def distilled(folder: Path, options: dict[str, Any], out: Path, *words: str) -> Path:
    """Distil a four-step student from an eight-step teacher and prompts alone."""
    prompts = out.with_suffix(".txt")
    prompts.write_text("a cat\n\nb on a mat\na b c d\nc\n")
    call = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    main(
        [
            "distill",
            str(folder),
            "--prompts",
            str(prompts),
            "--to",
            "4",
            "--out",
            str(out),
            *BUDGET,
            *words,
            "--call",
            *call,
        ]
    )
    return out


def as_told(pipe: Any, student: Model) -> dict[str, Any]:
    """Return the arguments of a card without the number of steps. If a pipeline takes no sigmas, set them in its
    scheduler."""
    call = call_of(student.manifest, 4)
    del call["num_inference_steps"]
    if "sigmas" not in call and student.manifest.process["type"] == "flow":
        sigmas = [1.0, 0.75, 0.5, 0.25]
        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
    return call


def called_once_a_step(pipe: Any, x_1: Tensor, num_steps: int, **options: Any) -> Tensor:
    """Sample as `called`, and check that the network runs once per step, with one batch row per prompt."""
    rows: list[int] = []
    module = getattr(pipe, component_of(pipe))
    hook = module.register_forward_hook(lambda _module, _args, output: rows.append(len(output[0])))
    made = called(pipe, x_1, num_steps, **options)
    hook.remove()
    assert rows == [len(x_1)] * num_steps
    return made


OTHERS: Final = ("pixart", "qwen", "sana", "cogvideox", "lumina2", "z_image", "auraflow", "chroma")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl", ["--matching.guidance-scale", "3"]),
        ("flux", []),
        ("wan", ["--matching.guidance-scale", "3"]),
        *(
            pytest.param(name, words, marks=pytest.mark.slow)
            for name, words in (
                ("sdxl", ["--matching.guidance-range", "1", "8"]),
                ("flux", ["--matching.guidance-range", "1", "4"]),
                *((name, ["--matching.guidance-scale", "3"]) for name in (*OTHERS, "stable_audio")),
            )
        ),
    ],
)
def test_a_student_of_prompts_alone_is_exported(
    name: str, words: list[str], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    options = FAMILIES[name].options
    run = distilled(saved(name), options, tmp_path / "run", *words)
    student = load(run)
    assert student.num_steps == 4
    main(["export", str(run), "--out", str(tmp_path / "out")])
    kind = json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"]
    pipe = quietly(load_pipeline(tmp_path / "out", kind))
    call = as_told(pipe, student)
    if name == "flux" and not words:
        assert call["guidance_scale"] == 3.5
    x_1 = noise(2, *student.shape)
    cond = student.cond(range(2), others=text_conditions(student.manifest, PROMPTS))
    ours = sample(student, x_1, 4, student.sampler, cond)
    assert_same(ours, called_once_a_step(pipe, x_1, 4, **call))
    assert float((ours - sample(load(RunFolder(run).stages()[0].path), x_1, 4, cond=cond)).abs().max()) > 1e-6


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Trace]:
    """Return a recording with everything that can be falsified: two branches, a shift, a negated output."""
    tokens = tmp_path_factory.mktemp("honest")
    pipe = support_pipelines.tiny_lumina2(tokens)
    options = FAMILIES["lumina2"].options
    recording = record(pipe, options)
    made = trace(pipe, 4, guidance_scale=1.0, prompt=list(PROMPTS), **options)
    verify(recording.network, recording.schedule, made)
    return recording, made


def test_a_false_recording_is_rejected_with_the_fact(
    honest: tuple[Recording, Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, made = honest
    network = recording.network

    def refused(**lie: Any) -> str:
        schedule = replace(recording.schedule, **lie)
        with pytest.raises(ValueError, match=r"at step \d, |step \d from") as error:
            verify(network, schedule, made)
        return str(error.value)

    assert "its denoiser received the time" in refused(process=FlowMatching(5.0))
    assert "gives a different sample" in refused(prediction=X0())
    first = made.steps[0]
    with pytest.raises(
        ValueError, match=r"step 1 from t = 1 .* gives a different sample .* \(relative difference: nan"
    ):
        verify(network, recording.schedule, Trace([first._replace(after=first.after * torch.nan), *made.steps[1:]]))
    with monkeypatch.context() as lie:
        lie.setattr(network, "output", network.output | {"sign": 1})
        assert "sign or the slice" in refused()
    monkeypatch.setattr(network, "clock", network.clock | {"offset": network.clock["offset"] + 0.01})
    assert "its denoiser received the time" in refused()


@pytest.mark.parametrize("part", ["first", "last"])
def test_guidance_is_read_from_the_channels_that_the_scheduler_gets(part: str) -> None:
    call = {"is": "dict", "items": {"text": {"is": "condition", "name": "text", "shape": [3], "dtype": "float32"}}}
    text, output = noise(2, 3), noise(4, 6, 5)
    u, c = (-half[:, :3] if part == "first" else -half[:, 3:] for half in output.chunk(2))
    made = Call({"text": torch.cat([torch.zeros(2, 3), text])}, output)
    step = Step((made,), c + SCALE * (c - u), 0.0, None, u, u)
    off, is_rescaled, null = _guiding(call, {"text": text}, step, {"sign": -1, "part": part})
    assert (off, is_rescaled) == (0.0, False)
    assert torch.equal(null["text"], torch.zeros(3))
    with pytest.raises(ValueError, match=r"neither u .* nor c"):
        _guiding(call, {"text": text}, step, {"sign": 1, "part": part})


def test_a_swapped_condition_is_refused_by_name(honest: tuple[Recording, Trace]) -> None:
    recording, made = honest
    first = made.steps[0]
    arguments = first.calls[0].arguments
    swapped = arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"].flip(0)}
    lying = Trace([first._replace(calls=(first.calls[0]._replace(arguments=swapped),)), *made.steps[1:]])
    with pytest.raises(ValueError, match=r"recorded conditions .*encoder_hidden_states.* returns a different output"):
        verify(recording.network, recording.schedule, lying)


def test_calls_without_a_matching_clock_or_guidance_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = support_pipelines.tiny_flux_schnell(tmp_path)
    step = type(pipe.scheduler).step

    @functools.wraps(step)
    def squared(self: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(self, model_output**2, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", squared)
    with pytest.raises(
        ValueError, match=r"FluxPipeline cannot be replayed: step 1 from t = 1 to .* gives a different sample"
    ):
        record(pipe, SQUARE)
    monkeypatch.undo()
    time = type(pipe.scheduler).set_timesteps

    @functools.wraps(time)
    def curved(self: Any, *args: Any, **kwargs: Any) -> None:
        time(self, *args, **kwargs)
        self.timesteps = 1000 * (self.timesteps / 1000) ** 3

    monkeypatch.setattr(type(pipe.scheduler), "set_timesteps", curved)
    with pytest.raises(ValueError, match=r"FluxPipeline cannot be replayed: .* not affine in t, sigma or the angle"):
        record(pipe, SQUARE)


PIPELINES: Final = {"pixart": "PixArtAlphaPipeline", "stable_audio": "StableAudioPipeline"}
LOW_RANK: Final = ["--chain.lora-rank", "2", "--chain.learning-rate", "0.01"]


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "wan", *OTHERS) if name != "pixart"),
    ],
)
def test_lora_weights_are_loaded_by_the_pipeline(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = distilled(saved(name), FAMILIES[name].options, tmp_path / "run", *LOW_RANK)
    main(["export", str(run), "--format", "lora", "--out", str(tmp_path / "lora")])
    student = load(run)
    assert student.manifest.pipeline is not None
    pipe = quietly(load_pipeline(saved(name), student.manifest.pipeline.kind))
    kind = json.loads((tmp_path / "lora" / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipe.scheduler = stock(kind).from_pretrained(tmp_path / "lora", subfolder="scheduler")
    x_1 = noise(2, *student.shape)
    call = as_told(pipe, student)
    before = called(pipe, x_1, 4, **call)
    pipe.load_lora_weights(tmp_path / "lora")
    cond = student.cond(range(2), others=text_conditions(student.manifest, PROMPTS))
    ours = sample(student, x_1, 4, cond=cond)
    assert_same(ours, called_once_a_step(pipe, x_1, 4, **call))
    assert float((ours - before).abs().max()) > 10 * 1e-4


def with_steps(model: Model, num_steps: int) -> Model:
    """Return a model as a student of this number of steps."""
    outcome = Outcome(role="student", num_steps=num_steps)
    return Model(model.denoiser, model.manifest.model_copy(update={"outcome": outcome}))


def test_a_student_of_angles_is_exported_on_a_table(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Stable Audio's own scheduler draws noise, and no other scheduler passes its network the angle.

    The exported network embeds a timestep as the original network embeds the angle of this timestep.
    """
    model = import_pipeline(saved("stable_audio"))
    conditions = text_conditions(model.manifest, PROMPTS)
    moved, x_t = on_integers(model.network), noise(2, *model.shape)
    assert isinstance(model.network, Replay)
    assert (model.network.is_on_table, moved.is_on_table) == (False, True)
    time = torch.tensor([7 / 1024, 0.7])
    assert float((moved.timestep(time) - torch.tensor([6, 0.7 * 1024 - 1])).abs().max()) < 1e-4
    torch.testing.assert_close(moved(x_t, time, **conditions), model.network(x_t, time, **conditions))
    for num_steps in (1, 4):
        out, student = tmp_path / str(num_steps), with_steps(model, num_steps)
        export_pipeline(student, out)
        pipe = quietly(load_pipeline(out, "StableAudioPipeline"))
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        ours = sample(student, x_t, cond=student.cond(range(2), others=conditions))
        assert_same(ours, called_once_a_step(pipe, x_t, num_steps, guidance_scale=1.0))
    again = import_pipeline(out)
    assert_same(sample(again, x_t, 4, cond=again.cond(range(2), others=conditions)), ours)


def test_text_embeddings_in_the_argument_of_the_classes_are_a_condition(tmp_path: Path) -> None:
    """AudioLDM's and MusicLDM's networks have no other argument for texts."""
    support_pipelines.tiny_audioldm(tmp_path / "tokens").save_pretrained(tmp_path / "teacher")
    run = distilled(tmp_path / "teacher", {}, tmp_path / "run", "--matching.guidance-scale", "3")
    teacher, student = load(RunFolder(run).stages()[0].path), load(run)
    assert (student.num_classes, student.manifest.conditions) == (0, {"class_embeddings": (8,)})
    main(["export", str(run), "--out", str(tmp_path / "out")])
    conditions = text_conditions(student.manifest, PROMPTS)
    for folder, model, scale, num_steps in (("teacher", teacher, 3.0, 8), ("out", student, None, 4)):
        pipe = load_pipeline(tmp_path / folder, "AudioLDMPipeline")
        pipe.scheduler = first_order(pipe.scheduler)
        made = trace(pipe, num_steps, of=num_steps, prompt=list(PROMPTS), guidance_scale=scale or 1.0)
        schedule = read_schedule(config_of(pipe.scheduler))
        cond = model.cond(range(2), guidance_scale=scale, others=conditions)
        times = grid_of(schedule, made)
        found = sample(model, made.steps[0].before, num_steps, cond=cond, grid=lambda _, times=times: times)
        assert_same(found, made.steps[-1].after)
        assert all(len(step.calls) == 1 and len(step.calls[0].output) == (4 if scale else 2) for step in made.steps)


def test_a_vae_that_cannot_be_decoded_is_named(teacher: Callable[[str], Model]) -> None:
    with pytest.raises(ValueError, match=r"vae contains the class AutoencoderDC, .*\. Write a \.npz file"):
        decoder_of(teacher("sana").manifest)


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the lines of a card next to its folder, and return their names."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder.parent)
    exec(compile(found[1], "card", "exec"), names)
    return names


def test_the_card_of_an_audio_student_writes_its_sound(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_pipeline(with_steps(import_pipeline(saved("stable_audio")), 4), tmp_path / "out")
    names = run_card(tmp_path / "out", monkeypatch)
    rate, sound = wavfile.read(tmp_path / "sample.wav")
    assert rate == names["pipe"].vae.config.sampling_rate
    assert torch.equal(torch.from_numpy(sound.T), names["made"][0])
    assert "requires scipy" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_card_of_a_video_student_writes_its_frames(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, place: written.append((frames, place)))
    export_pipeline(with_steps(import_pipeline(saved("wan"), FAMILIES["wan"].options), 4), tmp_path / "out")
    names = run_card(tmp_path / "out", monkeypatch)
    assert written[0][1] == "sample.mp4"
    assert written[0][0] is names["made"][0] or (written[0][0] == names["made"][0]).all()


@pytest.mark.parametrize(
    "kind",
    [
        *("StableAudio3Pipeline", "AudioLDMPipeline", "MusicLDMPipeline"),
        *("AceStepPipeline", "LongCatAudioDiTPipeline"),
    ],
)
def test_the_card_of_no_audio_pipeline_saves_a_picture(kind: str, saved: Callable[[str], Path]) -> None:
    manifest = import_pipeline(saved("stable_audio")).manifest
    assert manifest.pipeline is not None
    pipeline = manifest.pipeline.model_copy(update={"kind": kind})
    card = lora_card(
        "mine", manifest.model_copy(update={"pipeline": pipeline}), pipeline, StockSchedule("DDIMScheduler", {})
    )
    assert "png" not in card
    assert ("wavfile.write" in card) == ("from scipy.io import wavfile" in card) == (kind[:3] in ("Sta", "Aud", "Mus"))


def test_a_time_that_no_scheduler_passes_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A network that embeds the logarithm of its time cannot be moved to the timesteps of a table."""
    student = with_steps(import_pipeline(saved("stable_audio")), 4)
    network: Any = student.network
    network.model.time_proj.log = True
    with pytest.raises(ValueError, match=r"supports its times draws noise in each step\. Use --format onnx"):
        export_pipeline(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="StableAudioDiTModel has no Fourier time embedding"):
        on_integers(network)


@pytest.mark.parametrize("name", ["pixart", "stable_audio"])
@pytest.mark.slow
def test_lora_weights_that_no_pipeline_loads_are_rejected(
    name: str, saved: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    run = distilled(saved(name), FAMILIES[name].options, tmp_path / "run", *LOW_RANK)
    said = refused(["export", str(run), "--format", "lora", "--out", str(tmp_path / "lora")], capsys)
    assert f"cannot load LoRA weights into {PIPELINES[name]}: use --format diffusers, which merges the weights" in said
    main(["export", str(run), "--out", str(tmp_path / "out")])


def test_an_export_that_samples_otherwise_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The network's clock has another shift than the process of its samples."""
    model = import_pipeline(saved("flux"), FAMILIES["flux"].options)
    other = FlowMatching(5.0)
    manifest = model.manifest.model_copy(update={"process": processes.describe(other)})
    bent = Model(NetworkDenoiser(model.denoiser.network, other, model.denoiser.prediction), manifest)
    with pytest.raises(ValueError, match="with 2 steps, samples of the exported FluxPipeline differ from the model's"):
        export_pipeline(bent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_uses_of_prompts_are_rejected_in_one_line(
    saved: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    folder, prompts = saved("flux"), tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    call = ["--call", "height=8", "width=8"]
    out = ["--out", str(tmp_path / "out")]
    assert "use either --data or --prompts, but not both" in refused(["encode", str(folder), *out], capsys)
    asked = ["distill", str(folder), "--prompts", str(prompts), *out, *call, *BUDGET]
    main([*asked, "--dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "1 sample of" in told
    assert "would be drawn first, with 63 network calls each" in told
    assert "--call height is not of the form NAME=VALUE" in refused([*asked[:4], *out, "--call", "height"], capsys)
    prompts.write_text("\n \n")
    assert "contains no prompts: write one prompt per line" in refused(asked, capsys)
    prompts.write_text("a\n")
    assert "FluxPipeline failed" in refused(
        ["encode", str(folder), "--prompts", str(prompts), *out, "--call", "max_sequence_length=x"], capsys
    )
    assert not (tmp_path / "out").exists()
