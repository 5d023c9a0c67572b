"""Download and cache onnxruntime-web, which runs graphs in browsers, and verify its sha256 digests."""

import contextlib
import hashlib
import io
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from halfstep.runtime.files import DamagedFile, cache_folder, first_line, replacing_folder

VERSION: Final = "1.30.0"
URL: Final = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
MODULE: Final = "ort.wasm.bundle.min.mjs"
BINARY: Final = "ort-wasm-simd-threaded.wasm"
SHA256: Final[Mapping[str, str]] = {
    MODULE: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    BINARY: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""The sha256 digests of the files that a page needs from the package's dist folder."""
REMEDY: Final = f"download {URL} and pass that file with --runtime."
TIMEOUT: Final = 60.0
"""Seconds without data after which the registry is considered unreachable."""


def read_runtime(source: Path | None = None) -> dict[str, bytes]:
    """Return the contents of the files in `SHA256`, keyed by name.

    Args:
        source: the npm package, packed (.tgz) or unpacked. If None, the package is downloaded once into the cache.

    Raises:
        ValueError: if a file is missing or altered, or if the registry cannot be reached.
    """
    if source is not None:
        return _read(source)
    folder = cache_folder() / f"onnxruntime-web-{VERSION}"
    try:
        return _read(folder)
    except ValueError:  # not downloaded yet, or damaged
        return _fetch(folder)


def licences() -> str:
    """Return onnxruntime's licence and notices from its Python package, because the npm package contains none."""
    package = distribution("onnxruntime")
    files = [Path(str(package.locate_file(f"onnxruntime/{name}"))) for name in ("LICENSE", "ThirdPartyNotices.txt")]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _read(source: Path) -> dict[str, bytes]:
    try:
        if source.is_dir():
            found = {name: (source / "dist" / name).read_bytes() for name in SHA256}
        else:
            found = _unpacked(source.read_bytes())
    except (OSError, KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{source} is not the npm package onnxruntime-web ({first_line(error)}): {REMEDY}") from None
    return _checked(found, str(source))


def _checked(found: dict[str, bytes], source: str) -> dict[str, bytes]:
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise ValueError(f"{name} in {source} is not from onnxruntime-web {VERSION} (its sha256 differs): {REMEDY}")
    return found


def _unpacked(package: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        found = {}
        for name in SHA256:
            member = archive.extractfile(f"package/dist/{name}")
            if member is None:
                raise KeyError(f"{name} is not a file")
            found[name] = member.read()
        return found


def _fetch(folder: Path) -> dict[str, bytes]:
    """Download the files in `SHA256`, and store them in the folder in the layout of the unpacked package."""
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer:
            found = _checked(_unpacked(answer.read()), URL)
    except (OSError, HTTPException, KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = first_line(error)
        raise ValueError(f"onnxruntime-web cannot be downloaded ({reason}). On another machine, {REMEDY}") from None
    # Without a writable cache, the files are downloaded again for each export.
    with contextlib.suppress(OSError, DamagedFile), replacing_folder(folder) as into:
        (into / "dist").mkdir()
        for name, content in found.items():
            (into / "dist" / name).write_bytes(content)
    return found
