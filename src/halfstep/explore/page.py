"""The explorer's page: a gradio interface to an `Explorer`, behind a `Door`.

Images are embedded in the responses, so no files are written.
"""

import contextlib
import io
import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from PIL import Image

from halfstep.explore import door
from halfstep.explore.answer import Answer, Shown
from halfstep.explore.explorer import Explorer
from halfstep.report import figures
from halfstep.report.words import count, number, sampler_label

LARGEST_QUEUE: Final = 32
"""Maximum number of waiting requests."""
MOVING_WIDTH: Final = 256
"""Approximate width of a walk's animation, in pixels."""
MILLISECONDS: Final = 120
"""Duration of each frame in a walk's animation, in milliseconds."""
LOCAL: Final = ("127.0.0.1", "localhost", "[::1]")


def serve(
    explorer: Explorer,
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = print,
    allowed: Sequence[str] = (),
    root_path: str = "",
) -> None:
    """Serve the page until Ctrl-C is pressed.

    Args:
        port: the port, or 0 for any free port.
        allowed: additional host names to accept, such as that of a proxy.
        root_path: path under which a proxy serves the page.
        ready: function that is called with the address once the port is bound.

    Raises:
        ValueError: if gradio is not installed, or if the address cannot be bound.
    """
    everywhere = host in ("0.0.0.0", "::", "")
    names = [name.lower() for name in (*LOCAL, f"[{host}]" if ":" in host else host, *allowed)]
    app = page(explorer, None if everywhere else names, root_path)
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError, UnicodeError) as error:
            other = "--host" if isinstance(error, socket.gaierror | UnicodeError) else "--port"
            raise ValueError(f"cannot listen on {host}, port {port} ({error}). Choose another {other}") from None
        listener.listen(512)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=door.impatient(),
            log_level="warning",
            access_log=False,
            ws="none",
            # Closes only connections without an active request, because sampling and reading a response may take a long
            # time.
            timeout_keep_alive=int(door.PATIENCE),
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        # In the main thread, uvicorn would handle signals and exit with a traceback.
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        with contextlib.suppress(KeyboardInterrupt):
            try:
                thread.start()
                ready(address)
                while thread.is_alive():
                    thread.join(0.5)
            finally:
                explorer.stop()
                server.should_exit = True
                thread.join(1.0)


def page(explorer: Explorer, hosts: Sequence[str] | None, root_path: str = "") -> door.App:
    """Return the page, wrapped in its request filter, as an ASGI app.

    Raises:
        ValueError: if gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ValueError("the explorer needs gradio, which is not installed: pip install 'halfstep[explore]'")
    # gradio reads these variables when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr
    from fastapi import FastAPI

    blocks = _blocks(gr, explorer)
    inner = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        root_path=root_path or None,
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(
            # The theme's own colours are too pale. These have a contrast of at least 5.2:1.
            body_text_color_subdued="#59626d",
            body_text_color_subdued_dark="#a4adb8",
            button_primary_background_fill="#0072b2",
            button_primary_background_fill_hover="#00598c",
            button_primary_background_fill_dark="#0072b2",
            button_primary_background_fill_hover_dark="#00598c",
        ),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=1,
        show_error=True,
    )
    inputs: dict[str | int, int] = {}
    for index, function in blocks.fns.items():
        inputs[index] = len(function.inputs)
        if isinstance(function.api_name, str) and function.api_visibility == "public":
            inputs[function.api_name] = len(function.inputs)
    return door.Door(inner, hosts, inputs, root_path)


CSS: Final = """
.made { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.25rem; }
.made.row { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem .75rem; }
.made.walk { grid-template-columns: 1fr; }
.made figure { margin: 0; min-width: 0; display: grid; grid-template-rows: subgrid; grid-row: span 3; row-gap: .35rem; }
.made figcaption { line-height: 1.35; font-size: .95rem; }
.made figcaption b { display: block; }
.made img { image-rendering: pixelated; width: 100%; height: auto; }
.made.pair img, .made.row img { max-width: 34rem; }
.made.walk figure { grid-row: auto; grid-template-rows: none; }
.made .moving img { width: 16rem; max-width: 100%; margin-bottom: .5rem; }
.made svg { width: 100%; max-width: 24rem; border: 1px solid var(--border-color-primary); }
.made svg path { fill: none; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.made svg .rest { stroke: var(--body-text-color-subdued); stroke-width: 4px; }
.made svg .seed { stroke-width: 11px; }
.made .get { text-align: left; }
.made .get a { text-decoration: underline; margin-right: 1rem; display: inline-block; padding: .25rem 0; }
#stage input { text-overflow: ellipsis; padding-right: 1.5rem !important; }
.notes { padding-left: 1.2rem; list-style: disc; margin-bottom: .75rem; }
"""


def _blocks(gr: Any, explorer: Explorer) -> Any:
    """Return the page: the settings and, below them, a tab for each view."""
    last = explorer.present[-1]
    most_samples, most_frames = explorer.bounds.samples(explorer.shape), explorer.bounds.frames(explorer.shape)

    def answered(ask: Callable[..., Answer], kind: str, label: str) -> Callable[..., str]:
        def call(*values: Any) -> str:
            try:
                return _html(kind, ask(*values))
            except ValueError as error:
                raise gr.Error(str(error), duration=None, title="Request failed", print_exception=False) from None

        call.__doc__ = label
        return call

    # gradio's own checks print tracebacks. The explorer's messages are clearer.
    unchecked: dict[str, Any] = {"filterable": False, "allow_custom_value": True}
    together = {"concurrency_limit": 1, "concurrency_id": "models"}
    silent = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title=f"halfstep: {explorer.path.resolve().name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {_plain(explorer.path.resolve().name)}: teacher and students from the same noise")
        if missing := explorer.missing_notes():
            gr.Markdown("\n".join(f"* {_plain(text)}" for text in missing))
        with gr.Row():
            stage = gr.Dropdown(
                [
                    (explorer.label(choice) + (" (missing)" if choice.missing else ""), choice.name)
                    for choice in explorer.choices
                ],
                value=last.name,
                label="Stage",
                elem_id="stage",
                **unchecked,
            )
            steps = gr.Number(last.num_steps or explorer.start_steps, label="Stage steps", elem_id="steps")
            teacher_steps = gr.Number(explorer.start_steps, label="Teacher steps", elem_id="teacher-steps")
            seed = gr.Number(0, label="Seed", elem_id="seed")
            num_classes = explorer.manifest.num_classes
            classes = [("all, in turn", None), *((str(k), k) for k in range(num_classes))]
            class_label = gr.Dropdown(
                classes, value=None, label="Class", elem_id="class", visible=num_classes > 0, **unchecked
            )
            scale = gr.Number(
                None, label="Guidance scale (empty: default)", elem_id="guidance", visible=explorer.knows_guidance
            )
        with gr.Tab("Compare"):
            samples = gr.Number(min(16, most_samples), label=f"Samples (maximum {most_samples})", elem_id="samples")
            compare = gr.Button("Sample", variant="primary", elem_id="compare")
            compared = gr.HTML(elem_id="compared")
        with gr.Tab("All stages"):
            gr.Markdown("Samples of every stage from the same noise, each stage with its own number of steps.")
            strip = gr.Button("Sample", variant="primary", elem_id="strip")
            stripped = gr.HTML(elem_id="stripped")
        with gr.Tab("Walk"):
            gr.Markdown("Samples along the great circle between the noise of two seeds.")
            with gr.Row():
                other_seed = gr.Number(1, label="Second seed", elem_id="other-seed")
                frames = gr.Number(8, label=f"Frames (maximum {most_frames})", elem_id="frames")
            walk = gr.Button("Walk", variant="primary", elem_id="walk")
            walked = gr.HTML(elem_id="walked")

        own = {choice.name: choice.num_steps or explorer.start_steps for choice in explorer.choices}

        def own_steps(name: object) -> int:
            return own.get(name, 1) if isinstance(name, str) else 1

        stage.change(own_steps, stage, steps, **silent)
        asked = [stage, steps, teacher_steps, seed, samples, class_label, scale]
        call = answered(explorer.compare, "pair", "Samples of a stage and of the teacher from the same noise, as HTML.")
        compare.click(call, asked, compared, api_name="compare", **together)
        blocks.load(call, asked, compared, **silent, **together)
        call = answered(explorer.strip, "row", "Samples of every stage from the same noise, as HTML.")
        strip.click(call, [seed, class_label, scale], stripped, api_name="strip", **together)
        asked = [stage, steps, seed, other_seed, frames, class_label, scale]
        call = answered(explorer.walk, "walk", "Samples along the great circle between two seeds' noise, as HTML.")
        walk.click(call, asked, walked, api_name="walk", **together)
    return blocks.queue(max_size=LARGEST_QUEUE, default_concurrency_limit=1)


# --- Answers as HTML ---


def _plain(text: str) -> str:
    """Escape text so that Markdown shows it literally."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~$-])", r"\\\1", text)


def _html(kind: str, answer: Answer) -> str:
    """Return the answer's images side by side ("pair", "row") or stacked ("walk")."""
    number = len(answer.shown[0].samples)
    columns = {"pair": max(1, round(number**0.5)), "row": 1, "walk": number}[kind]
    made = Markup("").join(_figure(one, answer, columns, kind) for one in answer.shown)
    notes = Markup("").join(Markup("<li>{}</li>").format(note) for note in answer.notes)
    head = Markup('<ul class="notes">{}</ul>').format(notes) if answer.notes else ""
    # gradio would evaluate ${...} as a template.
    return str(Markup('{}<div class="made {}">{}</div>').format(head, kind, made)).replace("${", "$&#123;")


def _there_and_back(shown: Shown, alt: str) -> Markup:
    """Return a walk as a back-and-forth animation, or as its first frame if the reader prefers reduced motion."""
    height, width = figures.tile_size(shown.samples)
    factor = max(1, MOVING_WIDTH // width)
    frames = [
        Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame).resize(
            (width * factor, height * factor), Image.Resampling.NEAREST
        )
        for frame in (*shown.samples, *shown.samples[-2:0:-1])
    ]

    def url(kept: Sequence[Image.Image]) -> str:
        buffer = io.BytesIO()
        kept[0].save(buffer, "PNG", save_all=len(kept) > 1, append_images=kept[1:], duration=MILLISECONDS, loop=0)
        return figures.data_url(buffer.getvalue(), "image/png")

    return Markup(
        '<picture class="moving"><source media="(prefers-reduced-motion: reduce)" srcset="{}">'
        '<img src="{}" width="{}" height="{}" alt="{}, animated back and forth"></picture>'
    ).format(url(frames[:1]), url(frames), *frames[0].size, alt)


def _figure(shown: Shown, answer: Answer, columns: int, kind: str) -> Markup:
    calls = count(shown.num_evals, "network call")
    time = f"{number(1000 * shown.seconds)} ms" if shown.seconds < 1 else f"{number(shown.seconds)} s"
    steps = count(shown.num_steps, "step")
    alt = f"{count(len(shown.samples), 'sample')} of {shown.stage} at {steps}"
    downloads = {}
    if figures.is_images(shown.samples):
        picture, downloads["PNG"] = figures.image_grid(shown.samples, columns, alt, in_full=True)
    else:
        box = figures.limits(next((one.samples for one in answer.shown if one.is_start), shown.samples))
        picture = figures.scatter(shown.samples, box, len(figures.COLOURS), alt)
    if kind == "walk" and figures.is_images(shown.samples):
        picture = Markup("{}{}").format(_there_and_back(shown, alt), picture)
    npz = io.BytesIO()
    np.savez_compressed(npz, arr_0=shown.samples)
    downloads["npz"] = figures.data_url(npz.getvalue(), "application/octet-stream")
    name = re.sub(r"[^\w.-]", "_", f"{shown.stage}-{shown.num_steps}-steps")
    links = Markup("").join(
        Markup('<a download="{}.{}" href="{}">Download {}</a>').format(name, label.lower(), url, label)
        for label, url in downloads.items()
    )
    caption = Markup("<figcaption><b>{}</b>{}, {}, {}, {}</figcaption>").format(
        shown.label, steps, calls, time, sampler_label(shown.sampler)
    )
    return Markup('<figure data-stage="{}" data-seconds="{:.6f}">{}{}<div class="get">{}</div></figure>').format(
        shown.stage, shown.seconds, caption, picture, links
    )
