"""TensorBoard's side of a run: opening its SummaryWriter, and keeping its files true when a run goes on after a stop.

Event files only ever grow. A checkpoint therefore notes their sizes (`snapshot`), and a resumed run first cuts them to
these sizes (`rewind`): what was written after the checkpoint is gone, to the byte, whichever tag and step it had.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf import text_format
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from fmexp.config.hydra_versions import instantiate
from fmexp.rundir import atomic
from fmexp.rundir.bounded import event_files, next_second

log = logging.getLogger(__name__)

PROJECTOR = "projector_config.pbtxt"
EMBEDDING = ("tensors.tsv", "metadata.tsv", "sprite.png")
EMPTY: dict[str, Any] = {"files": {}, "projector": ""}


def open_writer(cfg: DictConfig, output_dir: Path, *, step: int | None) -> SummaryWriter:
    """Open a SummaryWriter with its arguments `cfg` in `output_dir`; `step` is where a resumed run goes on from."""
    # A running TensorBoard forgets by this mark what it had already read beyond the checkpoint.
    purge_step = (cfg.get("purge_step") or 0) if step is None else step + 1
    # An absolute path: a relative one breaks when the program changes its folder. The comment is in the folder's name.
    with _names_sort_last(output_dir):
        writer: SummaryWriter = instantiate(cfg, log_dir=str(output_dir.resolve()), comment="", purge_step=purge_step)
    if text := _read(output_dir / PROJECTOR):
        writer._projector_config = text_format.Parse(text, ProjectorConfig())
    return writer


class NoWriter:
    """In place of a SummaryWriter: writes nothing, for the processes of a run but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def snapshot(writer: SummaryWriter, output_dir: Path) -> dict[str, Any]:
    """Put all that was written on the disk, and return what `rewind` needs to come back to it.

    Raises:
        OSError: it could not be written, now or before.
    """
    writer.flush()
    # flush alone may miss an error of the last record, which the writer's thread notes after it has called it done.
    # It cannot miss it with one more record behind that; this one is empty.
    add_summary(writer, Summary())
    writer.flush()
    sizes = {}
    for path in event_files(output_dir):
        atomic.sync(path)
        sizes[path.name] = path.stat().st_size
    projector = _read(output_dir / PROJECTOR)
    for info in _embeddings(projector):
        for name in filter(None, (info.tensor_path, info.metadata_path, info.sprite.image_path)):
            with suppress(FileNotFoundError):
                atomic.sync(output_dir / name)
                atomic.sync((output_dir / name).parent)
    return {"files": sizes, "projector": projector}


def rewind(output_dir: Path, state: dict[str, Any]) -> None:
    """Take back all that was written after `state` was taken, torn tails included; EMPTY takes back everything."""
    for path in event_files(output_dir):
        size = state["files"].get(path.name)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)
    for name, size in state["files"].items():
        path = output_dir / name
        if not path.is_file() or path.stat().st_size < size:
            log.warning("%s is shorter than when the checkpoint was written: TensorBoard will miss its points", path)
    kept = []
    for info in _embeddings(state["projector"]):
        if (output_dir / info.tensor_path).is_file():
            kept.append(info)
        else:  # TensorBoard would show no embedding of any run
            log.warning("%s is gone, and its embedding with it", output_dir / info.tensor_path)
    if kept:
        atomic.atomic_write(output_dir / PROJECTOR, text_format.MessageToString(ProjectorConfig(embeddings=kept)))
    else:
        (output_dir / PROJECTOR).unlink(missing_ok=True)
    folders = {(output_dir / info.tensor_path).parent for info in kept}
    for step in (path for path in output_dir.iterdir() if re.fullmatch(r"\d{5,}", path.name) and path.is_dir()):
        for folder in step.iterdir():  # as SummaryWriter names them: 00400/<tag>
            if folder not in folders and folder.is_dir() and all(path.name in EMBEDDING for path in folder.iterdir()):
                shutil.rmtree(folder)
        if not any(step.iterdir()):
            step.rmdir()


def rewrite(output_dir: Path, state: dict[str, Any], suffix: str, change: Callable[[Any], None]) -> dict[str, Any]:
    """Copy the event files of `state` into others, whose names end with `suffix`, calling `change` with each value.

    Returns:
        the state that has the copies in place of the files: `rewind` to it removes these.
    """
    sizes = {}
    for name in state["files"]:
        if not (output_dir / name).is_file():  # `rewind` has said so
            continue
        copy = output_dir / f"{name}{suffix}"
        with atomic.atomic_open(copy) as file:
            records = RecordWriter(file)
            for record in RawEventFileLoader(str(output_dir / name)).Load():
                event = Event.FromString(record)
                for value in event.summary.value:
                    change(value)
                records.write(event.SerializeToString())
            sizes[copy.name] = file.tell()
    return {**state, "files": sizes}


@contextmanager
def silent_writer() -> Iterator[None]:
    """Within the block, let a writer's thread that cannot write say nothing itself: its next call raises the error."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not isinstance(raised.exc_value, OSError):
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def add_summary(writer: SummaryWriter, summary: Summary) -> None:
    """Write a summary that SummaryWriter has no method for; its file writer has no public name."""
    writer._get_file_writer().add_summary(summary)


@contextmanager
def _names_sort_last(output_dir: Path) -> Iterator[None]:
    """Within the block, name a new event file such that TensorBoard reads it after those of the folder.

    Two that are made in one second would be in no order, and a clock that was set back would hide what is written after
    it.
    """
    earliest = next_second(event_files(output_dir))
    event_file_writer.time = SimpleNamespace(time=lambda: max(time.time(), earliest))
    try:
        yield
    finally:
        event_file_writer.time = time


def _embeddings(projector: str) -> list[EmbeddingInfo]:
    return list(text_format.Parse(projector, ProjectorConfig()).embeddings)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
