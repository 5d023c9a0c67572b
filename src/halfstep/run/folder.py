"""Opens a run folder: compares it with the recipe, locks it and writes recipe.json."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from halfstep.core.warnings import HalfstepWarning
from halfstep.data import MemoryData, changed_since
from halfstep.measure.store import sweep_store
from halfstep.models.model import Model
from halfstep.objectives import Outcome
from halfstep.run.own_samples import read_samples, write_samples
from halfstep.run.spec import RunSpec
from halfstep.run.trackers import chosen_trackers
from halfstep.runs import RunFolder
from halfstep.runs.schema import flatten
from halfstep.runtime.environment import environment
from halfstep.runtime.files import (
    DamagedFile,
    contents,
    json_digest,
    leftovers,
    read_sealed,
    refuse_file,
    sweep,
    write_sealed,
)
from halfstep.runtime.locks import acquire, lock_of
from halfstep.runtime.storage import no_storage

_BY_STEPS: Final = ("finish.updates_at", "finish.learning_rate_at")
"""Settings of single finished students, keyed by number of steps."""


class DifferentRecipe(ValueError):
    """Raised if a folder contains a run of a different recipe; the message lists the differences."""


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    free: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the fields in which two recipes differ, as "name: new value (the folder has old value)".

    The entries of a list, such as stages, are compared one by one and named by their index.

    Args:
        defaults: values of fields that the old recipe may lack.
    """
    b = flatten(_indexed(new))
    a = {name: value for name, value in flatten(defaults or {}).items() if name in b} | flatten(_indexed(old))
    return [
        f"{name}: {b.get(name, 'nothing')} (the folder has {a.get(name, 'nothing')})"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name not in free
    ]


def _indexed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe in which mappings from indices to entries replace the lists of mappings."""

    def indexed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: indexed(entry) for name, entry in value.items()}
        if isinstance(value, Sequence) and value and all(isinstance(entry, Mapping) for entry in value):
            return {index: indexed(entry) for index, entry in enumerate(value)}
        return value

    return dict(indexed(recipe))


def identity(spec: RunSpec) -> str:
    """Return a digest of everything that determines the learned weights: the data and the recipe's fixed fields.

    A second digest, of the recipe's fixed fields alone, follows after a hyphen.
    """
    fields = flatten(spec.defaults) | flatten(spec.recipe)
    ignored = set(spec.free)
    if not fields.get("finish.steps"):
        ignored |= {name for name in fields if name.startswith("finish.")}
    decided = {name: value for name, value in fields.items() if name not in ignored}
    return f"{json_digest([decided, spec.data.fingerprint], 32)}-{json_digest(decided, 32)}"


def take_folder(spec: RunSpec, folder: RunFolder, lock: FileLock) -> tuple[str, str]:
    """Check that the folder belongs to the run, and lock it.

    Return the `run` recorded in recipe.json and the data's fingerprint.
    """
    path = folder.path
    _check_folder(spec, folder)
    chosen_trackers(spec.engine.trackers)
    _acquire(lock, path)
    sweep(path, *path.glob("stages/*"), *path.glob("stages/*/samples"))
    sweep_store(evaluation := folder.evaluation_path.parent)
    if evaluation.is_dir():
        # Files that `halfstep evaluate` is writing are not leftovers.
        with contextlib.suppress(Timeout), lock_of(evaluation).acquire(timeout=0):
            sweep(evaluation)
    described: dict[str, Any] = {
        "recipe": dict(spec.recipe),
        "data_fingerprint": spec.data.fingerprint,
        "data": _form(spec),
        "plan": _rows(spec),
    }
    if not folder.recipe_path.exists():
        own = _held_by(folder) or identity(spec)
        write_sealed(folder.recipe_path, {"run": own} | described | {"environment": environment()})
        return own, spec.data.fingerprint
    held = folder.recipe()
    if more := [row["stage"] for row in held["plan"][len(spec.stages) :]]:
        warnings.warn(
            f"{path} contains further stages ({', '.join(more)}), which this run does not change",
            HalfstepWarning,
            stacklevel=2,
        )
        finishes = {name: value for name, value in held["recipe"].items() if name == "finish"}
        described |= {"recipe": described["recipe"] | finishes, "plan": held["plan"]}
    # Keep recipe.json up to date: later commands, such as `evaluate` and `finish`, take their defaults from it.
    now, old = flatten(dict(spec.recipe)), flatten(held["recipe"])
    changed = any(now[name] != old.get(name) for name in spec.free if name in now)
    if changed or len(held["plan"]) < len(spec.stages) or held.get("data_fingerprint") != spec.data.fingerprint:
        write_sealed(folder.recipe_path, held | described)
    return held["run"], spec.data.fingerprint


def own_samples(spec: RunSpec, folder: RunFolder, key: str, draw: Callable[[], MemoryData]) -> MemoryData:
    """Return the samples of the teacher in a run folder with this key, or draw and store them if there are none.

    The folder is locked meanwhile, so that two processes cannot start the same run from different samples. Samples
    that the run in the folder was not trained on are never stored.

    Args:
        spec: the specification of the run, with any data that has the form of the samples.

    Raises:
        DifferentRecipe: if the folder contains a run of a different recipe, or the drawn samples differ from its data.
        ValueError: if the folder is neither empty nor a run folder.
        InUse: if another process is writing to the folder.
        NoStorage: if the disk is full or unavailable.
    """
    path, file = folder.path, folder.own_samples_path
    lock = lock_of(path)
    try:
        check_recipe(spec, folder)
        _acquire(lock, path)
        sweep(path)
        held = read_samples(file, key)
        if held is None:
            held = draw()
            _check_folder(replace(spec, data=held), folder)
            write_samples(file, key, held)
        return held
    except OSError as error:
        raise no_storage(error, path, None, has_begun=False) from None
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    """Create and lock a run folder."""
    path.mkdir(parents=True, exist_ok=True)
    acquire(lock, f"another halfstep process is writing to {path}: wait, or choose another --out")


def check_recipe(spec: RunSpec, folder: RunFolder) -> None:
    """Raise ValueError if a folder contains a run of a different recipe, or other files. The data is not compared."""
    refuse_file(folder.path)
    if folder.recipe_path.exists():
        held = folder.recipe()
        free = (*spec.free, *_growing(spec, held))
        changed = differences(held["recipe"], spec.recipe, free, spec.defaults)
        if changed:
            raise DifferentRecipe(
                f"{folder.path} contains a run of a different recipe; choose another --out. Differences: "
                + "; ".join(changed[:8])
                + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
            )
    elif _has_files(folder) and _held_by(folder) is None:
        raise _not_a_run(folder)


def _check_folder(spec: RunSpec, folder: RunFolder) -> None:
    check_recipe(spec, folder)
    if folder.recipe_path.exists():
        held = folder.recipe()
        if held.get("data_fingerprint") not in (None, spec.data.fingerprint):
            _accept(spec, folder, held)
    elif _has_files(folder):
        _check_held(spec, folder)


def _check_held(spec: RunSpec, folder: RunFolder) -> None:
    """Raise ValueError unless the stages and checkpoints of a folder without recipe.json belong to the run."""
    before_finishing = replace(spec, recipe={n: v for n, v in spec.recipe.items() if n != "finish"})
    # Runs of earlier versions lack the digest of the recipe alone.
    all_held, _, recipe_held = (_held_by(folder) or "").partition("-")
    own = [identity(one).split("-") for one in (spec, before_finishing)]
    if all_held in [digest for digest, _ in own]:
        return
    if recipe_held not in [digest for _, digest in own]:
        raise _not_a_run(folder)
    what = f"the stages in {folder.path} were trained on other data than {spec.data.source}"
    if not _accepts_changed(spec):
        other = "" if _accepts_changed(spec) is None else ", or add --data.accept-changed to resume with this data"
        raise DifferentRecipe(f"{what}; restore the old data, choose another --out{other}")
    warnings.warn(f"{folder.path} resumes with changed data: {what}", HalfstepWarning, stacklevel=2)


def _accepts_changed(spec: RunSpec) -> bool | None:
    """Return whether the recipe accepts changed data, or None if the caller, such as halfstep.fit, has no such
    setting."""
    accepts: bool | None = dict(spec.recipe.get("data") or {}).get("accept_changed")
    return accepts


def _has_files(folder: RunFolder) -> bool:
    """Return whether a folder contains files other than those of a run that was killed before it wrote recipe.json."""
    early = folder.own_samples_path
    ours = {folder.path / ".lock", early, *leftovers(folder.path, "recipe.json"), *leftovers(folder.path, early.name)}
    return folder.path.is_dir() and bool(set(contents(folder.path)) - ours)


def _not_a_run(folder: RunFolder) -> ValueError:
    return ValueError(
        f"{folder.path} is not empty, but it is not a run folder (it has no recipe.json): choose another --out"
    )


def _held_by(folder: RunFolder) -> str | None:
    """Return the `run` shared by all stages and checkpoints in a folder without recipe.json; None if they differ."""
    found = set()
    for file in (*folder.path.glob("stages/*/manifest.json"), *folder.path.glob("stages/*/checkpoint-*/manifest.json")):
        with contextlib.suppress(DamagedFile):
            found.add(read_sealed(file).get("run"))
    return found.pop() if len(found) == 1 else None


def _accept(spec: RunSpec, folder: RunFolder, held: Mapping[str, Any]) -> None:
    """Warn that the run's data has changed.

    Raises:
        DifferentRecipe: unless the recipe accepts changed data, and the shape and the classes are unchanged.
    """
    before, now = held.get("data"), _form(spec)
    changed = changed_since(spec.data.source, folder.recipe_path.stat().st_mtime)
    files = "file" if len(changed) == 1 else "files"
    said = [f"{len(changed):,} changed {files}: {', '.join(map(str, changed[:3]))}"] if changed else []
    accepts = _accepts_changed(spec)
    fits = isinstance(before, dict) and all(before.get(name) == now[name] for name in ("shape", "class_names"))
    fits = fits and accepts is not None
    if isinstance(before, dict):
        other = [name for name in now if before.get(name) != now[name]]
        said += [f"{name.replace('_', ' ')} changed from {before.get(name)} to {now[name]}" for name in other]
    what = f"{spec.data.source} has changed since" + (f" ({'; '.join(said)})" if said else "")
    if fits and accepts:
        warnings.warn(f"{folder.path} resumes with changed data: {what}", HalfstepWarning, stacklevel=2)
        return
    remedy = "restore the old data, choose another --out" + (
        ", or add --data.accept-changed to resume with the changed data" if fits else ""
    )
    raise DifferentRecipe(f"{folder.path} contains a run with different data: {what}; {remedy}")


def _form(spec: RunSpec) -> dict[str, Any]:
    """Return the description of the data for recipe.json."""
    return {
        "num_samples": len(spec.data),
        "shape": list(spec.data.shape),
        "class_names": list(spec.data.class_names),
    }


def _growing(spec: RunSpec, held: Mapping[str, Any]) -> list[str]:
    """Return the fields that may differ because the recipe or the folder has additional finishing stages at the end.

    If the recipe or the folder has no finishing stage, all finishing fields may differ. Otherwise, only the list of
    steps may differ, and the settings of single students that one of the two does not finish.
    """
    new = flatten(spec.recipe)
    old = flatten(spec.defaults) | flatten(held["recipe"])
    lists = old.get("finish.steps") or [], new.get("finish.steps") or []
    pairs = lists, (held.get("plan") or [], _rows(spec))
    # In each pair, one list must be a prefix of the other.
    if any(one != other for pair in pairs for one, other in zip(*pair, strict=False)):
        return []
    finishing = sorted(name for name in old | new if name.startswith("finish."))
    if not all(lists):
        return finishing
    both = {str(steps) for steps in min(lists, key=len)}
    settings = {name: name.rpartition(".") for name in finishing}
    # Without entries, the setting itself has a value: null or an empty mapping.
    own = [name for name, (setting, _, steps) in settings.items() if setting in _BY_STEPS and steps not in both]
    return ["finish.steps", *_BY_STEPS, *own]


def _rows(spec: RunSpec) -> list[dict[str, Any]]:
    """Return the rows of the plan for recipe.json."""
    rows = []
    for name, stage in spec.stages:
        known: Outcome | Model | None = spec.teacher if stage is None else stage.objective.outcome
        assert known is not None
        row: dict[str, Any] = {
            "stage": name,
            "role": known.role,
            "num_steps": known.num_steps,
            "num_updates": 0,
            "update_cost": 0,
        }
        if stage is not None:
            row |= {"num_updates": stage.training.num_updates, "update_cost": stage.update_cost}
        rows.append(row)
    return rows
