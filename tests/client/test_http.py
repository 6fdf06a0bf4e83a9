"""What TensorBoard serves is what the run knows: every tab's data, over HTTP, with both of its loaders."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import TensorBoard

from fmexp import datasets, sweep
from fmexp.engine.evaluation import Evaluation, evaluate
from fmexp.models import LeNet


@pytest.fixture(scope="session")
def evaluation(logdir: Path, tutorial_data: datasets.Dataset) -> Evaluation:
    """The final model's evaluation, made again from model.pt."""
    model = LeNet(input_shape=(1, 28, 28), num_classes=10)
    model.load_state_dict(torch.load(logdir / "tutorial" / "model.pt", weights_only=True))
    return evaluate(model.eval(), tutorial_data, tutorial_data.test, device=torch.device("cpu"))


def test_scalars(server: TensorBoard, logdir: Path) -> None:
    points = server.json("plugin/scalars/scalars", run="tutorial", tag="training loss")
    assert [step for _, step, _ in points] == [25, 50, 75, 100]
    result = json.loads((logdir / "tutorial" / "result.json").read_text())
    assert points[-1][2] == pytest.approx(result["metrics"]["training loss"], rel=1e-6)
    accuracy = server.json("plugin/scalars/scalars", run="tutorial", tag="test/accuracy")
    assert [(step, value) for _, step, value in accuracy] == [(100, pytest.approx(result["metrics"]["test/accuracy"]))]


def test_images(server: TensorBoard, tutorial_data: datasets.Dataset) -> None:
    def picture(tag: str, step: int) -> np.ndarray:
        samples = server.json("plugin/images/images", run="tutorial", tag=tag, sample=0)
        query = next(sample["query"] for sample in samples if sample["step"] == step)
        return np.asarray(Image.open(io.BytesIO(server.bytes(f"plugin/images/individualImage?{query}"))))

    grid = picture("four_fashion_mnist_images", 0)
    assert grid.shape[:2] == (32, 122)
    first = grid[2:30, 2:30].reshape(28, 28, -1)[..., 0]
    assert isinstance(tutorial_data.train, datasets.Split)
    assert (tutorial_data.train.images[:, 0].numpy() == first).all((1, 2)).any()  # a training image, to the byte
    samples = server.json("plugin/images/images", run="tutorial", tag="predictions vs. actuals", sample=0)
    assert [sample["step"] for sample in samples] == [25, 50, 75, 100]
    assert picture("predictions vs. actuals", 100).shape[:2] == (230, 700)


def test_graph(server: TensorBoard) -> None:
    assert "tutorial" in server.json("plugin/graphs/info")
    graph = server.bytes("plugin/graphs/graph", run="tutorial", conceptual="false").decode()
    assert all(f"LeNet/{kind}" in graph for kind in ("Conv2d[conv1]", "MaxPool2d[pool]", "Linear[fc3]"))


def test_projector(server: TensorBoard, tutorial_data: datasets.Dataset) -> None:
    assert "tutorial" in server.json("plugin/projector/runs")
    (embedding,) = server.json("plugin/projector/info", run="tutorial")["embeddings"]
    assert embedding["tensorShape"] == [100, 784]
    name = embedding["tensorName"]
    tensor = server.bytes("plugin/projector/tensor", run="tutorial", name=name)
    vectors = np.frombuffer(tensor, np.float32).reshape(100, 784)
    labels = server.bytes("plugin/projector/metadata", run="tutorial", name=name).decode().split("\n")[:100]
    assert isinstance(tutorial_data.train, datasets.Split)
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(tutorial_data.train.images, tutorial_data.train.labels, strict=True)
    }
    found = [known[np.round(vector * 255).astype(np.uint8).tobytes()] for vector in vectors]
    assert [tutorial_data.classes[label] for label in found] == labels
    sprite = Image.open(io.BytesIO(server.bytes("plugin/projector/sprite_image", run="tutorial", name=name)))
    assert sprite.size == (280, 280)


def test_pr_curves(server: TensorBoard, evaluation: Evaluation, tutorial_data: datasets.Dataset) -> None:
    for index, name in enumerate(tutorial_data.classes):
        (curve,) = server.json("plugin/pr_curves/pr_curves", run="tutorial", tag=name)["tutorial"]
        assert curve["step"] == 100
        probabilities, positive = evaluation.probabilities[:, index].numpy(), (evaluation.labels == index).numpy()
        for threshold, found in zip(curve["thresholds"], curve["true_positives"], strict=True):
            # TensorBoard's buckets are 1/126 wide; a sample on the edge may fall on either side
            least = (positive & (probabilities > threshold + 1e-5)).sum()
            most = (positive & (probabilities >= threshold - 1e-5)).sum()
            assert least <= found <= most
        assert curve["recall"][0] == pytest.approx(1.0)


def test_text(server: TensorBoard) -> None:
    (shown,) = server.json("plugin/text/text", run="tutorial", tag="config/text_summary")
    assert "drawn by fmexp" in shown["text"]
    assert "batch_size: 4" in shown["text"]


def test_hparams_has_a_row_a_member(server: TensorBoard, members: list[sweep.Member]) -> None:
    experiment = server.json("plugin/hparams/experiment", {})
    columns = [info["name"] for info in experiment["hparamInfos"]]
    assert {"dataset", "model", "optimizer", "seed", "optimizer.lr", "optimizer.momentum", "optimizer.betas"} <= set(
        columns
    )
    assert columns[:2] == ["optimizer", "optimizer.lr"]  # what varies comes first
    metrics = ["val/accuracy", "val/accuracy/best", "test/accuracy", "test/loss", "train/loss", "wall_seconds"]
    assert metrics == [info["name"]["tag"] for info in experiment["metricInfos"]]
    rows = server.json(
        "plugin/hparams/session_groups",
        {
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
            "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in metrics],
            "startIndex": 0,
            "sliceSize": 100,
        },
    )["sessionGroups"]
    by_run = {session["name"]: (row, session) for row in rows for session in row["sessions"]}
    assert len(rows) == len(by_run) == 5  # four members and the single run
    for member in members:
        row, session = by_run[f"sweep/{member.folder.name}"]
        assert session["status"] == "STATUS_SUCCESS"
        assert row["hparams"]["optimizer.lr"] == float(member.overrides["optimizer.lr"])
        assert row["hparams"]["optimizer"] == {"sgd": "SGD", "adam": "Adam"}[member.overrides["optimizer"]]
        values = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
        assert values["val/accuracy"] == pytest.approx(member.objective)
        assert set(values) == set(metrics)


def test_hparams_of_single_runs_has_the_accuracy_first_and_the_classes_last(
    singles: TensorBoard, tutorial_data: datasets.Dataset
) -> None:
    metrics = [info["name"]["tag"] for info in singles.json("plugin/hparams/experiment", {})["metricInfos"]]
    of_classes = sorted(f"within_class_accuracy/{name}" for name in tutorial_data.classes)
    written = ["test/accuracy", "test/loss", "train/accuracy", "train/loss", "train/lr", "val/accuracy",
               "val/accuracy/best", "val/loss", "wall_seconds"]  # fmt: skip
    assert metrics == [*written, *of_classes]
