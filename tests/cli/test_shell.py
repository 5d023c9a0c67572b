"""Streams, signals, environment, hostile names and numbers: no command ends with a traceback."""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

from halfstep.cli import main
from halfstep.cli.completion import command_line
from halfstep.cli.verbs import SITUATIONS, VERBS
from halfstep.cli.words import Screen
from halfstep.data import DataConfig
from halfstep.objectives import Training
from halfstep.recipes import Recipe
from halfstep.runtime.files import DamagedFile, cache_folder, user_path, write_text
from halfstep.runtime.launch import check_launch, rank, world_size
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.runtime.storage import NoStorage, no_storage
from halfstep.runtime.terminal import CONTROL, Output, printable
from support_cli import Capture, refused
from support_pipelines import save_ddpm


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--help >&-", 2, "cannot write to stdout (Bad file descriptor)"),
        ("--help > /dev/full", 2, "cannot write to stdout (No space left on device)"),
        ("--help 2>&- | true", 0, ""),
        ("--help | head -1", 0, ""),
        ("nonsense 2>&- >&-", 2, ""),
        ("nonsense 2> /dev/full", 2, ""),
    ],
)
def test_lost_streams_end_in_one_line_at_most(line: str, code: int, said: str) -> None:
    script = f"set -o pipefail; {sys.executable} -m halfstep {line}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == (1 if said else 0)


def test_a_broken_stream_loses_output_but_no_work(tmp_path: Path) -> None:
    class Broken(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(errno.EPIPE, "Broken pipe")

    out = Output(Broken(open(tmp_path / "x", "wb")))  # noqa: SIM115
    assert out.write("abc") == 3
    assert out.error is not None
    assert out.error.errno == errno.EPIPE


def test_a_console_without_the_character_shows_a_question_mark() -> None:
    held = io.BytesIO()
    out = Output(io.TextIOWrapper(held, encoding="cp1252"))
    out.write("a猫b")
    out.flush()
    assert held.getvalue() == b"a?b"


def test_texts_carry_no_markup_and_no_control_sequences() -> None:
    assert printable("\x1b]0;X\x07\u202e") == "\\x1b]0;X\\x07\\u202e"
    hostile = "[/b] :smile: \x1b]0;X \x9b31m \udce9"
    shown = "[/b] :smile: \\x1b]0;X \\x9b31m \ufffd"
    assert printable(hostile) == shown
    for is_terminal in (True, False):
        out = io.StringIO()
        screen = Screen(file=out, is_terminal=is_terminal)
        table = Table(hostile, title=hostile)
        table.add_row(hostile)
        screen.say(hostile)
        screen.note(hostile)
        screen.show(table)
        assert out.getvalue().count(shown) >= 2
        # Only rich's own colours.
        assert not re.search(r"[\x07\x9b\ud800-\udfff]|\x1b(?!\[[\d;]*m)", out.getvalue())
        if not is_terminal:
            assert not re.search(r"[ \t]$", out.getvalue(), re.MULTILINE)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x"}, "RANK must be a whole number of at least 0, got 'x'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a whole number of at least 1, got '-2'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 must be below WORLD_SIZE 2"),
        ({"MASTER_PORT": "٣"}, "MASTER_PORT must be"),
    ],
)
def test_a_launchers_variables_are_checked(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_launch()


def test_a_command_reports_a_launchers_bad_variable(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "x")
    assert "RANK must be a whole number" in refused(["status", "nowhere"], capsys)


def test_a_rank_without_a_world_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert (rank(), world_size()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size()) == (3, 4)


def test_a_user_without_a_home_gets_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setenv("HALFSTEP_CACHE", "")
    with pytest.raises(ValueError, match="set HOME or HALFSTEP_CACHE"):
        cache_folder()
    with pytest.raises(ValueError, match="the home folder of ~nobody is unknown"):
        user_path("~nobody/x")
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_the_cache_folder_may_start_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HALFSTEP_CACHE", "~/x")
    assert cache_folder() == tmp_path / "x"


def test_a_closed_terminal_stops_like_sigterm_unless_nohup_started_it() -> None:
    # The suite itself may have been started with nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
            assert Interrupted(stop.number).code == 129
            assert 129 in VERBS["run"].codes
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


COMMAND = sys.modules["halfstep.cli.main"]
"""The module; its package has a function with the same name."""


@pytest.mark.parametrize(
    ("verb", "said"), [("sample", "stopped immediately\n"), ("run", "the last checkpoint is safe\n")]
)
def test_a_stopped_process_leaves_without_unloading_its_modules(
    verb: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Left(BaseException):
        pass

    def pressed(_: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        # No printed output may remain in a buffer.
        assert capsys.readouterr().err.endswith(said)
        raise Left(code)

    monkeypatch.setattr(COMMAND, "_function_of", lambda _: pressed)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["halfstep", verb])
    with pytest.raises(Left, match="130"):
        main()
    # Called from Python, it returns.
    with pytest.raises(SystemExit, match="130"):
        main([verb])


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENAMETOOLONG, "x" * 300, "(File name too long). Choose a shorter name"),
        (errno.ENOTDIR, b"a/b", "a/b cannot be used (Not a directory). Choose another path"),
        (errno.EACCES, "a", "(Permission denied). Check its permissions, or choose another path"),
        (errno.EXDEV, "a", "(Invalid cross-device link). Check it"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_what_to_do(
    number: int, path: str | bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def failing(_: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(COMMAND, "_function_of", lambda _: failing)
    assert said in refused(["status", "x"], capsys)


def test_only_a_lost_disk_is_one() -> None:
    run = Path("runs/x")
    for number in (errno.ENAMETOOLONG, errno.EINVAL):
        error = OSError(number, os.strerror(number), "runs/x/log.jsonl")
        assert no_storage(error, run, None) is error
    for number in (errno.ENOTDIR, errno.EISDIR):
        error = OSError(number, os.strerror(number), "runs/x/log.jsonl")
        assert isinstance(no_storage(error, run, None), DamagedFile)
    for number in (errno.EACCES, errno.EROFS, errno.ENOENT):
        error = OSError(number, os.strerror(number), "runs/x/log.jsonl")
        assert no_storage(error, run, None, has_begun=False) is error
        assert isinstance(no_storage(error, run, None), NoStorage)


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "..", "", "a/b", "a\\b", "-x", "a\x1b[2J", "caf\udce9", "x" * 101]
)
def test_a_recipes_name_cannot_leave_the_runs(name: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(Recipe(name="x").model_dump(mode="json") | {"name": name}))
    assert "name: must" in refused(["run", str(tmp_path / "mine.json"), "--dry-run"], capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.json"]


def test_one_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {DataConfig(source=text).source for text in ("pics", "./pics", "pics/", ".//pics/.")} == {"pics"}
    assert DataConfig(source="owner/name").source == "owner/name"
    assert DataConfig(source="./owner/name").source == "./owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert DataConfig(source="./owner/name").source == "owner/name"
    # The parent of the linked folder is not the working folder.
    (tmp_path / "far" / "current").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/current")
    assert DataConfig(source="link/../pics").source == "link/../pics"


def test_a_text_with_bytes_of_a_name_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "caf\udce9")
    assert (tmp_path / "x").read_bytes() == b"caf?"


HUGE = [
    ("run", "arrays", "--network.width"),
    ("run", "arrays", "--network.depth"),
    ("run", "digits", "--teacher.batch-size"),
    ("run", "digits", "--teacher.num-updates"),
    ("run", "digits", "--chain.start-steps"),
    ("run", "digits", "--chain.lora-rank"),
    ("run", "digits", "--engine.threads"),
    ("run", "digits", "--engine.timeout-minutes"),
    ("run", "digits", "--engine.micro-batch"),
    ("run", "digits", "--evaluation.num-samples"),
    ("run", "digits", "--data.image-size"),
    ("run", "digits", "--network.layers-per-block"),
    ("run", "digits", "--matching.guidance-scale"),
    ("run", "digits", "--seed"),
    ("sample", "x", "--num-samples"),
    ("sample", "x", "--seed"),
    ("sample", "x", "--num-steps"),
    ("sample", "x", "--batch-size"),
    ("evaluate", "x", "--seeds"),
    ("evaluate", "x", "--num-samples"),
    ("evaluate", "x", "--search-gamma"),
    ("study", "table1", "--threads"),
    ("study", "table1", "--seeds"),
    ("explore", "x", "--port"),
    ("explore", "x", "--max-samples"),
    ("explore", "x", "--max-seconds"),
]


@pytest.mark.parametrize("command", HUGE, ids=" ".join)
def test_absurd_numbers_are_refused_at_once(command: tuple[str, ...], capsys: Capture) -> None:
    is_float = command[-1] in ("--engine.timeout-minutes", "--matching.guidance-scale", "--max-seconds")
    for text in ("1" + "0" * 30, *(("inf",) if is_float else ())):
        said = refused([*command, text, *(["--dry-run"] if command[0] == "run" else [])], capsys)
        assert command[-1] in said


def test_a_shortened_stage_warms_up_to_its_end() -> None:
    rates = [Training(4, 1.0, warmup_updates=100, anneal=False).rate_at(update) for update in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_an_error_names_the_option_that_was_typed(capsys: Capture) -> None:
    assert refused(["run", "digits", "--start", "0"], capsys).startswith("--start must be at least 1")
    assert refused(["run", "digits", "--teacher.warmup-updates", "-1"], capsys).startswith("--teacher.warmup-updates ")


# ------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_short_and_wrapped(verb: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            main([verb, option])
        assert end.value.code == 0
        printed[option] = capsys.readouterr().out
        assert not re.search(r"default:\s*\)|\(default: None\)|[ \t]$|│", printed[option], re.MULTILINE)
        examples = {f"  {example}" for example in VERBS[verb].examples}
        long = [line for line in printed[option].splitlines() if len(line) > 80 and line not in examples]
        # An option with many choices cannot be broken into lines.
        assert all(re.match(r"  -", line) for line in long), long
    if VERBS[verb].shown:
        assert len(printed["--help"].splitlines()) <= 40
        assert printed["--help-all"].count("\n") > 100


def test_the_overview_shows_situations_whose_commands_exist(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main([])
    printed = capsys.readouterr().out
    assert len(SITUATIONS) == 5
    for what, command in SITUATIONS:
        assert what in printed
        assert command.split()[1] in VERBS


BLOCKED = """
import os, sys
from pathlib import Path
from halfstep.cli import main
for file in Path(sys.argv[-1]).rglob("*.safetensors"):
    file.unlink()
    os.mkfifo(file)
main(sys.argv[1:])
"""
"""A command on a folder with FIFOs without writers as weights."""


def test_a_report_opens_no_fifo(toy_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    for file in run.rglob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)
    read = f"from halfstep.report import read_run; from pathlib import Path; print(read_run(Path({str(run)!r})).stages)"
    # Waiting for a writer would also block the interpreter lock.
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("num_parameters=None") == 3


@pytest.mark.slow
def test_weights_that_are_fifos_end_in_one_line_or_in_a_report(toy_run: Path, tmp_path: Path) -> None:
    def ended(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BLOCKED, *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    found = ended("sample", str(shutil.copytree(toy_run, tmp_path / "run")))
    assert found.returncode == 2
    assert "model.safetensors is" in found.stderr
    found = ended("report", str(tmp_path / "run"))
    assert (found.returncode, found.stdout) == (0, f"{tmp_path}/run/report/index.html\n")
    save_ddpm(tmp_path / "pipeline", in_channels=1, out_channels=1)
    found = ended("import", "diffusers", "--out", str(tmp_path / "out"), str(tmp_path / "pipeline"))
    assert found.returncode == 2
    assert "diffusion_pytorch_model.safetensors is" in found.stderr


# ------------------------------------------------------------------------------------------------------------- fuzz

VALUES = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "1e9",
        "1" + "0" * 30,
        "nan",
        "inf",
        "-inf",
        "None",
        "True",
        "auto",
        "[/b]",
        "\x1b[2J",
    ),
    *(
        "caf\udce9",
        "猫",
        "x" * 300,
        "/dev/null",
        "/dev/null/x",
        "nowhere",
        ".",
        "..",
        "~nobody/x",
        "--",
        "-",
        "=",
        "{}",
    ),
    *("digits", "pixels", "ddim", "cpu", "a=b", "٣", "0x10", "1_000"),
    # Created by `places`.
    *("file", "file/x", "fifo", "fifo/x", "socket", "link", "loop", "empty", "foreign", "cut", "bytes", "blocked", "p"),
)
DRY = {"run": ["digits"], "train": ["digits"], "study": ["table1"], "demo": []}
"""Verbs that would train, with their required arguments; only their dry runs are tested."""
ON_RUNS = ("sample", "evaluate", "report", "status", "export", "distill", "finish", "explore")


def _options() -> dict[str, list[str]]:
    (verbs,) = [action.choices for action in command_line()._actions if isinstance(action.choices, dict)]
    return {verb: sorted(o for o in verbs[verb]._option_string_actions if o.startswith("--")) for verb in VERBS}


OPTIONS = _options()


def fuzzed(draw: random.Random, *subjects: str) -> list[str]:
    """Return a command line of a verb with hostile options, on one of the subjects if any, which trains nothing."""
    verb = draw.choice([name for name in VERBS if name != "doctor"])
    words = [verb, *DRY.get(verb, [draw.choice(VALUES) for _ in range(draw.randrange(3))])]
    if subjects and verb in ON_RUNS:
        words = [verb, draw.choice(subjects)]
    for _ in range(draw.randrange(1, 4)):
        option = draw.choice(OPTIONS[verb])
        words += [option[: draw.randrange(3, len(option) + 1)] if draw.random() < 0.1 else option]
        words += [draw.choice(VALUES) for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
    return [*words, "--dry-run"] if verb in DRY or verb in ("distill", "finish") else words


def ends_well(argv: list[str], capsys: Capture) -> None:
    """Run a command; fail unless it ends in time, with a documented exit code of its verb and at most one error."""

    def late(*_: object) -> None:
        raise AssertionError(f"no end after two minutes: {argv}")

    before, begun, code = signal.signal(signal.SIGALRM, late), time.process_time(), None
    signal.alarm(120)
    capsys.readouterr()
    try:
        main(argv)
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said, errors = capsys.readouterr()
    assert (code or 0) in VERBS[argv[0]].codes, (argv, code, errors)
    assert errors.count("halfstep: error: ") == (1 if code else 0), (argv, code, errors)
    assert not CONTROL.search(said + errors), argv
    assert "Traceback" not in errors, (argv, errors)
    # CPU time, because on a busy machine, an import alone can take as much wall time.
    assert time.process_time() - begun < 30, argv


def places() -> dict[Path, bytes]:
    """Fill the working folder with anything except runs, data sets and output folders; return the files' contents."""
    Path("file").write_bytes(b"mine")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    for name in ("empty", "foreign", "cut", "bytes", "blocked", "p"):
        Path(name).mkdir()
    Path("foreign/package.json").write_bytes(b"{}")
    Path("cut/recipe.json").write_bytes(b'{"run": "00", "recipe": {"name": "toy", ')
    Path("bytes/recipe.json").write_bytes(b'{"caf\xe9": "\x1b[2J"}')
    os.mkfifo("blocked/recipe.json")
    Path("p/model_index.json").write_bytes(b"[]")
    return mine()


def mine() -> dict[Path, bytes]:
    """Return the contents of the files of `places` that no command has written."""
    files = ("file", "foreign/package.json", "cut/recipe.json", "bytes/recipe.json", "p/model_index.json")
    return {Path(name): Path(name).read_bytes() for name in files}


@pytest.fixture
def _still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def served(*_: object) -> None:
        raise SystemExit(0)

    # Do not measure the cost of a plan or serve a page.
    monkeypatch.setattr("halfstep.cli.training.show_plan", lambda *_: None)
    monkeypatch.setattr("halfstep.cli.exploring.serve", served)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_still")
def test_hostile_command_lines_end_in_one_line(capsys: Capture) -> None:
    before, draw = places(), random.Random(0)
    for _ in range(60):
        ends_well(fuzzed(draw), capsys)
    assert mine() == before


@pytest.mark.slow
@pytest.mark.usefixtures("_still")
def test_hundreds_of_hostile_command_lines_end_in_one_line(toy_run: Path, capsys: Capture) -> None:
    before, draw = places(), random.Random(int(os.environ.get("FUZZ_SEED", "0")))
    stages = [str(path) for path in (toy_run / "stages").iterdir()]
    for number in range(400):
        # Half of them have no model.
        ends_well(fuzzed(draw, *((str(toy_run), *stages) if number % 2 else ())), capsys)
    assert mine() == before
