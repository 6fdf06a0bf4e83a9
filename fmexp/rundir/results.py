"""Reading a run back from its folder: what came of it, its scalars and its images.

In short:

    run = fmexp.read("runs/2026-01-31/12-00-00-000000")
    run.status, run.objective, run.scalars["train/loss"], run.images["view/predictions"]
"""

import io
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmexp.errors import FmexpError, first_line, printable
from fmexp.rundir import bounded, layout, rungs

if TYPE_CHECKING:
    from PIL import Image

STATUSES = ("complete", "diverged", "failed", "pruned", "paused", "running", "interrupted")


@dataclass(frozen=True)
class Result:
    """A run as its folder had it when it was read. Of a run without result.json, all but the first two are empty.

    Attributes:
        status: complete, diverged or failed, as result.json says, or of a halving sweep's member paused or pruned;
            running, while a process holds the folder; or interrupted: none of these.
        objective: NaN while there is none.
        metrics: the latest value of each metric; those that are not finite are left out.
        steps: batches trained on.
        seconds: of training, with evaluation and stages, over all processes that worked on the run.
        failures: stage name -> what went wrong.
        error: why the run failed, or "".
        tags, note: the words that the run was given to be found by; none and "" where there are none.
        git: of the code that the run began with: commit, dirty (whether tracked files were changed), patch, untracked
            and so on; empty outside of a repository.
        rungs: step -> objective, where a halving sweep has compared the run with others.
        content: all of result.json, as it is there.
    """

    folder: Path
    status: str
    objective: float
    metrics: dict[str, float]
    steps: int
    seconds: float
    failures: dict[str, str]
    error: str
    tags: list[str]
    note: str
    git: dict[str, Any]
    rungs: dict[int, float]
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, to be shown."""
        return printable(self.folder.name)

    @cached_property
    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """Every point that the event files hold of each scalar: tag -> [(step, value)], as float32 keeps the value.

        They are read when first asked for; read the folder again to see what a running one has written since.
        """
        events = self._events
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    @cached_property
    def images(self) -> "dict[str, list[tuple[int, Image.Image]]]":
        """Every image that the event files hold: tag -> [(step, image)]; several of one step follow each other."""
        from PIL import Image
        from tensorboard.plugins.image.metadata import PLUGIN_NAME

        events = self._events
        encoded = {
            tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)]
            for tag in events.Tags()["images"]
        }
        for tag in events.Tags()["tensors"]:  # TensorBoard's newer form: width, height, and then the pictures
            if events.SummaryMetadata(tag).plugin_data.plugin_name == PLUGIN_NAME:
                encoded[tag] = [
                    (event.step, png) for event in events.Tensors(tag) for png in event.tensor_proto.string_val[2:]
                ]
        try:
            return {tag: [(step, Image.open(io.BytesIO(png), formats=["PNG"])) for step, png in found]
                    for tag, found in encoded.items()}  # fmt: skip
        except Exception as error:  # whatever a damaged picture makes PIL raise
            raise FmexpError(f"{self.folder.absolute()}: a picture of its event files is no PNG: {error}") from error

    @cached_property
    def _events(self) -> Any:
        """TensorBoard's EventAccumulator on the folder, nothing sampled away."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for path in self.folder.glob("*tfevents*"):
            bounded.check_regular(path)
        logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it reports the end of each file
        try:
            return EventAccumulator(str(self.folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
        except Exception as error:  # whatever a damaged file makes TensorBoard raise
            raise FmexpError(f"{self.folder.absolute()}: its event files are damaged: {first_line(error)}") from error


def read(folder_of_run: str | Path) -> Result:
    """Read the run of a folder: complete, running or interrupted.

    Raises:
        FmexpError: the folder holds no run, or a result.json that no run has written.
    """
    path = Path(folder_of_run)
    if not layout.holds_run(path):
        problem = f"has no {layout.CONFIG}" if path.is_dir() else "is no folder"
        raise FmexpError(
            f"{path.absolute()} holds no run: it {problem}. Name the folder of one run, such as runs/<date>/<time>; "
            "fmexp.sweep.read reads the members of a sweep."
        )
    return _read(path)


def read_complete(folder_of_run: str | Path) -> Result:
    """Read a run that was trained to its end and has its weights, in model.pt.

    Raises:
        FmexpError: as `read`, or there are no such weights; the message says why, and the way out.
    """
    run = read(folder_of_run)
    folder = printable(str(run.folder.absolute()))
    ways_out = {
        "running": f"{layout.owner(run.folder)} is training it. Wait for its end.",
        "interrupted": "it was stopped. The command that began it goes on with hydra.run.dir=<this folder>.",
        "diverged": "it diverged. Train again in another folder; a smaller optimizer.lr is the usual cure.",
        "failed": f"it failed: {run.error}\nIts fmexp.log has more. The command that began it tries again with "
        "hydra.run.dir=<this folder>.",
        "paused": "it was to be compared with other members of its sweep. The sweep's command goes on with it.",
        "pruned": "its sweep gave it up. A plain sweep over the sweep's folder goes on with it, or, with "
        "hydra/sweeper=halving, hydra.sweeper.resume_pruned=true.",
        "complete": f"{layout.WEIGHTS} is gone. Copy it back, or train again in another folder.",
    }
    if run.status != "complete" or not (run.folder / layout.WEIGHTS).exists():
        raise FmexpError(f"{folder} has no trained weights: {ways_out[run.status]}")
    return run


def status(path: Path) -> str:
    """What became of the run in a folder: one of STATUSES.

    It is interrupted, too, where no run has written its result.json: the same command goes on with it.
    """
    try:
        return _read(path).status
    except FmexpError:
        return "interrupted"


def _read(path: Path) -> Result:
    word, content = _status(path)
    if word not in STATUSES:
        raise FmexpError(f"{path.absolute() / layout.RESULT} is damaged: status {word}. Move it away to go on.")
    objective = content.get("objective")
    try:
        return Result(
            folder=path,
            status=word,
            objective=math.nan if objective is None else float(objective),
            metrics={
                printable(tag): float(value) for tag, value in content.get("metrics", {}).items() if value is not None
            },
            steps=int(content.get("steps", 0)),
            seconds=float(content.get("seconds", 0.0)),
            failures={printable(name): printable(str(said)) for name, said in content.get("failures", {}).items()},
            error=printable(str(content.get("error", ""))),
            tags=[printable(str(tag)) for tag in _listed(content.get("tags"))],
            note=printable(str(content.get("note") or "")),
            git={
                printable(name): _shown(value) for name, value in (content.get("lineage", {}).get("git") or {}).items()
            },
            rungs=rungs.read(path),
            content=content,
        )
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise FmexpError(f"{path.absolute() / layout.RESULT} is damaged: {error}. Move it away to go on.") from error


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise TypeError(f"{value} is no list")
    return value or []


def _shown(value: Any) -> Any:
    """A value of a JSON file that is a word or a list of words, or else plain; to be shown."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else printable(str(value))


def _status(path: Path) -> tuple[str, dict[str, Any]]:
    """The status, and the content of result.json that it comes from."""
    content = layout.read_result(path) or {}
    if content.get("status") not in ("complete", "diverged"):
        if layout.is_locked(path):
            return "running", content
        content = layout.read_result(path) or {}  # again, for the run may have ended in between
    return str(content.get("status", "interrupted")), content
