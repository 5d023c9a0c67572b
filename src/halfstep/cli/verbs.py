"""The verbs, as data for the help, shell completion and documentation.

This module does not import any slow packages.
"""

import keyword
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    usage: str
    """The name of the verb, followed by its arguments."""
    summary: str
    """The line that describes the verb in the overview."""
    examples: tuple[str, ...]
    """Complete command lines. Tests check that the parser accepts their options."""
    notes: tuple[str, ...] = ()
    """Notes that concern several options, each printed on a separate line."""
    codes: tuple[int, ...] = (0, 2)
    """The exit codes of the verb."""
    shown: tuple[str, ...] = ()
    """The options that the short form of the help shows; if empty, it shows all options."""
    module: str = "training"
    """The module in `halfstep.cli` that contains the verb's function and arguments, such as `RunArguments` for run."""
    is_light: bool = False
    """Whether the verb works without torch and diffusers, which take seconds to import."""

    @property
    def name(self) -> str:
        """The name of the verb, which is the first word of `usage`."""
        return self.usage.partition(" ")[0]

    @property
    def function(self) -> str:
        """The name of the verb's function in `module`: `name`, followed by an underscore if it is a Python keyword."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


TRAINS: Final = (0, 1, 2, 3, 75, 129, 130, 138, 143)

RECIPE_NOTES: Final = (
    "RECIPE is a name (see `halfstep ls recipes`), a .json file or the folder of a run. The help shows its defaults.",
    "--data S is short for --data.source S, --start N for --chain.start-steps N, and --to N for --chain.end-steps N.",
    "To resume a stopped or killed run, run the same command again.",
)
_OFTEN: Final = (
    *("--data", "--data.image-size", "--data.skip-broken", "--start", "--to", "--teacher.num-updates"),
    *("--chain.num-updates", "--evaluation.num-samples", "--engine.precision"),
)
_ALWAYS: Final = ("--out", "--dry-run", "--json")

_TRAIN: Final = (
    Verb(
        "run RECIPE",
        "train a teacher, distil it to a few steps, measure the models and write a report (resumable)",
        (
            "halfstep run digits",
            "halfstep run cifar10 --dry-run",
            "halfstep run images --data ~/photos --data.image-size 32 --to 2 --out runs/photos",
        ),
        RECIPE_NOTES,
        TRAINS,
        (*_OFTEN, *_ALWAYS),
    ),
    Verb(
        "train RECIPE",
        "train only the teacher of a recipe",
        ("halfstep train digits --teacher.num-updates 500", "halfstep train cifar10 --dry-run"),
        RECIPE_NOTES,
        TRAINS,
        (*(name for name in _OFTEN if name not in ("--start", "--to", "--chain.num-updates")), *_ALWAYS),
    ),
    Verb(
        "distill MODEL",
        "distil a trained model to fewer steps",
        (
            "halfstep distill runs/digits/stages/00-denoise --start 64 --to 4",
            "halfstep distill my-ddpm --data ~/photos --to 4 --out runs/mine",
            "halfstep distill my-sd --prompts prompts.txt --to 4 --out runs/prompted",
        ),
        RECIPE_NOTES[1:],
        TRAINS,
        (
            *("--data", "--prompts", "--call", "--start", "--to", "--matching.num-updates", "--chain.num-updates"),
            *("--matching.guidance-scale", "--chain.lora-rank", "--out", "--dry-run", "--json"),
        ),
    ),
    Verb(
        "finish RUN",
        "train a run's students further to improve their samples",
        ("halfstep finish runs/photos --steps 2 --dry-run", "halfstep finish runs/photos --steps 2"),
        (
            "The new stages are added to RUN. Each stage starts from RUN's student with the same number of steps and "
            "preserves that student's map.",
            "--steps S is short for --finish.steps S.",
            RECIPE_NOTES[2],
        ),
        TRAINS,
        ("--steps", "--finish.num-updates", "--finish.learning-rate", "--finish.map-weight", "--dry-run", "--json"),
    ),
    Verb(
        "study NAME",
        "reproduce a table or figure from the paper, or compare methods at equal cost (resumable)",
        ("halfstep study table1 --scale smoke", "halfstep study roads --dry-run"),
        codes=TRAINS,
        module="studying",
    ),
    Verb("demo", "the same as `run digits`", ("halfstep demo",), RECIPE_NOTES[1:], TRAINS, (*_OFTEN, *_ALWAYS)),
)

_USE: Final = (
    Verb(
        "sample MODEL",
        "draw samples from a model and write them to an image grid, an array file or a folder",
        (
            "halfstep sample runs/digits --num-samples 64 --seed 0 --out grid.png",
            "halfstep sample runs/digits/stages/00-denoise --num-steps 16 --sampler heun --out samples.npz",
        ),
        module="sampling",
    ),
    Verb(
        "evaluate SUBJECT",
        "measure a run, a stage, a pipeline or a folder of images",
        (
            "halfstep evaluate runs/digits --num-samples 5000",
            "halfstep evaluate runs/digits --num-steps 1 2 4 8 --against teacher-ddim teacher-ancestral --seeds 3",
            "halfstep evaluate samples/ --data ~/photos",
        ),
        codes=TRAINS,
        module="evaluating",
    ),
    Verb("report RUN", "write RUN/report/index.html", ("halfstep report runs/digits",), module="reporting"),
    Verb(
        "explore RUN",
        "open a local page that compares teacher and student samples drawn from the same noise",
        ("halfstep explore runs/digits", "halfstep explore runs/digits --port 8000 --max-samples 16"),
        (
            "To stop serving the page, press Ctrl-C. The exit code is then 0.",
            "To open the page from another machine: ssh -L 7860:127.0.0.1:7860 MACHINE.",
            "To serve the page behind a proxy: --root-path PATH --allow-host HOST.",
        ),
        module="exploring",
    ),
    Verb(
        "export MODEL",
        "export a model as a stock diffusers pipeline, LoRA files, one ONNX graph or a web page",
        (
            "halfstep export runs/digits --out digits-1",
            "halfstep export runs/digits --format onnx --out digits-1.onnx",
            "halfstep export runs/digits --format web --single-file --out digits.html",
        ),
        module="exporting",
    ),
    Verb(
        "import FORMAT SOURCE",
        "import a model as a stage",
        (
            "halfstep import diffusers google/ddpm-cifar10-32",
            "halfstep import google-pd cifar_8.msgpack --config cifar10 --out cifar-8",
        ),
        module="importing",
    ),
    Verb(
        "encode PIPELINE",
        "encode images, videos, sounds and text for a pipeline (resumable)",
        (
            "halfstep encode my-sd --data ~/captioned --out latents",
            "halfstep encode my-wan --data ~/clips --frame-rate 16 --out latents",
            "halfstep encode my-sd --prompts prompts.txt --out prompted",
        ),
        codes=(0, 2, 3, 75, 129, 130, 143),
        module="exporting",
    ),
)

_LOOK: Final = (
    Verb(
        "status RUN",
        "show the progress of a run, from any shell or machine",
        ("halfstep status runs/digits", "halfstep status runs/digits --watch", "halfstep status runs/digits --json"),
        module="status",
        is_light=True,
    ),
    Verb(
        "ls [FAMILY ...]",
        "list recipes, samplers, predictions, studies and other names",
        ("halfstep ls", "halfstep ls samplers --json"),
        module="listing",
    ),
    Verb(
        "doctor",
        "check this machine and its packages",
        ("halfstep doctor", "halfstep doctor --json"),
        module="doctor",
        is_light=True,
    ),
    Verb(
        "completion SHELL",
        "print a completion script for bash, zsh, fish or tcsh",
        ("halfstep completion bash > ~/.local/share/bash-completion/completions/halfstep",),
        (
            "bash: see the example.",
            "zsh: halfstep completion zsh > ~/.zfunc/_halfstep; ~/.zshrc: fpath=(~/.zfunc $fpath) before compinit.",
            "fish: halfstep completion fish > ~/.config/fish/completions/halfstep.fish",
            "tcsh: halfstep completion tcsh > ~/.halfstep.tcsh; ~/.tcshrc: source ~/.halfstep.tcsh",
            "RECIPE completes to recipe names, not files. After any recipe, the options of all recipes are offered.",
            "In tcsh, the options of all verbs are offered after any verb.",
        ),
        module="completion",
        is_light=True,
    ),
)

_GROUPS: Final = {"Train": _TRAIN, "Use": _USE, "Look": _LOOK}

VERBS: Final[Mapping[str, Verb]] = {verb.name: verb for verbs in _GROUPS.values() for verb in verbs}

EXIT_CODES: Final[Mapping[int, str]] = {
    0: "done",
    1: "training diverged (a loss or gradient was not finite), ran out of memory, or lost another process of the "
    "run; the last checkpoint is kept",
    2: "bad input (a one-line error suggests a fix), or stdout is not writable",
    3: "the disk or mount of a run is full or unavailable; the error shows the last good state",
    75: "another halfstep process is writing to the folder; wait, then run the same command again",
    129: "stopped by SIGHUP (the terminal was closed); a run saves its state, and the same command resumes it",
    130: "stopped by Ctrl-C; a run can be resumed as after SIGHUP",
    138: "stopped by SIGUSR1; a run can be resumed as after SIGHUP (--engine.requeue-code replaces this exit code)",
    143: "stopped by SIGTERM; a run can be resumed as after SIGHUP",
}


SITUATIONS: Final = (
    ("Try halfstep in a few minutes", "halfstep demo"),
    ("Distil your own photos", "halfstep run images --data ~/photos --data.image-size 32 --to 4"),
    ("Distil a diffusers pipeline", "halfstep distill my-ddpm --data ~/photos --to 4"),
    ("Distil arrays, such as robot actions", "halfstep run arrays --data x.npy --to 1"),
    ("Use a trained run", "halfstep sample runs/digits --out grid.png"),
)
"""Common situations, each with a command to run."""


def overview() -> str:
    """Return the text that `halfstep` prints when called without arguments."""
    wide = max(len(what) for what, _ in SITUATIONS)
    lines = ["usage: halfstep VERB ...", "", *(f"  {what:<{wide}}  {command}" for what, command in SITUATIONS), ""]
    width = max(len(verb.usage) for verb in VERBS.values())
    for group, verbs in _GROUPS.items():
        lines += [f"{group}:", *(f"  {verb.usage:<{width}}  {verb.summary}" for verb in verbs), ""]
    lines += [
        "MODEL is the folder of a stage or run. For a run, the last stage is used.",
        "`halfstep VERB --help` shows common options and examples, and `halfstep VERB --help-all` shows every option.",
        "With --json, stdout contains one JSON document, and all other output goes to stderr.",
        "",
        "Exit codes:",
    ]
    for code, meaning in EXIT_CODES.items():
        lines += textwrap.wrap(meaning, 100, initial_indent=f"  {code:>3}  ", subsequent_indent=" " * 7)
    return "\n".join(lines)


def epilogue(name: str, width: int, short: bool) -> list[str]:
    """Return the lines that follow the options in `halfstep NAME --help`. The short form already uses short option
    names, so it does not explain them.
    """
    verb = VERBS[name]
    shown = [note for note in verb.notes if not (short and " is short for " in note)]
    notes = [
        line for note in shown for line in textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
    ]
    codes = f"exit codes: {', '.join(map(str, verb.codes))} (see `halfstep --help`)"
    examples = ["examples:", *(f"  {example}" for example in verb.examples), ""]
    return [*notes, *([""] if notes else []), *examples, *textwrap.wrap(codes, width)]
