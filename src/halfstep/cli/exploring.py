"""`halfstep explore`: a local page that samples a run's models."""

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
    """Open a local page that samples a run's teacher and students side by side from the same noise.
    Needs gradio (pip install 'halfstep[explore]'). Stop it with Ctrl-C."""

    run: tyro.conf.Positional[Path]
    """Folder of a run or of a stage."""
    host: str = "127.0.0.1"
    """Address to listen on. An address other than this machine's exposes the page to others, without a password."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 7860
    """Port to listen on; 0 picks a free one."""
    max_samples: Count = 64
    """Maximum samples per request."""
    max_steps: Steps = 1024
    """Maximum sampler steps per request."""
    max_seconds: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """Maximum sampling time per request, in seconds."""
    allow_host: tuple[str, ...] = ()
    """Additional host names of the page, such as a proxy's."""
    root_path: str = ""
    """Path under which a proxy serves the page, such as /user/me/proxy/7860."""
    device: str | None = None
    """cpu, cuda or mps; the fastest available by default."""


def explore(argv: Sequence[str]) -> None:
    arguments = parse(ExploreArguments, argv, "halfstep explore")
    bounds = Bounds(num_samples=arguments.max_samples, num_steps=arguments.max_steps, seconds=arguments.max_seconds)
    explorer = Explorer(arguments.run, device_of(arguments.device), bounds)
    for choice in explorer.choices:
        if choice.missing is not None:
            warn(f"{choice.name} is missing: {choice.missing}")
    if arguments.host not in (*LOCAL, "::1"):
        warn(f"others can reach {arguments.host} without a password")
    if arguments.root_path and not re.fullmatch(r"(/[\w.~-]+)+/?", arguments.root_path):
        raise UsageError(f"--root-path {arguments.root_path} must be a path such as /user/me/proxy/7860")

    def ready(url: str) -> None:
        Screen().say(f"{url}  (stop it with Ctrl-C)")
        sys.stdout.flush()

    root_path = arguments.root_path.rstrip("/")
    serve(explorer, arguments.host, arguments.port, ready, arguments.allow_host, root_path)
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing must be saved. A normal exit would wait for a sampling step and unload modules for seconds.
    os._exit(0)
