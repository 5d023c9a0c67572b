"""Model cards for exported models: contents, origin, quality and usage."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from halfstep.hub.schedulers import FLOW, StockSchedule, exact_steps, sigmas_of
from halfstep.hub.stock import stock
from halfstep.nets import CONFIGS, BasePrecision
from halfstep.runs import Manifest, Metrics, Pipeline

_PIXELS: Final = {
    "DDIMPipeline": "batch_size=4, num_inference_steps={steps}{clipped}",
    "DDPMPipeline": "batch_size=4, num_inference_steps={steps}",
    "ConsistencyModelPipeline": "{number}, class_labels={labels}, num_inference_steps={steps}",
}
"""Call arguments of the pixel pipelines, by pipeline class."""

_SOUND: Final = "made[0].T.float().cpu().numpy()"
"""A sound as scipy stores it, `[time, channels]`, from a pipeline that returns tensors `[n, channels, time]`."""
_SOUNDS: Final = {
    "StableAudioPipeline": ("pipe.vae.config.sampling_rate", _SOUND),
    "StableAudio3Pipeline": ("pipe.vae.config.sampling_rate", _SOUND),
    **dict.fromkeys(("AudioLDMPipeline", "MusicLDMPipeline"), ("pipe.vocoder.config.sampling_rate", "made[0]")),
}
"""The sampling rate and the first sound of audio pipelines, by the pipeline's class."""


def call_of(manifest: Manifest, num_steps: int) -> dict[str, Any]:
    """Return the call arguments, except prompts, with which the stock pipeline takes the same steps as our sampler."""
    pipeline = manifest.pipeline
    assert pipeline is not None
    taken = inspect.signature(stock(pipeline.kind).__call__).parameters
    call: dict[str, Any] = {"num_inference_steps": num_steps}
    if "sigmas" in taken and manifest.process["type"] == "flow":
        call["sigmas"] = sigmas_of(num_steps)
    if manifest.guidance is not None and manifest.guidance["type"] == "range":
        call["guidance_scale"] = manifest.guidance_scale
    elif pipeline.guidance is not None:
        call[pipeline.guidance] = pipeline.single_scale
    return call | pipeline.options


def _call(manifest: Manifest, kind: str, steps: int = 4) -> str:
    """Return Python code that samples with the model's number of steps, or with `steps` if the model has none."""
    steps = manifest.num_steps or steps
    labels = list(range(min(4, manifest.num_classes)))
    if kind in _PIXELS:
        clipped = ", use_clipped_model_output=True" if manifest.clip else ""
        arguments = _PIXELS[kind].format(steps=steps, number=len(labels), labels=labels, clipped=clipped)
    else:
        given = ", ".join(f"{name}={_python(value)}" for name, value in call_of(manifest, steps).items())
        arguments = f"{'[0, 1]' if labels else chr(34) + 'a prompt' + chr(34)}, {given}"
    line = f"made = pipe({arguments}, generator=torch.manual_seed(0))[0]"
    if kind in _SOUNDS:
        rate, sound = _SOUNDS[kind]
        return f'{line}\nwavfile.write("sample.wav", {rate}, {sound})'
    called = inspect.signature(stock(kind).__call__)
    if "num_frames" in called.parameters:
        return f'{line}\nexport_to_video(made[0], "sample.mp4")'
    is_picture = "Audio" not in str(called.return_annotation)
    return f'{line}\nmade[0].save("sample.png")' if is_picture else line


def _savers(line: str) -> tuple[str, str]:
    """Return the imports that save the samples of `line`, and a note about them."""
    if "wavfile" in line:
        return "\nfrom scipy.io import wavfile", "\nWriting `.wav` files requires scipy (`pip install scipy`).\n"
    if "export_to_video" in line:
        return "\nfrom diffusers.utils import export_to_video", (
            "\nWriting videos requires imageio (`pip install imageio imageio-ffmpeg`). Pass the frame rate as `fps`; "
            "the default is 10.\n"
        )
    return "", ""


def _usage(manifest: Manifest, kind: str, schedule: StockSchedule, steps: int) -> tuple[str, str, str]:
    """Return imports, Python sampling code (see `_call`), and a note about the step spacing."""
    line = _call(manifest, kind, steps)
    if schedule.kind != FLOW:
        return "", line, ""
    imports, remedy = "", "Pass `sigmas`"
    if "sigmas=" not in line:
        remedy = "The pipeline does not accept `sigmas`, so bind them to the scheduler"
        sigmas, imports = _python(sigmas_of(manifest.num_steps or steps)), "from functools import partial\n\n"
        line = f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas={sigmas})\n{line}"
    note = (
        f"\nThe scheduler's default spacing differs from the spacing of the distilled steps. {remedy}, as shown above. "
        "For N steps, the sigmas are 1, (N - 1) / N, ..., 1 / N, to which the scheduler applies its shift.\n"
    )
    return imports, line, note


def public(source: str) -> str:
    """Return the last component of a path. Names on the Hub are returned unchanged."""
    return Path(source).name if source.startswith(("/", "~", ".")) else source


def _python(value: Any) -> str:
    """Return a value as Python source, with floats rounded."""
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def model_card(
    name: str,
    manifest: Manifest,
    kind: str,
    schedule: StockSchedule,
    metrics: Metrics | None,
    absent: Sequence[str] = (),
) -> str:
    """Return the README.md of an exported folder.

    Args:
        absent: parts that are missing from the folder, for which users must pass None.
    """
    own, exact = manifest.num_steps, exact_steps(schedule)
    made = "A diffusion model" if own is None else f"A diffusion model that samples in {own} step{'s' * (own > 1)}"
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no classes"
    conditions = f"; conditions {', '.join(manifest.conditions)}" if manifest.conditions else ""
    steps = f"Distilled for **{own}**." if own else f"A {manifest.outcome.role} model: more steps improve the samples."
    listed = exact[:12]
    exactly = ", ".join(map(str, listed)) + ", ..." * (listed[-1] < schedule.config["num_train_timesteps"])
    refines = manifest.parent not in (None, manifest.teacher)
    started = f" and started from `{manifest.parent}`" if refines else ""
    imports, line, notes = _usage(manifest, kind, schedule, own or max(exact))
    savers, note = _savers(line)
    if manifest.clip and kind == "DDIMPipeline":
        notes += (
            "\nPass `use_clipped_model_output=True`, so that `DDIMScheduler` recomputes the noise from the clipped x0. "
            "The model was evaluated this way.\n"
        )
    return f"""\
---
library_name: diffusers
tags: [diffusion, progressive-distillation, halfstep]
---

# {name}

{made}, trained with halfstep by progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) and exported as a
stock `{kind}`. It runs without halfstep.

```python
{imports}import torch
from diffusers import {kind}{savers}

pipe = {kind}.from_pretrained("{name}"{"".join(f", {part}=None" for part in absent)})
{line}
```
{note}
## Details

- Teacher: {public(manifest.source or "trained by halfstep")}; the chain started at {manifest.start_steps or "?"} \
steps; this stage learned from `{manifest.teacher or "data"}`{started}, in {manifest.num_updates:,} updates.
- Data: {public(manifest.data or "not recorded")}.
- Samples: {"images" if manifest.is_image else "latents"} of shape {list(manifest.shape)}; {classes}{conditions}.
- Prediction: {manifest.prediction["type"]}; process: {manifest.process["type"]}; x0: \
{"clipped to [-1, 1]" if manifest.clip else "not clipped"}; sampler: {manifest.outcome.sampler_name}.

## Number of steps

{steps} With {exactly} steps, the exported scheduler uses the exact times at which the model was distilled; with \
other numbers of steps, its timesteps are rounded.
{notes}
## Guidance

{manifest.guidance_words()}
{_quality(metrics) if metrics is not None and metrics.results else ""}"""


def lora_card(
    name: str, manifest: Manifest, pipeline: Pipeline, schedule: StockSchedule, precision: BasePrecision = "float32"
) -> str:
    """Return the README.md of a folder of LoRA weights. `precision` is the base weights' precision in training."""
    lowered, base = CONFIGS.get(precision, "torch.bfloat16"), public(pipeline.folder)
    over = "" if precision == "float32" else f"\nThe weights were trained on {precision} base weights ({lowered}).\n"
    imports, line, note = _usage(manifest, pipeline.kind, schedule, manifest.num_steps or 4)
    savers, saving = _savers(line)
    return f"""\
---
library_name: diffusers
tags: [diffusion, progressive-distillation, halfstep, lora]
---

# {name}

LoRA weights for sampling with a `{pipeline.kind}` in {manifest.num_steps or 4} steps, trained with halfstep by
progressive distillation (Salimans & Ho 2022, arXiv:2202.00512). Use them with the weights of `{base}`, the pipeline
that was distilled (its folder, or its name on the Hub), and with the scheduler in this folder. The student predicts
{manifest.prediction["type"]}, which may differ from the original model's prediction.
{over}
```python
{imports}import torch
from diffusers import {schedule.kind}, {pipeline.kind}{savers}

pipe = {pipeline.kind}.from_pretrained("{base}")
pipe.scheduler = {schedule.kind}.from_pretrained("{name}", subfolder="scheduler")
pipe.load_lora_weights("{name}")
{line}
```
{saving}{note}
## Guidance

{manifest.guidance_words()}
"""


def _quality(metrics: Metrics) -> str:
    rows = []
    for result in metrics.results:
        rmse = "" if result.teacher_rmse is None else f"{result.teacher_rmse:.4f}"
        figures = f"{result.frechet:.4g} | {result.kid:.4g} | {rmse}"
        rows.append(f"| {result.sampler} | {result.num_steps} | {result.num_evals} | {figures} |\n")
    said = {name: public(value) if isinstance(value, str) else value for name, value in metrics.protocol.items()}
    protocol = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in said.items())
    return f"""
## Quality

| sampler | steps | network calls | Frechet distance | KID | distance to the teacher (RMSE) |
|---|---|---|---|---|---|
{"".join(rows)}
Protocol: {protocol}. Do not compare these figures with those from another protocol.
"""
