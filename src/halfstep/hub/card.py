"""The card of an exported model: what it is, where it came from, how good, and how to use it."""

from collections.abc import Sequence
from typing import Final

from halfstep.hub.schedulers import FLOW, StockSchedule
from halfstep.runs import Manifest, Metrics, Pipeline

_USAGE: Final = {
    "DDIMPipeline": """\
import torch
from diffusers import DDIMPipeline

pipe = DDIMPipeline.from_pretrained("FOLDER")
images = pipe(batch_size=4, num_inference_steps={steps}{clipped}, generator=torch.manual_seed(0)).images
images[0].save("sample.png")""",
    "ConsistencyModelPipeline": """\
import torch
from diffusers import ConsistencyModelPipeline

pipe = ConsistencyModelPipeline.from_pretrained("FOLDER")
generator = torch.manual_seed(0)
images = pipe({number}, class_labels={labels}, num_inference_steps={steps}, generator=generator).images
images[0].save("sample.png")""",
    "DiTPipeline": """\
import torch
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("FOLDER")
images = pipe([0, 1], num_inference_steps={steps}, guidance_scale={scale}, generator=torch.manual_seed(0)).images
images[0].save("sample.png")""",
    "StableDiffusionPipeline": """\
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("FOLDER")
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale={scale}, generator=torch.manual_seed(0)).images[0]
image.save("sample.png")""",
    "StableDiffusion3Pipeline": """\
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("FOLDER"{absent})
image = pipe("a prompt", num_inference_steps={steps}, sigmas=[{sigmas}], guidance_scale={scale}).images[0]
image.save("sample.png")""",
}
"""By pipeline, six lines of Python that sample from it."""


def usage(manifest: Manifest, kind: str, absent: Sequence[str] = (), steps: int = 4) -> str:
    """Six lines of Python that sample from an exported pipeline in the folder FOLDER.

    Args:
        steps: where the model was distilled for no number.
        absent: parts that the pipeline can do without and the folder does not hold, which diffusers wants to be told.
    """
    steps = manifest.num_steps or steps
    guidance = manifest.guidance
    labels = list(range(min(4, manifest.num_classes)))
    return _USAGE[kind].format(
        steps=steps,
        absent="".join(f", {name}=None" for name in absent),
        number=len(labels),
        labels=labels,
        scale=f"{manifest.guidance_scale:g}" if guidance is not None and guidance["type"] == "range" else "1.0",
        sigmas=", ".join(f"{1 - k / steps:.6g}" for k in range(steps)),
        clipped=", use_clipped_model_output=True" if manifest.clip else "",
    )


def model_card(
    name: str,
    manifest: Manifest,
    kind: str,
    schedule: StockSchedule,
    exact: list[int],
    metrics: Metrics | None,
    absent: Sequence[str] = (),
) -> str:
    """README.md of an exported folder."""
    own = manifest.num_steps
    made = "A diffusion model" if own is None else f"A diffusion model that samples in {own} step{'s' * (own > 1)}"
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [diffusion, progressive-distillation, halfstep]",
        "---",
        "",
        f"# {name}",
        "",
        f"{made}, made with halfstep by progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) and exported "
        f"as a stock `{kind}`. No code beyond diffusers is needed.",
        "",
        "```python",
        usage(manifest, kind, absent, max(exact)).replace("FOLDER", name),
        "```",
        "",
        "## What it is",
        "",
        f"- Teacher: {manifest.source or 'trained by halfstep'}; the chain began at {manifest.start_steps or '?'} "
        f"steps; this stage learned from `{manifest.parent or 'data'}`, {manifest.num_updates:,} updates.",
        f"- Data: {manifest.data or 'not recorded'}.",
        f"- Samples: {'images' if manifest.is_image else 'latents'} of shape {list(manifest.shape)}; "
        + (f"{manifest.num_classes} classes" if manifest.num_classes else "no classes")
        + (f"; conditions {', '.join(manifest.conditions)}" if manifest.conditions else "")
        + ".",
        f"- Predicts {manifest.prediction['type']} on the process {manifest.process['type']}; x0 is "
        f"{'clipped to [-1, 1]' if manifest.clip else 'not clipped'}; the sampler is {manifest.outcome.sampler_name}.",
        "",
        "## Numbers of steps",
        "",
        (f"Distilled for **{own}**. " if own else f"A {manifest.outcome.role} model: the more the better. ")
        + f"The exported scheduler asks for the times that the model was distilled at exactly at {_few(exact)} steps; "
        "at others its timesteps are rounded.",
        *_notes(manifest, kind, schedule),
        "",
        "## Guidance",
        "",
        manifest.guidance_words(),
    ]
    if metrics is not None and metrics.results:
        lines += ["", "## Quality", "", *_table(metrics)]
    return "\n".join(lines) + "\n"


def lora_card(name: str, manifest: Manifest, pipeline: Pipeline, schedule: StockSchedule) -> str:
    """README.md of a folder of low-rank additions."""
    steps = manifest.num_steps or 4
    call = usage(manifest, pipeline.kind).splitlines()[4]
    return f"""\
---
library_name: diffusers
tags: [diffusion, progressive-distillation, halfstep, lora]
---

# {name}

Low-rank additions that make a `{pipeline.kind}` sample in {steps} steps, made with halfstep by progressive distillation
(Salimans & Ho 2022, arXiv:2202.00512). They belong to the weights of `{pipeline.folder}` and to the scheduler in this
folder: it predicts {manifest.prediction["type"]}, which the original may not.

```python
import torch
from diffusers import {schedule.kind}, {pipeline.kind}

pipe = {pipeline.kind}.from_pretrained("{pipeline.folder}")
pipe.scheduler = {schedule.kind}.from_pretrained("{name}", subfolder="scheduler")
pipe.load_lora_weights("{name}")
{call}
```

## Guidance

{manifest.guidance_words()}
"""


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown}, ..."


def _notes(manifest: Manifest, kind: str, schedule: StockSchedule) -> list[str]:
    notes = []
    if schedule.kind == FLOW:
        notes.append(
            "The scheduler's own spacing is another: pass `sigmas`, as above, with k / N falling from 1, before the "
            "shift, which it applies itself."
        )
    if manifest.clip and kind == "DDIMPipeline":
        notes.append(
            "Pass `use_clipped_model_output=True`: the model was measured with the noise derived anew from the clipped "
            "x0, which `DDIMScheduler` does only then."
        )
    return [line for note in notes for line in ("", note)]


def _table(metrics: Metrics) -> list[str]:
    rows = [
        "| steps | network calls | Frechet distance | KID | distance to the teacher (RMSE) |",
        "|---|---|---|---|---|",
    ]
    for result in metrics.results:
        rmse = "" if result.teacher_rmse is None else f"{result.teacher_rmse:.4f}"
        rows.append(f"| {result.num_steps} | {result.num_evals} | {result.frechet:.4g} | {result.kid:.4g} | {rmse} |")
    protocol = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in metrics.protocol.items())
    return [*rows, "", f"Protocol: {protocol}. Figures of another protocol must not be compared with these."]
