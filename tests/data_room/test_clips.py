"""Videos and sounds become samples of one shape, and every refusal is one line."""

import wave
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from halfstep.data import Encoder, SoundPreparation, VideoPreparation, clips, encode, read_clips
from halfstep.data.preparation import Preparation

needs_av = pytest.mark.skipif(find_spec("av") is None, reason="needs the package av")


def pictures(count: int, width: int = 24, height: int = 16) -> list[Image.Image]:
    """Frames of noise, each around a grey of its own."""
    random = np.random.default_rng(0)
    levels = np.linspace(40, 200, count)[:, None, None, None]
    return [Image.fromarray(x) for x in (levels + random.integers(0, 20, (count, height, width, 3))).astype(np.uint8)]


def gif(path: Path, durations: list[int]) -> Path:
    """Frames of one grey each: a .gif keeps 256 colours."""
    frames = [Image.new("L", (8, 8), 20 + 10 * number) for number in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations)
    return path


def folder_of(path: Path, frames: list[Image.Image]) -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames):
        frame.save(path / f"frame_{number}.png")
    return path


def shown(x: Tensor) -> list[int]:
    """The number of each frame in a video of `gif`."""
    return [round((float(frame.mean()) + 1) * 127.5 / 10 - 2) for frame in x.unbind(1)]


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("rate", [2.5, 4.0, 10.0, 30.0])
def test_a_frame_rate_takes_what_is_shown_at_that_time(tmp_path: Path, rate: float) -> None:
    durations = [100, 300, 50, 450, 200]
    ends = np.cumsum(durations) / 1000
    wanted = [int((ends <= place / rate + 1e-6).sum()) for place in range(int(1.1 * rate + 0.999))]
    path = gif(tmp_path / "a.gif", durations)
    prepare = VideoPreparation(len(wanted), 8, 8, rate)
    prepare.check(path)
    assert shown(prepare(path)) == wanted
    longer = VideoPreparation(len(wanted) + 1, 8, 8, rate)
    for refuse in (longer, longer.check):
        refused(
            lambda refuse=refuse: refuse(path),
            f"has only {len(wanted)} of the {len(wanted) + 1} frames",
            f"at {rate:g} frames per second",
            "num_frames",
        )


def test_without_a_frame_rate_the_first_frames_are_taken(tmp_path: Path) -> None:
    assert shown(VideoPreparation(3, 8, 8)(gif(tmp_path / "a.gif", [100, 300, 50, 400]))) == [0, 1, 2]


def test_frames_of_a_folder_are_cropped_and_resized_as_images_are(tmp_path: Path) -> None:
    """And in the order of their numbers: 10 follows 9."""
    frames = pictures(12)
    folder = folder_of(tmp_path / "clip", frames)
    x = VideoPreparation(12, 8, 8, frame_rate=3.0)(folder)
    wanted = torch.stack([torch.from_numpy(Preparation(8, channels=3)(frame)) for frame in frames], 1)
    torch.testing.assert_close(x, wanted / 127.5 - 1, rtol=0, atol=1e-6)
    assert VideoPreparation(2, 4, 10)(folder).shape == (3, 2, 4, 10)


def sine(rate: int, seconds: float = 1.0) -> np.ndarray[Any, Any]:
    """Two channels of different tones."""
    time = np.arange(int(rate * seconds)) / rate
    return 0.5 * np.stack([np.sin(2 * np.pi * 440 * time), np.cos(2 * np.pi * 300 * time)], 1)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_a_sound_is_resampled_to_the_same_tone(tmp_path: Path, rate: int) -> None:
    wavfile.write(tmp_path / "a.wav", rate, sine(rate).astype(np.float32))
    x = SoundPreparation(2, 16000, 16000, 12000)(tmp_path / "a.wav")
    torch.testing.assert_close(x[:, 500:12000].T, torch.from_numpy(sine(16000)[500:12000]).float(), rtol=0, atol=5e-3)
    assert not x[:, 12000:].any()
    assert x.shape == (2, 16000)


def test_a_sound_ends_with_its_file_or_with_the_audible_part(tmp_path: Path) -> None:
    for number, seconds in enumerate((0.5, 3.0)):
        wavfile.write(tmp_path / f"{number}.wav", 8000, sine(8000, seconds).astype(np.float32))
        (tmp_path / f"{number}.txt").write_text("")
    data = read_clips(tmp_path, SoundPreparation(2, 32000, 16000, 24000))
    assert data.ends([1, 0]) == [1.5, 0.5]
    read_clips(tmp_path, SoundPreparation(2, 32000, 16000, 24000, 0.5)).check()
    late = read_clips(tmp_path, SoundPreparation(2, 32000, 16000, 24000, 0.75))
    refused(late.check, "0.wav ends after 0.5 s, before audio_start_in_s 0.75: remove it")


def test_every_kind_of_sample_is_the_same_sound(tmp_path: Path) -> None:
    x, prepare = sine(8000), SoundPreparation(2, 9000, 8000, 9000)
    for number, (scale, kind) in enumerate(((2**7, "u1"), (2**15, "i2"), (2**31, "i4"), (1, "f4"), (1, "f8"))):
        values = x * scale + (128 if kind == "u1" else 0)
        wavfile.write(tmp_path / f"{number}.wav", 8000, values.round(0 if scale > 1 else 9).astype(kind))
    with wave.open(str(tmp_path / "5.wav"), "wb") as file:
        file.setparams((2, 3, 8000, 0, "NONE", ""))
        file.writeframes((x * 2**31).astype("<i4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    wanted = torch.nn.functional.pad(torch.from_numpy(x.T).float(), (0, 1000))
    for number in range(6):
        torch.testing.assert_close(
            prepare(tmp_path / f"{number}.wav"), wanted, rtol=0, atol=5e-3 if number == 0 else 1e-4
        )


def test_channels_are_repeated_or_averaged(tmp_path: Path) -> None:
    x = sine(8000).astype(np.float32)
    wavfile.write(tmp_path / "two.wav", 8000, x)
    wavfile.write(tmp_path / "one.wav", 8000, x[:, 0])
    wavfile.write(tmp_path / "six.wav", 8000, np.repeat(x, 3, axis=1))
    one, two = (SoundPreparation(channels, 8000, 8000, 8000) for channels in (1, 2))
    torch.testing.assert_close(one(tmp_path / "two.wav")[0], torch.from_numpy(x.mean(1)))
    torch.testing.assert_close(two(tmp_path / "one.wav"), torch.from_numpy(x[:, :1].T).expand(2, -1))
    refused(lambda: read(tmp_path / "six.wav", two), "has 6 channels, but the pipeline takes 2")


def read(path: Path, prepare: Any) -> Tensor:
    return clips._read(prepare, path)


@needs_av
def test_other_files_hold_the_same_frames_and_sounds(tmp_path: Path) -> None:
    import av

    frames = pictures(7)
    with av.open(str(tmp_path / "a.mov"), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "rgb24"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    folder = folder_of(tmp_path / "frames", frames)
    every = VideoPreparation(7, 16, 24)
    every.check(tmp_path / "a.mov")
    torch.testing.assert_close(every(tmp_path / "a.mov"), every(folder))
    half = VideoPreparation(4, 16, 24, 5.0)
    half.check(tmp_path / "a.mov")
    torch.testing.assert_close(half(tmp_path / "a.mov"), every(folder)[:, ::2])
    longer = VideoPreparation(5, 16, 24, 5.0)
    for call in (longer, longer.check):
        refused(lambda call=call: read(tmp_path / "a.mov", call), "a.mov has only 4 of the 5 frames")
    with av.open(str(tmp_path / "turned.mov"), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "rgb24"
        stream.set_display_rotation(90)  # counter-clockwise
        file.mux(stream.encode(av.VideoFrame.from_image(frames[0])))
        file.mux(stream.encode())
    turned = VideoPreparation(1, 24, 16)(tmp_path / "turned.mov")
    torch.testing.assert_close(turned, every(folder)[:, :1].rot90(1, (2, 3)))
    x = (sine(8000) * 2**15).astype("<i2")
    wavfile.write(tmp_path / "a.wav", 8000, x)
    with av.open(str(tmp_path / "a.flac"), "w") as file:
        track = file.add_stream("flac", rate=8000, layout="stereo", format="s16")
        sound = av.AudioFrame.from_ndarray(x.reshape(1, -1), "s16", "stereo")
        sound.sample_rate = 8000
        file.mux(track.encode(sound))
        file.mux(track.encode())
    prepare = SoundPreparation(2, 9000, 4000, 3000)
    torch.testing.assert_close(prepare(tmp_path / "a.flac"), prepare(tmp_path / "a.wav"))
    (tmp_path / "a.mov").rename(tmp_path / "silent.m4a")
    refused(lambda: read(tmp_path / "silent.m4a", prepare.check), "silent.m4a has no audio track: remove it")
    (tmp_path / "a.flac").rename(tmp_path / "dark.mp4")
    refused(lambda: read(tmp_path / "dark.mp4", every.check), "dark.mp4 has no video track: remove it")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)))
    refused(lambda: read(tmp_path / "noise.mp4", every.check), "noise.mp4 cannot be read", "repair or remove it")


VIDEO = VideoPreparation(2, 8, 8)
SOUND = SoundPreparation(1, 8, 4, 8)


def test_clips_are_files_and_folders_of_frames_with_captions(tmp_path: Path) -> None:
    gif(tmp_path / "b.gif", [100, 100])
    folder_of(tmp_path / "a" / "take.1", pictures(2))
    folder_of(tmp_path / "a" / "take.2", pictures(3)[1:])
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\na/take.2,two\nb.gif,gif\na/take.1,one\n")
    data = read_clips(tmp_path, VIDEO)
    assert ([path.as_posix() for path in data.files], data.captions) == (
        ["a/take.1", "a/take.2", "b.gif"],
        ("one", "two", "gif"),
    )
    assert [path.name for path in data.contents] == [
        "frame_0.png",
        "frame_1.png",
        "frame_0.png",
        "frame_1.png",
        "b.gif",
    ]
    data.check()
    assert data.x0([2, 0]).shape == (2, 3, 2, 8, 8)
    table.unlink()
    for name, text in (("a/take.1", "one"), ("a/take.2", "two"), ("b", "gif")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_clips(tmp_path, VIDEO).captions == data.captions


def test_what_is_no_clip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str, prepare: Any = VIDEO) -> None:
        refused(lambda: read_clips(tmp_path, prepare).check(), *words)

    pictures(1)[0].save(tmp_path / "a.png")
    said("contains no clips", ".mp4", "no sub-folder contains frames")
    said("contains no clips", ".wav", prepare=SOUND)
    refused(lambda: read_clips(tmp_path / "none", VIDEO), "none is missing: pass a folder of clips with captions")
    gif(tmp_path / "b.gif", [100, 100])
    said("has no caption for 1 of 1 clips", "write b.txt", "A caption may be empty")
    (tmp_path / "c.txt").write_text("")
    said("captions without a clip (1 in total", "c.txt", "add the clips")
    (tmp_path / "c.txt").rename(tmp_path / "b.txt")
    read_clips(tmp_path, VIDEO).check()
    folder_of(tmp_path / "d", pictures(1))
    (tmp_path / "d.txt").write_text("")
    said(f"{tmp_path / 'd'} has only 1 of the 2 frames that the pipeline needs")
    (tmp_path / "d/frame_1.png").write_bytes(b"?")
    refused(lambda: read_clips(tmp_path, VIDEO).x0([1]), f"{tmp_path / 'd'} cannot be read", "frame_1.png", "repair")
    (tmp_path / "b.gif").write_bytes((tmp_path / "b.gif").read_bytes()[:20])
    said("b.gif cannot be read")
    (tmp_path / "b.gif").rename(tmp_path / "b.mp4")
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    said(
        "b.mp4 needs the package av: run pip install 'halfstep[clips]', or convert the clip to .gif, .wav or a folder "
        "of frames"
    )
    (tmp_path / "b.mp4").rename(tmp_path / "b.wav")
    (tmp_path / "d.txt").unlink()
    said("b.wav cannot be read", prepare=SOUND)
    wavfile.write(tmp_path / "b.wav", 4, np.zeros(0, np.int16))
    said("b.wav contains no sound: remove it", prepare=SOUND)


def test_latents_of_other_clips_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "data/a", pictures(3))
    (tmp_path / "data/a.txt").write_text("")
    encoder = Encoder(lambda x: x.mean((3, 4)), lambda captions: {}, "means")

    def made(prepare: VideoPreparation = VIDEO) -> Tensor:
        data = encode(read_clips(tmp_path / "data", prepare), encoder, tmp_path / "latents")
        return data.fetch(torch.tensor([0])).x0

    torch.testing.assert_close(made(), VIDEO(tmp_path / "data/a").mean((2, 3))[None])
    made()
    refused(lambda: made(VideoPreparation(2, 8, 8, 5.0)), "frame_rate was None and is now 5.0")
    pictures(1)[0].save(tmp_path / "data/a/frame_2.png")
    refused(made, "different file contents")
