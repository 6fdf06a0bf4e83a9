"""docs/fmexp.ipynb: executed from its first cell to its last in a folder of its own, and what its cells show."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from program import CHECKOUT, environment

from fmexp import read, sweep

nbformat = pytest.importorskip("nbformat", reason='nbclient is not installed: pip install "fmexp[test]"')
nbclient = pytest.importorskip("nbclient", reason='nbclient is not installed: pip install "fmexp[test]"')
pytest.importorskip("ipykernel", reason='ipykernel is not installed: pip install "fmexp[test]"')

NOTEBOOK = CHECKOUT / "docs" / "fmexp.ipynb"
QUICK = [
    "dataset=synthetic",
    "dataset.train_size=64",
    "dataset.test_size=40",
    "train.batch_size=8",
    "train.log_every=4",
]


def cells() -> list[Any]:
    found: list[Any] = nbformat.read(NOTEBOOK, as_version=4).cells
    return found


def tagged(cell: Any) -> list[str]:
    tags: list[str] = cell.metadata.get("tags", [])
    return tags


def test_nothing_of_an_execution_is_kept() -> None:
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert cells()[0].cell_type == "markdown"
    for cell in cells():
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_last_cell_alone_needs_a_server() -> None:
    assert [tagged(cell) for cell in cells()].count(["tensorboard"]) == 1
    assert cells()[-1].source == "%load_ext tensorboard\n%tensorboard --logdir ."


class Executed:
    """The notebook as it is after an execution, and the folder where it was executed."""

    def __init__(self, folder: Path) -> None:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (settings,) = (cell for cell in notebook.cells if tagged(cell) == ["parameters"])
        assert settings.source.startswith("SETTINGS = [")
        settings.source = f"SETTINGS = {QUICK}"
        notebook.cells = [cell for cell in notebook.cells if tagged(cell) != ["tensorboard"]]
        nbclient.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
        self.folder, self.cells = folder, {cell.id: cell for cell in notebook.cells}

    def text(self, cell: str) -> str:
        """What a cell printed, and its value."""
        outputs = self.cells[cell].outputs
        return "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs)

    def pictures(self, cell: str) -> list[Image.Image]:
        encoded = [
            output.data["image/png"] for output in self.cells[cell].outputs if "image/png" in output.get("data", {})
        ]
        return [Image.open(io.BytesIO(base64.b64decode(png))) for png in encoded]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        return Executed(folder)


def test_it_shows_the_run(executed: Executed) -> None:
    run = read(executed.folder / "runs" / "notebook")
    assert (run.status, run.steps) == ("complete", 16)
    assert "epochs: 2" in executed.text("compose")
    assert f"{run.objective:.4f}" in executed.text("execute")
    assert executed.text("execute").endswith(str(run.objective))
    assert executed.text("read").startswith(f"complete after 16 batches and {run.seconds:.1f} s, test/accuracy ")
    assert str(run.metrics["test/loss"]) in executed.text("read")


def test_it_shows_the_pictures(executed: Executed) -> None:
    run = read(executed.folder / "runs" / "notebook")
    assert len(executed.pictures("loss")) == len(executed.pictures("curves")) == 1
    first, last = executed.pictures("predictions")
    kept = run.images["view/predictions"]
    assert executed.text("predictions").startswith("after 4 batches\n")
    assert (first.tobytes(), last.tobytes()) == (kept[0][1].tobytes(), kept[-1][1].tobytes())
    assert executed.pictures("confusion")[0].size == run.images["view/confusion_matrix"][0][1].size


def test_it_shows_the_sweep(executed: Executed) -> None:
    members = sweep.read(executed.folder / "multirun" / "notebook")
    assert [member.status for member in members] == ["complete"] * 3
    rows = executed.text("sweep").splitlines()[-4:]
    assert rows[0].split()[0] == "optimizer.lr"
    assert {row.split()[0] for row in rows[1:]} == {"0.003", "0.01", "0.03"}
    best = sweep.ranked(members, "test/accuracy")[0]
    assert rows[1].endswith(best.folder.name)
    assert f"{best.objective:.4f}" in rows[1]


def test_everything_is_written_below_its_folder(executed: Executed) -> None:
    assert {path.name for path in executed.folder.iterdir()} == {"runs", "multirun"}
    assert json.loads((executed.folder / "runs" / "notebook" / "result.json").read_text())["failures"] == {}
