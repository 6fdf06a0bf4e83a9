"""What TensorBoard itself shows of runs that were killed and resumed: the real server, with both of its loaders."""

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from program import TensorBoard, until
from reliability_tools import BARE, NO_STAGES, RICH, Driver, digest

# All stages write at each running loss, so that before and after a kill there is something of each kind.
ALL = (*RICH, "stage.pr_curves.when=log", "stage.predictions.when=log", "stage.per_class_accuracy.when=log",
       "stage.model_graph.when=start")  # fmt: skip
CLASS = "Sneaker"


def knows(server: TensorBoard, *runs: str) -> bool:
    """Whether it has read to the end of runs, which is where a run says how it ended."""
    statuses = server.statuses()
    return all(statuses.get(run) == "STATUS_SUCCESS" for run in runs)


def shows(server: TensorBoard, run: str) -> dict[str, Any]:
    """All that it shows of a run, with the order of what it gave and without clock times."""
    scalars = {
        tag: [(step, value) for _, step, value in server.json("plugin/scalars/scalars", run=run, tag=tag)]
        for tag in server.json("plugin/scalars/tags")[run]
        if tag != "wall_seconds"
    }

    def picture(query: str) -> bytes:
        return server.bytes("plugin/images/individualImage", **dict(urllib.parse.parse_qsl(query)))

    images = {}
    for tag in server.json("plugin/images/tags")[run]:
        found = server.json("plugin/images/images", run=run, tag=tag, sample=0)
        images[tag] = [(one["step"], digest(picture(one["query"]))) for one in found]
    curves = {}
    for tag in server.json("plugin/pr_curves/tags")[run]:
        found = server.json("plugin/pr_curves/pr_curves", run=run, tag=tag)[run]
        curves[tag] = [(one["step"], one["precision"], one["recall"]) for one in found]
    embeddings = {}
    for one in server.json("plugin/projector/info", run=run)["embeddings"]:
        name = one["tensorName"]
        assert name not in embeddings
        embeddings[name] = [
            digest(server.bytes(f"plugin/projector/{what}", run=run, name=name))
            for what in ("tensor", "metadata", "sprite_image")
        ]
    found = server.json("plugin/text/text", run=run, tag="config/text_summary")
    texts = [(one["step"], digest(one["text"].encode())) for one in found]
    graph = server.bytes("plugin/graphs/graph", run=run, conceptual=False)
    return {
        "scalars": scalars, "images": images, "curves": curves, "embeddings": embeddings, "text": texts,
        "graph": digest(graph), "status": server.statuses()[run],
    }  # fmt: skip


@pytest.fixture(scope="module")
def logdir(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one configuration: uninterrupted; killed between checkpoints and resumed; killed before the first."""
    folder = tmp_path_factory.mktemp("logdir")
    for name, kills in {"truth": (), "killed": (5, 7, 11), "early": (2,)}.items():
        args = (*ALL, f"hydra.run.dir={folder / name}")
        for steps in kills:
            plan = [{"steps": steps, "match": "batch trained", "do": "KILL"}]
            assert driver.run(*args, plan=plan).code == -9
            for path in (folder / name).glob("events.out.tfevents.*"):
                path.write_bytes(path.read_bytes() + b"\x18\x00\x00\x00\x00\x00\x00\x00torn")
        ended = driver.run(*args)
        assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow"])
def tensorboard(request: pytest.FixtureRequest, logdir: Path) -> Iterator[TensorBoard]:
    with TensorBoard(logdir, fast=request.param) as server:
        until(lambda: knows(server, "truth", "killed", "early"), "TensorBoard to show the runs")
        yield server


@pytest.mark.parametrize("name", ["killed", "early"])
def test_a_resumed_run_looks_like_any_other(tensorboard: TensorBoard, name: str) -> None:
    until(lambda: set(tensorboard.json("plugin/projector/runs")) >= {"truth", name}, "the projector")
    mine, its = shows(tensorboard, name), shows(tensorboard, "truth")
    for kind in its:
        assert mine[kind] == its[kind], kind
    every_4 = list(range(4, 33, 4))
    assert [step for step, _ in mine["scalars"]["train/loss"]] == every_4
    assert [step for step, _ in mine["scalars"]["test/accuracy"]] == [16, 32]
    for tag, points in mine["scalars"].items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert steps[-1] == 32, tag
    assert [step for step, _ in mine["images"]["view/images"]] == every_4
    assert [step for step, _, _ in mine["curves"][CLASS]] == every_4
    assert sorted(mine["embeddings"]) == [f"default:{step:05}" for step in every_4]
    assert mine["status"] == "STATUS_SUCCESS"
    assert len(mine["text"]) == 1


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_a_server_that_has_watched_the_kill(driver: Driver, tmp_path: Path, fast: bool) -> None:
    """It has read points beyond the checkpoint, and must forget them when the run goes on."""
    folder = tmp_path / "watched"
    args = (*ALL, f"hydra.run.dir={folder}")
    plan = [{"steps": 14, "match": "batch trained", "do": "KILL"}]  # points of step 12, a checkpoint of 12
    assert driver.run(*args, plan=plan).code == -9
    plan = [{"steps": 4, "match": "rename .checkpoint.pt.part$", "do": "KILL"}]  # points of step 16, a checkpoint of 15
    assert driver.run(*args, plan=plan).code == -9
    with TensorBoard(tmp_path, fast=fast) as server:

        def steps(tag: str = "test/accuracy") -> list[int]:
            try:
                return [point[1] for point in server.json("plugin/scalars/scalars", run="watched", tag=tag)]
            except (urllib.error.URLError, ConnectionError):
                return []

        until(lambda: steps() == [16], "TensorBoard to show the killed run")
        assert driver.run(*args).code == 0
        until(lambda: knows(server, "watched") and steps()[-1:] == [32], "TensorBoard to show the resumed run")
        assert steps() == [16, 32]
        assert steps("train/loss") == list(range(4, 33, 4))


def test_one_row_a_run_with_its_true_status(driver: Driver, tmp_path: Path) -> None:
    killed = [{"steps": 9, "match": "batch trained", "do": "KILL"}]
    failing = "+stage.own={_target_: reliability_parts.fails_when_told, when:epoch, required: true}"
    told = {"RELIABILITY_FAIL": "1"}
    folder = {name: f"hydra.run.dir={tmp_path / name}" for name in ("diverged", "unfinished", "failed", "mended")}
    explodes = (*NO_STAGES, "model=lenet", "model._target_=reliability_parts.Explodes", folder["diverged"])
    assert driver.run(*explodes, plan=killed).code == -9
    assert driver.run(*explodes).code == 0
    assert driver.run(*BARE, folder["unfinished"], plan=killed).code == -9
    for name in ("failed", "mended"):
        assert driver.run(*BARE, failing, folder[name], **told).code == 1
    assert driver.run(*BARE, failing, folder["mended"]).code == 0
    for fast in (True, False):
        with TensorBoard(tmp_path, fast=fast) as server:
            until(lambda server=server: knows(server, "mended") and len(server.statuses()) == 4, "four rows in HPARAMS")
            assert server.statuses() == {
                "diverged": "STATUS_FAILURE", "unfinished": "STATUS_UNKNOWN", "failed": "STATUS_FAILURE",
                "mended": "STATUS_SUCCESS",
            }  # fmt: skip
