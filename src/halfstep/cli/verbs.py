"""The verbs as data, for the overview, the end of each --help, the shell completion and the documentation.

Nothing heavy is imported here.
"""

import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    usage: str
    """Its name and what follows it."""
    summary: str
    """One line, in the overview."""
    examples: tuple[str, ...]
    """Whole command lines; the tests hold their options to the parser."""
    notes: tuple[str, ...] = ()
    """What its options alone do not tell, a line each."""
    codes: tuple[int, ...] = (0, 2)
    """Its exit codes."""
    module: str = "commands"
    """Its module in `halfstep.cli`."""
    is_light: bool = False
    """Whether it works without torch and diffusers, which take seconds to import."""

    @property
    def name(self) -> str:
        """The first word of its usage."""
        return self.usage.partition(" ")[0]

    @property
    def function(self) -> str:
        """Its function in `module`: its name, with an underscore if that is a word of Python."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


TRAINS: Final = (0, 1, 2, 3, 75, 129, 130, 138, 143)

RECIPE_NOTES: Final = (
    "RECIPE is a name (`halfstep ls recipes`), a .json file, or the folder of a run. Defaults shown are RECIPE's own.",
    "--data S is short for --data.source S, --start N for --chain.start-steps N, --to N for --chain.end-steps N.",
    "Stopped or killed: run the same command again and it goes on from its last checkpoint.",
)

_TRAIN: Final = (
    Verb(
        "run RECIPE",
        "train a teacher, halve it to few steps, measure, report; resumable",
        (
            "halfstep run digits",
            "halfstep run cifar10 --dry-run",
            "halfstep run images --data ~/photos --data.image-size 32 --to 4 --out runs/photos",
        ),
        RECIPE_NOTES,
        TRAINS,
    ),
    Verb(
        "train RECIPE",
        "the teacher of a recipe only",
        ("halfstep train digits --teacher.num-updates 500", "halfstep train cifar10 --dry-run"),
        RECIPE_NOTES,
        TRAINS,
    ),
    Verb(
        "distill MODEL",
        "halve a trained model to fewer steps",
        (
            "halfstep distill runs/digits/stages/00-denoise --start 64 --to 4",
            "halfstep distill my-ddpm --data ~/photos --to 4 --out runs/mine",
            "halfstep distill my-sd --data latents --to 4 --matching.guidance-range 1 8",
        ),
        (
            "MODEL is a run (its last stage is meant), a stage, a folder that diffusers saved, or a name on the Hub.",
            "Defaults shown are those of the recipe of MODEL's run.",
            *RECIPE_NOTES[1:],
        ),
        TRAINS,
    ),
    Verb(
        "finish RUN",
        "move a run's students onto the teacher's distribution",
        ("halfstep finish runs/digits --steps 4 2 1", "halfstep finish runs/digits --steps 1 --dry-run"),
        (
            "The stages are added to RUN. Each starts from RUN's student of as many steps; its map is kept.",
            "--steps S is short for --finish.steps S.",
            RECIPE_NOTES[2],
        ),
        TRAINS,
    ),
    Verb(
        "study NAME",
        "one of the paper's tables and figures, or methods compared at equal cost; resumable",
        ("halfstep study table1 --scale smoke", "halfstep study roads --dry-run"),
        codes=TRAINS,
        module="studying",
    ),
    Verb("demo", "the same as `run digits`", ("halfstep demo",), RECIPE_NOTES[1:], TRAINS),
)

_USE: Final = (
    Verb(
        "sample MODEL",
        "draw samples into a grid, a file of arrays or a folder",
        (
            "halfstep sample runs/digits --num-samples 64 --seed 0 --out grid.png",
            "halfstep sample runs/digits/stages/00-denoise --num-steps 16 --sampler heun --out samples.npz",
        ),
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
    Verb("report RUN", "write RUN/report/index.html", ("halfstep report runs/digits",)),
    Verb(
        "explore RUN",
        "a local page: teacher and students side by side from the same noise",
        ("halfstep explore runs/digits", "halfstep explore runs/digits --port 8000 --max-samples 16"),
        ("Ctrl-C ends it; that is no error.",),
        module="exploring",
    ),
    Verb(
        "export MODEL",
        "to a stock diffusers pipeline, LoRA files or one ONNX graph",
        ("halfstep export runs/digits --out digits-1", "halfstep export runs/digits --format onnx --out digits-1.onnx"),
        module="exporting",
    ),
    Verb(
        "import FORMAT SOURCE",
        "a model from elsewhere as a stage",
        (
            "halfstep import diffusers google/ddpm-cifar10-32",
            "halfstep import google-pd cifar_8.msgpack --config cifar10 --out cifar-8",
        ),
        module="importing",
    ),
    Verb(
        "encode PIPELINE",
        "images and texts to latents, once, for a latent pipeline; resumable",
        ("halfstep encode my-sd --data ~/captioned --out latents",),
        codes=(0, 2, 3, 75, 129, 130, 143),
        module="exporting",
    ),
)

_LOOK: Final = (
    Verb(
        "status RUN",
        "how far a run is that any shell or machine writes",
        ("halfstep status runs/digits", "halfstep status runs/digits --watch", "halfstep status runs/digits --json"),
        module="status",
        is_light=True,
    ),
    Verb(
        "ls [FAMILY ...]",
        "recipes, samplers, predictions, studies, ...",
        ("halfstep ls", "halfstep ls samplers --json"),
    ),
    Verb(
        "doctor",
        "what this machine and its packages can do, and what is missing",
        ("halfstep doctor", "halfstep doctor --json"),
        module="doctor",
        is_light=True,
    ),
    Verb(
        "completion SHELL",
        "a script that lets bash, zsh, fish or tcsh complete verbs and options",
        ("halfstep completion bash > ~/.local/share/bash-completion/completions/halfstep",),
        (
            "bash: as in the example.",
            "zsh: halfstep completion zsh > ~/.zfunc/_halfstep; ~/.zshrc: fpath=(~/.zfunc $fpath) before compinit.",
            "fish: halfstep completion fish > ~/.config/fish/completions/halfstep.fish",
            "tcsh: halfstep completion tcsh > ~/.halfstep.tcsh; ~/.tcshrc: source ~/.halfstep.tcsh",
            "RECIPE completes names, not files; after any recipe the options of all recipes are offered.",
            "tcsh offers the options of all verbs together.",
        ),
        module="completion",
        is_light=True,
    ),
)

_GROUPS: Final = {"Train": _TRAIN, "Use": _USE, "Look": _LOOK}

VERBS: Final[Mapping[str, Verb]] = {verb.name: verb for verbs in _GROUPS.values() for verb in verbs}

EXIT_CODES: Final[Mapping[int, str]] = {
    0: "done",
    1: "training diverged (a loss or gradient was not finite) or does not fit into memory, or another process of "
    "the run was lost; the last checkpoint is kept",
    2: "bad input: one line says what was got, what was needed and what to do; or stdout cannot be written",
    3: "the disk or mount of a run is full or gone; the last good state is named",
    75: "another halfstep process is writing the folder: wait for it, and run the same command again",
    129: "stopped by SIGHUP (the terminal was closed); a run has saved its state, and the same command resumes it",
    130: "stopped by Ctrl-C; likewise",
    138: "stopped by SIGUSR1; likewise (--engine.requeue-code replaces the code)",
    143: "stopped by SIGTERM; likewise",
}


def overview() -> str:
    """What `halfstep` alone prints."""
    width = max(len(verb.usage) for verb in VERBS.values())
    lines = ["usage: halfstep VERB ...", ""]
    for group, verbs in _GROUPS.items():
        lines += [f"{group}:", *(f"  {verb.usage:<{width}}  {verb.summary}" for verb in verbs), ""]
    lines += [
        "MODEL is the folder of a run (its last stage is meant) or of a stage.",
        "`halfstep VERB --help` shows all options and examples, `halfstep --version` the version.",
        "With --json, where a verb has it, stdout is one JSON document, and all else goes to stderr.",
        "",
        "Exit codes:",
    ]
    lines += [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def epilogue(name: str) -> str:
    """What follows the options in `halfstep NAME --help`."""
    verb = VERBS[name]
    notes = [*verb.notes, ""] if verb.notes else []
    codes = f"exit codes: {', '.join(map(str, verb.codes))} (`halfstep --help` tells what they mean)"
    return "\n".join([*notes, "examples:", *(f"  {example}" for example in verb.examples), "", codes])
