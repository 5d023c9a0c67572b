"""The card of an exported model: what it is, where it came from, how good, and how to use it."""

from collections.abc import Sequence
from typing import Final

from halfstep.hub.schedulers import FLOW, StockSchedule, exact_steps
from halfstep.runs import Manifest, Metrics, Pipeline

_ARGUMENTS: Final = {
    "DDIMPipeline": "batch_size=4, num_inference_steps={steps}{clipped}",
    "DDPMPipeline": "batch_size=4, num_inference_steps={steps}",
    "ConsistencyModelPipeline": "{number}, class_labels={labels}, num_inference_steps={steps}",
    "DiTPipeline": "[0, 1], num_inference_steps={steps}, guidance_scale={scale}",
    "StableDiffusionPipeline": '"a prompt", num_inference_steps={steps}, guidance_scale={scale}',
    "StableDiffusion3Pipeline": ('"a prompt", num_inference_steps={steps}, sigmas=[{sigmas}], guidance_scale={scale}'),
}
"""What a pipeline is called with."""


def _call(manifest: Manifest, kind: str, steps: int = 4) -> str:
    """The line of Python that samples; `steps` where the model was distilled for no number."""
    steps = manifest.num_steps or steps
    guidance = manifest.guidance
    labels = list(range(min(4, manifest.num_classes)))
    arguments = _ARGUMENTS[kind].format(
        steps=steps,
        number=len(labels),
        labels=labels,
        scale=f"{manifest.guidance_scale:g}" if guidance is not None and guidance["type"] == "range" else "1.0",
        sigmas=", ".join(f"{1 - k / steps:.6g}" for k in range(steps)),
        clipped=", use_clipped_model_output=True" if manifest.clip else "",
    )
    return f"images = pipe({arguments}, generator=torch.manual_seed(0)).images"


def model_card(
    name: str,
    manifest: Manifest,
    kind: str,
    schedule: StockSchedule,
    metrics: Metrics | None,
    absent: Sequence[str] = (),
) -> str:
    """Return README.md of an exported folder.

    Args:
        absent: parts that the pipeline can do without and the folder does not hold, which diffusers wants to be told.
    """
    own, exact = manifest.num_steps, exact_steps(schedule)
    made = "A diffusion model" if own is None else f"A diffusion model that samples in {own} step{'s' * (own > 1)}"
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no classes"
    conditions = f"; conditions {', '.join(manifest.conditions)}" if manifest.conditions else ""
    steps = f"Distilled for **{own}**." if own else f"A {manifest.outcome.role} model: the more the better."
    exactly = ", ".join(map(str, exact[:12])) + ", ..." * (len(exact) > 12)
    refines = manifest.parent not in (None, manifest.teacher)
    started = f" and started from `{manifest.parent}`" if refines else ""
    notes = ""
    if schedule.kind == FLOW:
        notes += (
            "\nThe scheduler's own spacing is another: pass `sigmas`, as above, with k / N falling from 1, before the "
            "shift, which it applies itself.\n"
        )
    if manifest.clip and kind == "DDIMPipeline":
        notes += (
            "\nPass `use_clipped_model_output=True`: the model was measured with the noise derived again from the "
            "clipped x0, which `DDIMScheduler` does only then.\n"
        )
    return f"""\
---
library_name: diffusers
tags: [diffusion, progressive-distillation, halfstep]
---

# {name}

{made}, made with halfstep by progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) and exported as a stock
`{kind}`. No code beyond diffusers is needed.

```python
import torch
from diffusers import {kind}

pipe = {kind}.from_pretrained("{name}"{"".join(f", {part}=None" for part in absent)})
{_call(manifest, kind, max(exact))}
images[0].save("sample.png")
```

## What it is

- Teacher: {manifest.source or "trained by halfstep"}; the chain began at {manifest.start_steps or "?"} steps; this \
stage learned from `{manifest.teacher or "data"}`{started}, {manifest.num_updates:,} updates.
- Data: {manifest.data or "not recorded"}.
- Samples: {"images" if manifest.is_image else "latents"} of shape {list(manifest.shape)}; {classes}{conditions}.
- Predicts {manifest.prediction["type"]} on the process {manifest.process["type"]}; x0 is \
{"clipped to [-1, 1]" if manifest.clip else "not clipped"}; the sampler is {manifest.outcome.sampler_name}.

## Numbers of steps

{steps} The exported scheduler asks for the times that the model was distilled at exactly at {exactly} steps; at \
others its timesteps are rounded.
{notes}
## Guidance

{manifest.guidance_words()}
{_quality(metrics) if metrics is not None and metrics.results else ""}"""


def lora_card(name: str, manifest: Manifest, pipeline: Pipeline, schedule: StockSchedule) -> str:
    """Return README.md of a folder of low-rank additions."""
    return f"""\
---
library_name: diffusers
tags: [diffusion, progressive-distillation, halfstep, lora]
---

# {name}

Low-rank additions that make a `{pipeline.kind}` sample in {manifest.num_steps or 4} steps, made with halfstep by
progressive distillation (Salimans & Ho 2022, arXiv:2202.00512). They belong to the weights of `{pipeline.folder}` and
to the scheduler in this folder: it predicts {manifest.prediction["type"]}, which the original may not.

```python
import torch
from diffusers import {schedule.kind}, {pipeline.kind}

pipe = {pipeline.kind}.from_pretrained("{pipeline.folder}")
pipe.scheduler = {schedule.kind}.from_pretrained("{name}", subfolder="scheduler")
pipe.load_lora_weights("{name}")
{_call(manifest, pipeline.kind)}
```

## Guidance

{manifest.guidance_words()}
"""


def _quality(metrics: Metrics) -> str:
    rows = []
    for result in metrics.results:
        rmse = "" if result.teacher_rmse is None else f"{result.teacher_rmse:.4f}"
        figures = f"{result.frechet:.4g} | {result.kid:.4g} | {rmse}"
        rows.append(f"| {result.sampler} | {result.num_steps} | {result.num_evals} | {figures} |\n")
    protocol = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in metrics.protocol.items())
    return f"""
## Quality

| sampler | steps | network calls | Frechet distance | KID | distance to the teacher (RMSE) |
|---|---|---|---|---|---|
{"".join(rows)}
Protocol: {protocol}. Figures of another protocol must not be compared with these.
"""
