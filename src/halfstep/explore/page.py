"""The explorer's page: gradio around `Explorer`, behind a filter that passes only the page's own requests.

gradio also accepts uploads, serves files, fetches from other hosts and collects usage data. `Door` serves only `PATHS`,
blocks other hosts in the browser, and refuses requests with a host name other than this machine's (DNS rebinding).
Images are embedded in the responses, so no files are written.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from typing import Any, Final, final

import numpy as np
from markupsafe import Markup
from PIL import Image

from halfstep.explore.explorer import Answer, Explorer, Shown
from halfstep.report import figures
from halfstep.report.words import count, number, sampler_label
from halfstep.runtime.terminal import one_line

LARGEST_QUEUE: Final = 32
"""Maximum number of waiting requests."""
LARGEST_BODY: Final = 64 * 1024
"""Maximum bytes of a request."""
MOVING_WIDTH: Final = 256
"""Approximate width in pixels of a walk's animation."""
MILLISECONDS: Final = 120
"""Duration of each frame of that animation."""
PATIENCE: Final = 10.0
"""Seconds for a client to send the headers, to send the body, and to read the next part of the response."""
PATHS: Final = re.compile(
    r"/(|config|theme\.css|favicon\.ico|(assets|static)/.*"
    r"|gradio_api/(info|app_id|theme\.css|startup-events|queue/(join|data)|heartbeat/\w+|call/(compare|strip|walk)(/\w+)?|cancel|reset))/?"
)
POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; "
    "form-action 'self'; object-src 'none'"
)
"""Allows the inline scripts and evaluated templates of gradio's page, but no other host."""
LOCAL: Final = ("127.0.0.1", "localhost", "[::1]")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@final
class Door:
    """ASGI middleware that filters requests to another app.

    Args:
        hosts: accepted host names; None for any.
        inputs: number of values that each function takes, by its name and its number.
        root_path: path under which a proxy serves the page, such as "/user/me/proxy/7860".
    """

    def __init__(
        self, app: App, hosts: Sequence[str] | None, inputs: Mapping[str | int, int], root_path: str = ""
    ) -> None:
        self.app, self.hosts, self.inputs, self.root_path = app, hosts, inputs, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and re.sub(r":\d+$", "", host) not in self.hosts:
            known = ", ".join(dict.fromkeys(self.hosts))
            text = (
                f"this page can only be reached as {known}. Restart it with --allow-host {one_line(host)[:100]}, or "
                "forward its port: ssh -L 7860:127.0.0.1:7860 MACHINE"
            )
            await _refuse(send, 421, text)
            return
        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            # Some proxies strip the prefix, others do not.
            scope["path"] = scope["path"].removeprefix(self.root_path)
        if not PATHS.fullmatch(scope["path"]) or ".." in scope["path"]:
            await _refuse(send, 404, "not found; the page is at /")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY or b"transfer-encoding" in headers:
            await _refuse(send, 413, f"a request may have at most {LARGEST_BODY} bytes")
            return

        body = b""
        is_post = more = scope["method"] == "POST"
        try:
            async with asyncio.timeout(PATIENCE):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            await _refuse(send, 408, f"a request must arrive within {PATIENCE:g} seconds")
            return
        if is_post and (wrong := self._wrong(scope["path"].rstrip("/"), body)) is not None:
            await _refuse(send, 400, wrong)
            return
        failed, given = False, not is_post

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def with_policy(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                failed = message["status"] == 500
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            if not failed:
                await send(message)

        try:
            await self.app(scope, again, with_policy)
        except Exception as error:
            # gradio raises an exception for an unexpected request, such as an unknown function number.
            path = one_line(scope["path"])[:100]
            print(f"halfstep: a request to {path} failed ({type(error).__name__})", file=sys.stderr)
            if not failed:
                raise
        if failed:
            await _refuse(send, 400, "invalid request")

    def _wrong(self, path: str, body: bytes) -> str | None:
        """Return the error in a function call; None if it is valid."""
        found = re.fullmatch(r"/gradio_api/(?:call/(\w+)|queue/join)", path)
        if found is None:
            return None
        try:
            held = json.loads(body)
        except (ValueError, RecursionError):
            held = None
        data = held.get("data") if isinstance(held, dict) else None
        if not isinstance(data, list):
            return 'a call must be JSON, {"data": [...]}'
        name = found[1] or held.get("fn_index")
        needed = self.inputs.get(name) if isinstance(name, str | int) else None
        if needed is None:
            return f"function {name!r:.40} does not exist"
        if len(data) != needed:
            return f"this function takes {needed} values, got {len(data)}: see /gradio_api/info"
        if any(isinstance(value, dict | list) for value in data):
            # gradio would take some of these for files, and copy or fetch them before calling the function.
            return "each value must be a number, string or null"
        return None


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"halfstep: {text}\n".encode()})


def serve(
    explorer: Explorer,
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = print,
    allowed: Sequence[str] = (),
    root_path: str = "",
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: 0 for any free port.
        allowed: further accepted host names, such as a proxy's.
        root_path: path under which a proxy serves the page.
        ready: called with the address once the port is bound.

    Raises:
        ValueError: if gradio is not installed, or the address cannot be bound.
    """
    everywhere = host in ("0.0.0.0", "::", "")
    names = (*LOCAL, f"[{host}]" if ":" in host else host, *(name.lower() for name in allowed))
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
            http=_impatient(),
            log_level="warning",
            access_log=False,
            ws="none",
            # Sampling and reading a response may take long, so this closes only connections without a request.
            timeout_keep_alive=int(PATIENCE),
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


def _impatient() -> Any:
    """Return uvicorn's protocol with timeouts for slow headers and for clients that stop reading."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.idle_since, self.unsent = self.loop.time(), 0
            self._look()

        def _look(self) -> None:
            unsent = self.transport.get_write_buffer_size()
            is_answered = self.cycle is not None and not self.cycle.response_complete
            if unsent != self.unsent or (is_answered and not unsent):
                self.idle_since = self.loop.time()
            elif self.loop.time() - self.idle_since > PATIENCE:
                if unsent:
                    # Otherwise the kernel would keep the unsent data and the socket.
                    held = self.transport.get_extra_info("socket")
                    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.transport.abort()
                self.transport.close()
            self.unsent = unsent
            if not self.transport.is_closing():
                self.loop.call_later(1.0, self._look)

    return Impatient


def page(explorer: Explorer, hosts: Sequence[str] | None, root_path: str = "") -> App:
    """Return the page behind its filter, as an ASGI app.

    Raises:
        ValueError: if gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ValueError("the explorer needs gradio, which is not installed: pip install 'halfstep[explore]'")
    # gradio reads these on import.
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
    return Door(inner, hosts, inputs, root_path)


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
    """Return the page: the settings, and below them a tab for each view."""
    last = explorer.present[-1]
    most_samples, most_frames = explorer.bounds.samples(explorer.shape), explorer.bounds.frames(explorer.shape)

    def answered(ask: Callable[..., Answer], kind: str, label: str) -> Callable[..., str]:
        def call(*values: Any) -> str:
            try:
                return _html(kind, ask(*values))
            except ValueError as error:
                raise gr.Error(str(error), duration=None, title="Not possible", print_exception=False) from None

        call.__doc__ = label
        return call

    # gradio's own check of a value prints a traceback. The explorer's message says more.
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
            gr.Markdown("Samples of every stage from one noise, each stage with its own steps.")
            strip = gr.Button("Sample", variant="primary", elem_id="strip")
            stripped = gr.HTML(elem_id="stripped")
        with gr.Tab("Walk"):
            gr.Markdown("Samples along the great circle between the noises of two seeds.")
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
        call = answered(explorer.strip, "row", "Samples of every stage from one noise, as HTML.")
        strip.click(call, [seed, class_label, scale], stripped, api_name="strip", **together)
        asked = [stage, steps, seed, other_seed, frames, class_label, scale]
        call = answered(explorer.walk, "walk", "Samples along the great circle between two noises, as HTML.")
        walk.click(call, asked, walked, api_name="walk", **together)
    return blocks.queue(max_size=LARGEST_QUEUE, default_concurrency_limit=1)


# --- Answers as HTML ---


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it literally."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~$-])", r"\\\1", text)


def _html(kind: str, answer: Answer) -> str:
    """Return the answer's images side by side ("pair", "row") or below each other ("walk")."""
    number = len(answer.shown[0].samples)
    columns = {"pair": max(1, round(number**0.5)), "row": 1, "walk": number}[kind]
    made = Markup("").join(_figure(one, answer, columns, kind) for one in answer.shown)
    notes = Markup("").join(Markup("<li>{}</li>").format(note) for note in answer.notes)
    head = Markup('<ul class="notes">{}</ul>').format(notes) if answer.notes else ""
    # gradio would evaluate ${...} as a template.
    return str(Markup('{}<div class="made {}">{}</div>').format(head, kind, made)).replace("${", "$&#123;")


def _there_and_back(shown: Shown, alt: str) -> Markup:
    """Return a walk as an animation back and forth, or its first frame if the reader prefers reduced motion."""
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
