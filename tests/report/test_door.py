"""The explorer's server: host names, prefixes, slow clients, and its output."""

import asyncio
from collections.abc import MutableMapping, Sequence
from typing import Any

import pytest

from halfstep.explore import door as door_module
from halfstep.explore import page as page_module
from halfstep.explore.door import Door

Message = MutableMapping[str, Any]


def asked(door: Door, path: str = "/", host: str = "127.0.0.1:7860", is_slow: bool = False) -> tuple[int, str]:
    """Return the status and body of the server's response."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        if is_slow:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"host", host.encode("latin-1"))]
    scope = {"type": "http", "method": "POST" if is_slow else "GET", "path": path, "headers": headers}
    asyncio.run(door(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def inner(scope: Message, receive: Any, send: Any) -> None:
    if scope["path"].startswith("/static/"):
        raise OSError("name too long")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_a_refused_name_gets_a_remedy_and_an_allowed_one_the_page() -> None:
    status, text = asked(Door(inner, ("127.0.0.1", "127.0.0.1"), {}), host="hub.example.org")
    assert status == 421
    assert "can only be reached as 127.0.0.1" in text
    assert "--allow-host hub.example.org" in text
    assert "ssh -L" in text
    assert asked(Door(inner, ("127.0.0.1", "hub.example.org"), {}), host="Hub.example.org:80") == (200, "/")


def test_names_are_accepted_whatever_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[str] = []

    def page(explorer: Any, hosts: Sequence[str], root_path: str) -> None:
        accepted.extend(hosts)
        raise InterruptedError

    monkeypatch.setattr(page_module, "page", page)
    explorer: Any = None
    with pytest.raises(InterruptedError):
        page_module.serve(explorer, "MyBox.local", allowed=["Hub.example.org"])
    for host in ("MyBox.local:7860", "mybox.local", "hub.example.org"):
        assert asked(Door(inner, accepted, {}), host=host) == (200, "/")


def test_a_prefix_is_cut_off_whether_the_proxy_did_so_or_not() -> None:
    door = Door(inner, None, {}, "/user/me/proxy/7860")
    for path in ("/config", "/user/me/proxy/7860/config"):
        assert asked(door, path) == (200, "/config")
    assert asked(door, "/user/you/config")[0] == 404


def test_a_missing_request_body_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "PATIENCE", 0.05)
    assert asked(Door(inner, None, {}), "/gradio_api/queue/join", is_slow=True)[0] == 408


def test_a_path_reaches_the_terminal_without_control_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="too long"):
        asked(Door(inner, None, {}), "/static/\x1b]0;X\x07" + "a" * 300)
    printed = capsys.readouterr().err
    assert "\\x1b]0;X\\x07a" in printed
    assert "\x1b" not in printed
    assert len(printed) < 200
