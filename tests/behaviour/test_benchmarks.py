"""The benchmarks run in their short form and write complete tables.

Everything runs in this process, except for one start of two processes. The functions that the full forms start in a new
process for each setting are called directly.
"""

import contextlib
import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from halfstep.cli import main
from halfstep.metrics import extractors
from halfstep.objectives import Training
from halfstep.recipes.schema import SECOND_ORDER, FinishConfig
from halfstep.runtime.stop import Interrupted
from studies.test_studies import tiny
from toys import TINY_DEMO

FOLDER: Final = Path(__file__).parents[2] / "benchmarks"
SHARED: Final = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark by name, as a script in its folder would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, names = torch.get_num_threads(), {path.stem for path in FOLDER.glob("*.py")}
    # Python's own io is already imported; one of the benchmarks has the same name.
    before = {name: sys.modules.get(name) for name in names}
    torch.set_num_threads(1)

    def load(name: str) -> ModuleType:
        if name in before and name != "io":
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)
    # `independent.py` registers its own features.
    extractors.pop("perceptron", None)
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def called(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Return what its command line prints."""
    printed = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(module.__file__), "--device", "cpu", *words])
        module.main()
    return printed.getvalue()


def written(module: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, *words: str) -> dict[str, Any]:
    """Return the JSON of its short form, which contains the machine, the commit and the command."""
    called(module, monkeypatch, "--short", "--networks", "tiny", "--out", str(file), *words)
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["benchmark"] == str(module.__name__).removeprefix("bench_")
    assert {"versions", "git_commit", "device", "cpu_count", "threads", "command"} <= result["environment"].keys()
    return result


def positive(rows: list[dict[str, Any]], *keys: str) -> bool:
    return all(row[key] > 0 for row in rows for key in keys)


UPDATES: Final = ("halve", "finish", "consistency", "moments")


def test_step_and_sample(modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = written(modules("step"), monkeypatch, tmp_path / "step.json", "--rounds", "2")["rows"]
    found = [(row["update"], row["precision"], row["compiled"]) for row in rows]
    assert found == [(update, kind, False) for update in UPDATES for kind in ("float32", "bf16")]
    assert positive(rows, "seconds", "bare", "ours / bare")
    assert positive(rows[:2], "naive", "naive / ours")
    words = ("--rounds", "1", "--batch", "4")
    rows = written(modules("sample"), monkeypatch, tmp_path / "sample.json", *words)["rows"]
    assert [row["steps"] for row in rows] == [1, 4, 16]
    keys = (
        "images / s",
        "bare images / s",
        "diffusers images / s",
        "ours / bare",
        "diffusers / ours",
        "ours / ours in bf16",
        "time / time at 4",
    )
    assert all(row[key] > 0 for row in rows for key in keys)
    assert rows[1]["time / time at 4"] == 1


@pytest.mark.slow
def test_memory(modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = modules("memory")

    def here(*words: str) -> Any:
        return json.loads(called(memory, monkeypatch, *words).splitlines()[-1])

    monkeypatch.setattr(memory, "in_a_process", here)
    result = written(memory, monkeypatch, tmp_path / "memory.json")
    plain, again = result["rows"]
    assert (plain["setting"], again["setting"]) == ("-", "gradient checkpointing")
    # The count is exact whatever this process already contains: recomputed activations are not kept.
    assert again["counted activations"] < plain["counted activations"]
    for row in result["rows"]:
        parts = ("weights", "gradients", "moments", "average", "teacher", "helpers", "activations")
        assert row["counted peak"] == pytest.approx(sum(row[f"counted {part}"] for part in parts), abs=0.05)
        parts = ("weights", "moments", "pass")
        assert row["measured peak"] == pytest.approx(sum(row[f"measured {part}"] for part in parts), abs=0.05)
    assert result["growth"]["growth, bytes of live tensors"] == 0


@pytest.mark.slow
def test_io(modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("--rounds", "2", "--folder", str(tmp_path))
    result = written(modules("io"), monkeypatch, tmp_path / "io.json", *words)
    assert positive(result["reading"], "kB each", "images / s")
    (row,) = result["rows"]
    assert positive([row], "MB", "write, s", "read, s", "checkpoint, s", "resume, s")
    assert positive([row], "checkpoint / write", "resume / read")
    assert row["costs / 60 s"] == pytest.approx(row["costs, s"] / 60, abs=1e-5)
    assert not list(tmp_path.glob("halfstep-io-*"))


@pytest.mark.slow
def test_scale(modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scale, started = modules("scale"), modules("scale").started

    def alone_here(name: str, batch: int, processes: int, threads: int, *rest: Any) -> Any:
        if processes > 1:
            return started(name, batch, processes, threads, *rest)
        scale.worker(name, batch, *rest, tmp_path / "seconds.json")
        return json.loads((tmp_path / "seconds.json").read_text())["seconds"]

    monkeypatch.setattr(scale, "started", alone_here)
    rows = written(scale, monkeypatch, tmp_path / "scale.json", "--rounds", "2")["rows"]
    found = [(row["processes"], row["threads of each"], row["micro batches of each"]) for row in rows]
    assert found == [(1, 1, 1), (2, 1, 1), (1, 1, 2)]
    assert positive(rows, "seconds", "bare", "ours / bare", "against 1")
    assert rows[0]["against 1"] == 1


@pytest.mark.slow
def test_the_speedrun_resumes_where_it_was_interrupted(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = SHARED / "weights" / "resnet20-cifar10.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights} is not there")
    speedrun = modules("cifar10_speedrun")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(24):
            folder = tmp_path / "data" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    small = speedrun.TINY._replace(
        batches=(4, 8), enough=1, students=(4, 1), start=8, count=8, num_reference=24, rounds=1, at_once=8
    )
    monkeypatch.setattr(speedrun, "TINY", small)
    run, out = tmp_path / "run", tmp_path / "speedrun.json"
    argv = ["speedrun", str(run), "--tiny", "--data", str(tmp_path / "data"), "--features", str(weights)]
    # Both are counted from the start of the process, which also runs other tests.
    age = time.time() - psutil.Process().create_time()
    argv += ["--out", str(out), "--budget", str(age + 60), "--seconds", str(age + 600)]
    monkeypatch.setattr(sys, "argv", argv)
    # Few updates on any machine.
    monkeypatch.setattr(speedrun.Plan, "updates", lambda *_: {"teacher": 6, "chain": 3})
    ask, asked = speedrun.Store.result, []

    def cut_once(store: Any, cell: Any, reference: Any) -> Any:
        asked.append(cell.num_steps)
        if len(asked) == 2:
            raise Interrupted(15)
        return ask(store, cell, reference)

    monkeypatch.setattr(speedrun.Store, "result", cut_once)
    with pytest.raises(SystemExit) as ended:
        speedrun.main()
    assert ended.value.code == 143
    assert not out.exists()
    tried = json.loads((tmp_path / "run.plan.json").read_text())["tried"]
    spent = json.loads((tmp_path / "run.seconds.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        speedrun.main()
    result = json.loads(out.read_text())
    assert printed.getvalue().count("already existed") == 3
    # Each precision, network and batch appears once; nothing was tried or measured again.
    assert result["plan"]["tried"] == tried
    places = [tuple(row[name] for name in ("network", "precision", "batch", "compiled")) for row in tried]
    assert len(places) == len(set(places)) == 4
    precision = result["recipe"]["engine"]["precision"]
    again = [] if precision == "float32" else [4]
    assert asked == [1, 4, 4, 1, 2, 4, 8, *again]
    found = [(row["model"], row["steps"]) for row in result["rows"] if row["precision"] == precision]
    assert found == [("student", 1), ("student", 4), ("teacher", 1), ("teacher", 2), ("teacher", 4), ("teacher", 8)]
    assert [row["steps"] for row in result["rows"] if row["precision"] != precision] == again
    assert positive(result["rows"], "FD(resnet20)", "images / s")
    assert result["floor"] > 0
    assert set(result["training seconds"]) == {"00-denoise", "01-halve-0004", "02-halve-0001"}
    assert result["seconds in all"] > spent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a student of each number of steps, which no benchmark changes."""
    run = tmp_path_factory.mktemp("demo") / "run"
    main(["run", "digits", *TINY_DEMO, "--out", str(run)])
    return run


@pytest.fixture
def _brief_perceptron(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the independent features with few updates."""
    monkeypatch.setattr(modules("independent"), "NUM_UPDATES", 50)


@pytest.mark.slow
@pytest.mark.usefixtures("_brief_perceptron")
def test_an_ablation_measures_like_the_independent_features_and_resumes(
    modules: Any, monkeypatch: pytest.MonkeyPatch, demo: Path, tmp_path: Path
) -> None:
    def rows(name: str, *words: str) -> Any:
        file = tmp_path / f"{name}.json"
        command = [name, str(demo), "--heun-only", "--threads", "1", "--out", str(file), *words]
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sys, "argv", command)
            modules(name).main()
        return json.loads(file.read_text())["rows"]

    halved = next(row for row in rows("independent") if row["steps"] == 4)
    words = ("--steps", "4", "--only", "map weight 1", "map weight 4")
    before, plain, heavy = rows("finish_ablation", *words)
    for figure in ("own ratio", "other ratio", "other recall", "rmse"):
        assert before[figure] == halved[figure]
    assert before["rmse"] != plain["rmse"] != heavy["rmse"]

    def refused(*arguments: Any) -> Any:
        raise AssertionError("trained twice")

    monkeypatch.setattr(modules("finish_ablation"), "trained", refused)
    assert rows("finish_ablation", *words) == [before, plain, heavy]


@pytest.mark.slow
@pytest.mark.usefixtures("_brief_perceptron")
def test_both_orders_of_a_finish_are_compared_from_the_same_student(modules: Any, demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["finish_order", str(demo), "--threads", "1", "--out", str(file)])
        modules("finish_order").main()
    rows = json.loads(file.read_text())["rows"]
    end, chain = ([row["model"] for row in rows if row["order"] == order] for order in ("at the end", "in the chain"))
    assert (end, chain) == (["halve 1", "finish 1"], ["finish 2", "halve 1", "finish 1"])
    halved, after_a_finish = (row | {"order": ""} for row in rows if row["model"] == "halve 1")
    assert halved != after_a_finish


def test_time_to_quality_trains_three_ways_and_takes_the_smallest_budget_that_is_enough(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quality = modules("quality")
    scale = tiny()
    new = scale.recipe.model_copy(update={"chain": SECOND_ORDER.model_copy(update={"training": Training(2, 1e-3, 8)})})
    new = new.model_copy(
        update={
            "finish": FinishConfig(steps=(1,), training=Training(12, 1e-4, 4, adam_betas=(0.0, 0.99)), lead_updates=4)
        }
    )
    file = tmp_path / "quality.json"
    options = SimpleNamespace(runs=tmp_path / "runs", shares=(0.5, 1.0), steps=(4, 1), only=None, out=file, short=True)
    with contextlib.redirect_stdout(io.StringIO()):
        quality.measure(scale, new, options)
    result = json.loads(file.read_text())
    assert [(row["way"], row["share"]) for row in result["rows"]] == [
        (way, share)
        for share in (0.5, 1.0)
        for way in ("the paper's chain", "the new plan", "the paper's chain, naive")
    ]
    assert positive(result["rows"], "ratio at 4", "ratio at 1")

    # Nothing is trained twice.
    def refused(*_: Any) -> Any:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(quality, "naive_chain", refused)
        quality.measure(scale, new, options)
    assert json.loads(file.read_text())["rows"] == result["rows"]

    rows = [
        {"way": "a", "share": share, "seconds to 4": 10 * share, "ratio at 4": four, "seconds to 1": 20 * share,
         "ratio at 1": one}
        for share, four, one in ((2.0, 1.0, 1.2), (0.5, 1.2, 1.5), (1.0, 1.09, 1.3))
    ]  # fmt: skip
    assert quality.marks(rows, (4, 1)) == [
        {"way": "a", "seconds to quality at 4": 10.0, "seconds to quality at 1": None}
    ]
