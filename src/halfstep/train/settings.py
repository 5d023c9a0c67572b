"""Settings for how a run uses the machine."""

from dataclasses import dataclass, fields
from typing import ClassVar, Final, Literal, final, get_args

from halfstep.core.door import FORBID_EXTRA, check_number, check_switch, check_whole
from halfstep.objectives.base import MOST_AT_ONCE

Precision = Literal["float32", "bf16"]
Sharding = Literal["none", "full"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
Tracker = Literal["tensorboard", "wandb", "trackio"]

MOST_MINUTES: Final = 60 * 24 * 365


@final
@dataclass(frozen=True)
class Engine:
    """Settings for how a run uses the machine. Only the precisions and the optimizer change the trained model.

    Raises:
        ValueError: if a setting is out of range or unknown.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    precision: Precision = "float32"
    """Precision of the networks: float32, or bf16 for autocast with float32 weights."""
    cpu: bool = False
    """Use the CPU even if an accelerator is available."""
    threads: int | None = None
    """Number of CPU threads that torch uses; torch's default if not set."""
    micro_batch: int | Literal["auto"] | None = None
    """Number of samples per network call; the whole batch by default. auto tries the whole batch first, then smaller
    powers of two, and uses the first size that fits in memory."""
    sharding: Sharding = "none"
    """full shards the weights, gradients, moments and averages of all networks across the processes (FSDP2)."""
    timeout_minutes: float = 10.0
    """Minutes after which an unresponsive process is considered lost."""
    trackers: tuple[Tracker, ...] | None = None
    """Trackers for the log and sample grids, in addition to log.jsonl; by default, TensorBoard if it is installed."""
    teacher_precision: Precision = "float32"
    """bf16 stores and runs the teacher in bfloat16, halving its weight memory."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile the networks for faster updates. This takes minutes at the first update, once for the whole chain.
    Compiled networks round differently from eager mode."""
    optimizer: Optimizer = "adamw"
    """The optimiser: AdamW, or the 8-bit AdamW of bitsandbytes, optionally paged."""
    log_every: int = 50
    """Number of updates between log lines."""
    checkpoint_updates: int = 5000
    """Number of updates between checkpoints."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    requeue_code: int | None = None
    """Exit code after SIGTERM or SIGUSR1, for schedulers that requeue on a special code; 143 and 138 by default."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_updates"):
            check_whole(f"engine.{name}", getattr(self, name))
        if self.threads is not None:
            check_whole("engine.threads", self.threads, most=512)
        if self.micro_batch not in (None, "auto"):
            check_whole("engine.micro_batch", self.micro_batch, most=MOST_AT_ONCE)
        for name in ("cpu", "gradient_checkpointing", "compile"):
            check_switch(f"engine.{name}", getattr(self, name))
        if self.trackers is not None and not (
            isinstance(self.trackers, tuple | list) and set(map(str, self.trackers)) <= set(get_args(Tracker))
        ):
            known = ", ".join(get_args(Tracker))
            raise ValueError(f"engine.trackers may only contain {known}, got {self.trackers!r}. Pass ('tensorboard',)")
        for name in ("timeout_minutes", "checkpoint_minutes"):
            check_number(f"engine.{name}", getattr(self, name), above=True)
            if getattr(self, name) > MOST_MINUTES:
                raise ValueError(f"engine.{name} must be at most {MOST_MINUTES:,}, got {getattr(self, name):g}")
        code = self.requeue_code
        if code is not None and (isinstance(code, bool) or not isinstance(code, int) or not 1 <= code <= 255):
            raise ValueError(f"engine.requeue_code must be between 1 and 255, got {code!r}")
        kinds = {"precision": Precision, "teacher_precision": Precision, "sharding": Sharding, "optimizer": Optimizer}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"engine.{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}"
                )

    @property
    def set_micro_batch(self) -> int | None:
        """The micro batch size as a number, or None for the whole share and for an unresolved "auto"."""
        return None if self.micro_batch == "auto" else self.micro_batch


LEARNED: Final = ("precision", "teacher_precision", "optimizer")
"""Engine settings that change the trained model."""
IDLE: Final = tuple(setting.name for setting in fields(Engine) if setting.name not in LEARNED)
"""All other engine settings."""
