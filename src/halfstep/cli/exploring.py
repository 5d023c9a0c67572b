"""`halfstep explore`: opens a local page for sampling from a run's models."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from halfstep.cli.arguments import device_of
from halfstep.cli.usage import Count, Steps, UsageError, parse
from halfstep.cli.words import Screen
from halfstep.explore.explorer import Bounds, Explorer
from halfstep.explore.page import LOCAL, serve
from halfstep.runtime.terminal import warn


@dataclass
class ExploreArguments:
    """Open a local page that compares teacher and student samples drawn from the same noise. The page requires gradio
    (pip install 'halfstep[explore]'). Press Ctrl-C to stop serving the page."""

    run: tyro.conf.Positional[Path]
    """Folder of a run or stage."""
    host: str = "127.0.0.1"
    """Address to listen on. The page has no password, so anyone who can reach the address can use it."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 7860
    """Port to listen on; 0 picks a free port."""
    max_samples: Count = 64
    """Maximum number of samples per request."""
    max_steps: Steps = 1024
    """Maximum number of sampler steps per request."""
    max_seconds: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """Maximum sampling time per request, in seconds."""
    allow_host: tuple[str, ...] = ()
    """Additional host names for the page, such as a proxy's name."""
    root_path: str = ""
    """Path under which a proxy serves the page, such as /user/me/proxy/7860."""
    device: str | None = None
    """cpu or cuda; by default, cuda if it is available, otherwise cpu."""


def explore(argv: Sequence[str]) -> None:
    arguments = parse(ExploreArguments, argv, "halfstep explore")
    bounds = Bounds(num_samples=arguments.max_samples, num_steps=arguments.max_steps, seconds=arguments.max_seconds)
    explorer = Explorer(arguments.run, device_of(arguments.device), bounds)
    for choice in explorer.choices:
        if choice.missing is not None:
            warn(f"{choice.name} is missing: {choice.missing}")
    if arguments.host not in (*LOCAL, "::1"):
        warn(f"the page has no password, so anyone who can reach {arguments.host} can use it")
    if arguments.root_path and not re.fullmatch(r"(/[\w.~-]+)+/?", arguments.root_path):
        raise UsageError(f"--root-path {arguments.root_path} must be a path such as /user/me/proxy/7860")

    def ready(url: str) -> None:
        Screen().say(f"{url}  (press Ctrl-C to stop)")
        sys.stdout.flush()

    root_path = arguments.root_path.rstrip("/")
    serve(explorer, arguments.host, arguments.port, ready, arguments.allow_host, root_path)
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing needs saving, and a normal exit would wait for the current sampling step and then spend seconds unloading
    # modules.
    os._exit(0)
