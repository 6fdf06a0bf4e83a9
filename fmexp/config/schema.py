"""The schema of the configuration: which keys it has, of which type and in which range; `options` has the groups'.

Hydra checks names and types against these dataclasses while it composes, command line and YAML alike.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Moment(Enum):
    """When a stage is executed: before training, at each running loss, after each epoch, or at the end."""

    start = "start"
    log = "log"
    epoch = "epoch"
    end = "end"


def limited(default: Any, **limits: Any) -> Any:
    """A field whose value has limits: `least` and `most` (inclusive), `above` and `below` (exclusive), `one_of`.

    `word` is what a whole number within the limits may be replaced by, `length` how many values a list has, `longest`
    how many letters a text has at most.
    """
    return field(default=default, metadata=limits)


def listed(*default: Any, **limits: Any) -> Any:
    """A field that is a list; `limits`, as of `limited`, are those of each value."""
    return field(default_factory=lambda: list(default), metadata={"each": True, **limits})


@dataclass
class Train:
    epochs: int = limited(1, least=1)
    batch_size: int = limited(4, least=1)
    log_every: int = limited(1000, least=1)
    max_steps: int | None = limited(None, least=1)
    num_workers: Any = limited("auto", word="auto", least=0)
    validation: float = limited(0.1, least=0.0, below=1.0)
    keep: str = limited("best", one_of=("best", "last"))
    patience: int | None = limited(None, least=1)
    min_delta: float = limited(0.0, least=0.0)
    precision: Any = limited(32, one_of=(32, "bf16"))
    clip_grad: float | None = limited(None, above=0.0)
    accumulate: int = limited(1, least=1)
    ema: float | None = limited(None, above=0.0, below=1.0)
    compile: Any = limited("auto", one_of=("auto", True, False))
    checkpoint_every: int | None = limited(None, least=1)
    keep_checkpoint: bool = True
    freeze: list[str] = listed()
    sync_batchnorm: bool = True
    tag: str = "train/loss"


@dataclass
class Backend:
    kernels: str = limited("auto", one_of=("auto", "onednn", "native"))
    threads: Any = limited("auto", word="auto", least=1, most=1024)  # with more, OpenMP ends the process


@dataclass
class Sweep:
    fail_fast: bool = False
    dry_run: bool = False


@dataclass
class Config:
    seed: int = limited(0, least=0, below=2**63)
    device: str = "auto"
    objective: str = "val/accuracy"
    resume: bool = True
    tags: list[str] = listed(longest=100)
    note: str | None = limited(None, longest=10_000)
    weights: str | None = None
    weights_strict: bool = False
    train: Train = field(default_factory=Train)
    backend: Backend = field(default_factory=Backend)
    sweep: Sweep = field(default_factory=Sweep)
    dataset: Any = MISSING
    augment: Any = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    logging: Any = MISSING
    stage: dict[str, Any] = field(default_factory=dict)
