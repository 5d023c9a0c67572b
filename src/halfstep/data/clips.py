"""Folders of captioned videos or sounds, all converted to the same shape.

A video is either a file or a folder with one image per frame. Pillow reads .gif files, scipy reads .wav files, and PyAV
reads all other formats.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, ClassVar, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from halfstep.data.captions import captions_of, existing
from halfstep.data.folders import IMAGE_SUFFIXES, SOUND_SUFFIXES, VIDEO_SUFFIXES, files_below
from halfstep.data.preparation import Preparation, TooDeep
from halfstep.runtime.files import check_regular, first_line, user_path
from halfstep.runtime.storage import GONE

_RGB: Final = Preparation(channels=3)
_GIF_SECONDS: Final = 0.1
"""The frame duration, in seconds, of .gif files that specify none. Browsers use the same value."""
_ROUNDING: Final = 1e-6
"""An upper bound, in seconds, on the rounding error of a sum of durations."""


class _Unfit(ValueError):
    """Raised if a clip cannot be used. The message starts with a verb, because it follows the clip's path."""


@final
@dataclass(frozen=True)
class VideoPreparation:
    """Converts the first frames of a video to `[3, num_frames, height, width]` by centre-cropping and resizing."""

    num_frames: int
    height: int
    width: int
    frame_rate: float | None = None
    """Frames per second to take from a file; None takes all frames. All frames in a folder are used."""
    suffixes: ClassVar[tuple[str, ...]] = VIDEO_SUFFIXES

    def __call__(self, path: Path) -> Tensor:
        """Return the pixels as float32 in [-1, 1]."""
        size, found = (self.width, self.height), list[NDArray[np.uint8]]()
        for image in self._sampled(path):
            pixels = Image.fromarray(_RGB(image()).transpose(1, 2, 0))
            found.append(np.asarray(ImageOps.fit(pixels, size, Image.Resampling.BICUBIC)))
            if len(found) == self.num_frames:
                return torch.from_numpy(np.stack(found)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)
        raise self._too_short(len(found))

    def check(self, path: Path) -> None:
        """Check that the file can be read, and that it has enough frames if it specifies their number."""
        if not _is_foreign(path):
            number = sum(1 for _ in self._sampled(path))
        else:
            with _opened(path, "video") as (container, stream):
                next(container.decode(stream))
                length = float((stream.duration or 0) * stream.time_base)
                number = stream.frames if self.frame_rate is None else math.ceil((length - _ROUNDING) * self.frame_rate)
            number = number or self.num_frames  # the number may be unknown until the whole file is decoded
        if number < self.num_frames:
            raise self._too_short(number)

    def _sampled(self, path: Path) -> Iterator[Callable[[], Image.Image]]:
        """Yield the image at each multiple of 1 / frame_rate, or every image for a folder or if frame_rate is None."""
        rate, place = None if path.is_dir() else self.frame_rate, 0
        for end, image in _frames(path):
            if rate is None:
                yield image
            while rate is not None and place / rate < end - _ROUNDING:
                yield image
                place += 1

    def _too_short(self, number: int) -> _Unfit:
        at = "" if self.frame_rate is None else f" at {self.frame_rate:g} frames per second"
        return _Unfit(
            f"has only {number} of the {self.num_frames} frames that the pipeline needs{at}: remove it, or lower "
            "--call num_frames"
        )


@final
@dataclass(frozen=True)
class SoundPreparation:
    """Resamples the beginning of a sound, and pads it with silence to `[channels, num_samples]`."""

    channels: int
    num_samples: int
    sampling_rate: int
    num_audible: int
    """The number of samples to take from the sound. The remaining samples are silent."""
    start: float = 0.0
    """The earliest time at which a sound may end, in seconds."""
    suffixes: ClassVar[tuple[str, ...]] = SOUND_SUFFIXES

    def __call__(self, path: Path) -> Tensor:
        """Return the waveform as float32 in [-1, 1]."""
        from scipy.signal import resample_poly

        found, rate = self._read(path)
        common = math.gcd(rate, self.sampling_rate)
        x = torch.from_numpy(resample_poly(found, self.sampling_rate // common, rate // common, axis=1))
        x = (x.mean(0, keepdim=True) if self.channels == 1 else x)[:, : self.num_audible].expand(self.channels, -1)
        return torch.nn.functional.pad(x, (0, self.num_samples - x.shape[1]))

    def check(self, path: Path) -> None:
        """Check that the sound can be read, and that it does not end too early."""
        self._read(path)

    def end(self, path: Path) -> float:
        """Return the end of the audible part, in seconds."""
        found, rate = self._read(path)
        return min(found.shape[1] / rate, self.num_audible / self.sampling_rate)

    def _read(self, path: Path) -> tuple[NDArray[np.float32], int]:
        """Return the waveform `[channels, n]` up to one second after the audible part, and the sampling rate."""
        seconds = self.num_audible / self.sampling_rate + 1
        found, rate = _streamed(path, seconds) if _is_foreign(path) else _wave(path)
        if found.size == 0:
            raise _Unfit("contains no sound: remove it")
        if (length := found.shape[1] / rate) < self.start:
            raise _Unfit(f"ends after {length:.3g} s, before audio_start_in_s {self.start:g}: remove it")
        if self.channels > 1 and len(found) not in (1, self.channels):
            raise _Unfit(f"has {len(found)} channels, but the pipeline takes {self.channels}: mix the sound down")
        return found[:, : math.ceil(seconds * rate)], rate


@final
@dataclass(frozen=True, eq=False)
class CaptionedClips:
    """The videos or sounds in the folder `source` and its sub-folders, each with a caption, which may be empty."""

    source: str
    files: tuple[Path, ...]
    """The paths of the clips, relative to `source`. Each path is a file or a folder of frames."""
    captions: tuple[str, ...]
    preparation: VideoPreparation | SoundPreparation

    def __len__(self) -> int:
        return len(self.files)

    @property
    def contents(self) -> list[Path]:
        """The full paths of all files in the clips, in order."""
        paths = [user_path(self.source) / file for file in self.files]
        return [file for path in paths for file in (_frame_files(path) if path.is_dir() else [path])]

    def x0(self, indices: Sequence[int]) -> Tensor:
        """Read and prepare the clips at `indices`; return them as float32 `[n, *dims]`.

        Raises:
            ValueError: if a clip cannot be read or is too short.
        """
        return torch.stack(self._each(self.preparation, indices))

    def ends(self, indices: Sequence[int]) -> list[float] | None:
        """Return the end time of each sound at `indices`, in seconds, or None if the clips are videos."""
        return self._each(self.preparation.end, indices) if isinstance(self.preparation, SoundPreparation) else None

    def check(self) -> None:
        """Check all clips before they are encoded, which can take hours; raise the same errors as `x0`."""
        self._each(self.preparation.check, range(len(self)))

    def _each(self, read: Callable[[Path], Any], indices: Sequence[int]) -> list[Any]:
        paths = [user_path(self.source) / self.files[index] for index in indices]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda path: _read(read, path), paths))


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    """Return `read(path)`, converting any error into one with a one-line message."""
    try:
        if not path.is_dir():
            check_regular(path)
        return read(path)
    except (_Unfit, TooDeep) as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # decoders raise many exception types for damaged files
        if isinstance(error, OSError) and error.errno in GONE:
            raise OSError(error.errno, f"{error.strerror}: the data is gone. Restore it", str(path)) from None
        raise ValueError(f"{path} cannot be read ({first_line(error)}): repair or remove it") from None


def read_clips(folder: Path, preparation: VideoPreparation | SoundPreparation) -> CaptionedClips:
    """Find all clips in the folder and its sub-folders, along with their captions, sorted by relative path.

    Raises:
        ValueError: if there are no clips, or as described in `read_captions`.
    """
    root = existing(folder, "of clips with captions")
    below = files_below(root)
    files = {path for path in below if path.suffix.lower() in preparation.suffixes}
    if isinstance(preparation, VideoPreparation):
        holding = {path.parent for path in files} | {PurePath()}
        files |= {path.parent for path in below if path.suffix.lower() in IMAGE_SUFFIXES} - holding
    if not files:
        frames = ", and no sub-folder contains frames" * isinstance(preparation, VideoPreparation)
        raise ValueError(
            f"{folder} contains no clips: no file in it or its sub-folders ends in "
            f"{' '.join(preparation.suffixes)}{frames}"
        )
    found = sorted(files, key=lambda path: path.parts)
    captions = captions_of(folder, found, below, "clip")
    return CaptionedClips(str(folder), tuple(map(Path, found)), captions, preparation)


def _frame_files(folder: Path) -> list[Path]:
    """Return the images in a folder in numerical order, so that frame 10 comes after frame 9."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted(found, key=lambda path: [part.zfill(20) for part in re.split(r"(\d+)", path.name)])


def _frames(path: Path) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """Yield the end time in seconds and the image of each frame. An image is only valid until the next frame."""
    end = 0.0
    if path.is_dir():
        for file in _frame_files(path):
            yield end, lambda file=file: Image.open(file)  # type: ignore[misc]
    elif not _is_foreign(path):
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                end += frame.info.get("duration", 0) / 1000 or _GIF_SECONDS
                yield end, frame.copy
    else:
        with _opened(path, "video") as (container, stream):
            for frame in container.decode(stream):
                length = (frame.duration or 0) * frame.time_base or 1 / stream.average_rate
                start = end if frame.time is None else frame.time - (stream.start_time or 0) * stream.time_base
                end = float(start + length)
                yield end, lambda frame=frame: frame.to_image().rotate(frame.rotation, expand=True)  # type: ignore[misc]


def _is_foreign(path: Path) -> bool:
    """Return whether reading a file requires PyAV."""
    return path.suffix.lower() not in (".gif", ".wav") and not path.is_dir()


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """Open a file with PyAV, and yield its container and first track of the given kind."""
    if find_spec("av") is None:
        raise _Unfit(
            "needs the package av: run pip install 'halfstep[clips]', or convert the clip to .gif, .wav or a folder of "
            "frames"
        )
    import av

    with av.open(str(path)) as container:
        stream = next((stream for stream in container.streams if stream.type == kind), None)
        if stream is None:
            raise _Unfit(f"has no {kind} track: remove it")
        stream.thread_type = "AUTO"
        yield container, stream


def _streamed(path: Path, seconds: float) -> tuple[NDArray[np.float32], int]:
    """Return the waveform `[channels, n]` of the first `seconds` seconds of a file, and the sampling rate."""
    with _opened(path, "audio") as (container, stream):
        import av

        resampler, parts, number = av.AudioResampler("fltp"), list[NDArray[np.float32]](), 0
        for frame in container.decode(stream):
            parts += [made.to_ndarray() for made in resampler.resample(frame)]
            number += frame.samples
            if number >= seconds * stream.rate:
                break
        return np.concatenate(parts or [np.empty((1, 0), np.float32)], axis=1), stream.rate


def _wave(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return a .wav file's waveform `[channels, n]` and sampling rate."""
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        rate, values = wavfile.read(path)
    x = np.atleast_2d(values.T)
    if x.dtype.kind == "u":
        x = (x.astype(np.float32) - 128) / 128
    elif x.dtype.kind == "i":
        # 24-bit samples are stored in the upper bytes of 32-bit integers.
        x = x.astype(np.float32) / -float(np.iinfo(x.dtype).min)
    return x.astype(np.float32), rate
