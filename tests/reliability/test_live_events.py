"""What TensorBoard itself shows of runs that were killed and resumed: the real server, with both of its loaders."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability_tools import BARE, NO_STAGES, RICH, Driver, default_signals, digest, environment, until

# All stages write at each running loss, so that before and after a kill there is something of each kind.
ALL = (*RICH, "stage.pr_curves.when=log", "stage.predictions.when=log", "stage.per_class_accuracy.when=log",
       "stage.model_graph.when=start")  # fmt: skip
CLASS = "Sneaker"


class TensorBoard:
    """A server on a folder of runs, asked over HTTP."""

    def __init__(self, logdir: Path, fast: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1",
                   "--port", str(self.port), "--load_fast", str(fast).lower(), "--reload_interval", "1",
                   "--samples_per_plugin", "images=1000,pr_curves=1000,scalars=10000,text=1000"]  # fmt: skip
        self.process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=default_signals,
        )  # fmt: skip

    def ask(self, route: str, body: Any = None, **query: object) -> bytes:
        url = f"http://127.0.0.1:{self.port}/data/{route}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as response:
            content: bytes = response.read()
        return content

    def json(self, route: str, body: Any = None, **query: object) -> Any:
        return json.loads(self.ask(route, body, **query))

    def knows(self, *runs: str) -> bool:
        """Whether it has read to the end of runs, which is where a run says how it ended."""
        try:
            return all(self.statuses().get(run) == "STATUS_SUCCESS" for run in runs)
        except (urllib.error.URLError, ConnectionError, KeyError):
            return False

    def statuses(self) -> dict[str, str]:
        """The rows of HPARAMS: run -> status."""
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        body = {"allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 100}
        groups = self.json("plugin/hparams/session_groups", body)["sessionGroups"]
        rows = [(session["name"], session["status"]) for group in groups for session in group["sessions"]]
        assert len(rows) == len(dict(rows)) == len(groups)
        return dict(rows)

    def shows(self, run: str) -> dict[str, Any]:
        """All that it shows of a run, with the order of what it gave and without clock times."""
        scalars = {
            tag: [(step, value) for _, step, value in self.json("plugin/scalars/scalars", run=run, tag=tag)]
            for tag in self.json("plugin/scalars/tags")[run]
            if tag != "wall_seconds"
        }
        images = {}
        for tag in self.json("plugin/images/tags")[run]:
            found = self.json("plugin/images/images", run=run, tag=tag, sample=0)
            images[tag] = [(one["step"], digest(self.picture(one["query"]))) for one in found]
        curves = {}
        for tag in self.json("plugin/pr_curves/tags")[run]:
            found = self.json("plugin/pr_curves/pr_curves", run=run, tag=tag)[run]
            curves[tag] = [(one["step"], one["precision"], one["recall"]) for one in found]
        embeddings = {}
        for one in self.json("plugin/projector/info", run=run)["embeddings"]:
            name = one["tensorName"]
            assert name not in embeddings
            embeddings[name] = [
                digest(self.ask(f"plugin/projector/{what}", run=run, name=name))
                for what in ("tensor", "metadata", "sprite_image")
            ]
        found = self.json("plugin/text/text", run=run, tag="config/text_summary")
        texts = [(one["step"], digest(one["text"].encode())) for one in found]
        graph = self.ask("plugin/graphs/graph", run=run, conceptual=False)
        return {
            "scalars": scalars, "images": images, "curves": curves, "embeddings": embeddings, "text": texts,
            "graph": digest(graph), "status": self.statuses()[run],
        }  # fmt: skip

    def picture(self, query: str) -> bytes:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/data/plugin/images/individualImage?{query}", timeout=30
        ) as response:
            content: bytes = response.read()
        return content

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


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
    server = TensorBoard(logdir, request.param)
    until(lambda: server.knows("truth", "killed", "early"), "TensorBoard does not show the runs")
    yield server
    server.close()


@pytest.mark.parametrize("name", ["killed", "early"])
def test_a_resumed_run_looks_like_any_other(tensorboard: TensorBoard, name: str) -> None:
    until(lambda: set(tensorboard.json("plugin/projector/runs")) >= {"truth", name}, "no projector")
    mine, its = tensorboard.shows(name), tensorboard.shows("truth")
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
    server = TensorBoard(tmp_path, fast)

    def steps(tag: str = "test/accuracy") -> list[int]:
        try:
            return [point[1] for point in server.json("plugin/scalars/scalars", run="watched", tag=tag)]
        except (urllib.error.URLError, ConnectionError):
            return []

    until(lambda: steps() == [16], "TensorBoard does not show the killed run")
    assert driver.run(*args).code == 0
    until(lambda: server.knows("watched") and steps()[-1:] == [32], "TensorBoard does not show the resumed run")
    assert steps() == [16, 32]
    assert steps("train/loss") == list(range(4, 33, 4))
    server.close()


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
        server = TensorBoard(tmp_path, fast)
        until(lambda server=server: server.knows("mended") and len(server.statuses()) == 4, "no runs are shown")
        assert server.statuses() == {
            "diverged": "STATUS_FAILURE", "unfinished": "STATUS_UNKNOWN", "failed": "STATUS_FAILURE",
            "mended": "STATUS_SUCCESS",
        }  # fmt: skip
        server.close()
