"""A filter that passes only the requests that the explorer's page needs.

gradio also accepts uploads, serves files, fetches from other hosts and collects usage data. `Door` serves only `PATHS`,
makes browsers block requests to other hosts, and refuses requests whose Host header is not in a list of accepted names,
which prevents DNS rebinding.
"""

import asyncio
import json
import re
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final, final

from halfstep.runtime.terminal import one_line

LARGEST_BODY: Final = 64 * 1024
"""Maximum size of a request in bytes."""
PATIENCE: Final = 10.0
"""Seconds that a client has to send the headers, to send the body, or to read more of the response."""
PATHS: Final = re.compile(
    r"/(|config|theme\.css|favicon\.ico|(assets|static)/.*"
    r"|gradio_api/(info|app_id|theme\.css|startup-events|queue/(join|data)|heartbeat/\w+|call/(compare|strip|walk)(/\w+)?|cancel|reset))/?"
)
POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; "
    "form-action 'self'; object-src 'none'"
)
"""The content security policy, which allows the inline scripts and evaluated templates of gradio's page but no other
hosts."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@final
class Door:
    """ASGI middleware that filters requests to another app.

    Args:
        hosts: accepted host names, or None to accept any.
        inputs: number of values that each function takes, keyed by the function's name and by its number.
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
                f"this page can only be reached as {known}. Restart halfstep explore with --allow-host "
                f"{one_line(host)[:100]}, or forward its port: ssh -L 7860:127.0.0.1:7860 MACHINE"
            )
            await _refuse(send, 421, text)
            return
        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            # Some proxies strip the prefix, and others do not.
            scope["path"] = scope["path"].removeprefix(self.root_path)
        if not PATHS.fullmatch(scope["path"]) or ".." in scope["path"]:
            await _refuse(send, 404, "not found; the page is at /")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY or b"transfer-encoding" in headers:
            await _refuse(send, 413, f"a request may contain at most {LARGEST_BODY} bytes")
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
        """Return what is wrong with a function call, or None if the call is valid."""
        found = re.fullmatch(r"/gradio_api/(?:call/(\w+)|queue/join)", path)
        if found is None:
            return None
        try:
            held = json.loads(body)
        except (ValueError, RecursionError):
            held = None
        data = held.get("data") if isinstance(held, dict) else None
        if not isinstance(data, list):
            return 'a call must be JSON of the form {"data": [...]}'
        name = found[1] or held.get("fn_index")
        needed = self.inputs.get(name) if isinstance(name, str | int) else None
        if needed is None:
            return f"function {name!r:.40} does not exist"
        if len(data) != needed:
            return f"this function takes {needed} values, got {len(data)}: see /gradio_api/info"
        if any(isinstance(value, dict | list) for value in data):
            # gradio would treat some of these values as files, and copy or fetch the files before calling the function.
            return "each value must be a number, string or null"
        return None


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"halfstep: {text}\n".encode()})


def impatient() -> Any:
    """Return uvicorn's HTTP protocol with timeouts for slow headers and for clients that stop reading."""
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
