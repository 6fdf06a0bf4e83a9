"""docs/fmexp.ipynb: as it is stored, and executed by docs/notebook.py in a folder of its own: what its cells show."""

import base64
import importlib.util
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from PIL import Image
from program import CHECKOUT, environment

from fmexp import read, sweep

DOCS = CHECKOUT / "docs"
NOTEBOOK = DOCS / "fmexp.ipynb"
QUICK = [
    "dataset=synthetic",
    "dataset.train_size=64",
    "dataset.test_size=40",
    "train.batch_size=8",
    "train.log_every=4",
]


def code() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def pictures(outputs: list[Any]) -> list[Image.Image]:
    encoded = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in encoded]


def test_it_is_stored_with_its_outputs() -> None:
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    stored = {cell.id: cell for cell in code()}
    silent = ["imports", "settings", "tensorboard"]
    assert [name for name, cell in stored.items() if not cell.outputs] == silent
    executed = [cell.execution_count for name, cell in stored.items() if name != "tensorboard"]
    assert executed == list(range(1, len(stored)))
    assert {output.output_type for cell in stored.values() for output in cell.outputs} <= {
        "stream", "display_data", "execute_result"}  # fmt: skip
    assert "complete after 676 batches" in stored["read"].outputs[0].text
    assert re.search(r"^optimizer\.lr ", stored["sweep"].outputs[-1].text, re.MULTILINE)
    shown = {name: len(pictures(cell.outputs)) for name, cell in stored.items()}
    assert {name: count for name, count in shown.items() if count} == {
        "loss": 1, "predictions": 2, "confusion": 1, "curves": 1}  # fmt: skip


def test_what_is_stored_is_small_and_names_no_folder_of_a_machine() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    texts = [output.get("text", "") for cell in code() for output in cell.outputs]
    assert [re.findall(r"(?<![\w.~/])/[\w.-]+/.*|[A-Z]:\\.*", text) for text in texts] == [[]] * len(texts)
    assert not [cell.metadata for cell in code() if set(cell.metadata) - {"tags"}]


class Executed:
    """The notebook as it is after an execution, and the folder below which it was executed."""

    def __init__(self, folder: Path, script: ModuleType) -> None:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (settings,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
        assert settings.source.startswith("SETTINGS = [")
        settings.source = f"SETTINGS = {QUICK}"
        script.execute(notebook, folder, skip="nothing")
        self.folder, self.root = folder, folder / "runs" / "notebook"
        self.cells = {cell.id: cell for cell in notebook.cells}

    def text(self, cell: str) -> str:
        """What a cell printed, and its value."""
        outputs = self.cells[cell].outputs
        return "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs)

    def pictures(self, cell: str) -> list[Image.Image]:
        return pictures(self.cells[cell].outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executed]:
    """Executed where no TensorBoard is on the PATH; the one that its last cell starts ends with the tests."""
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "TMPDIR"):
            patch.setenv(name, str(home))
        patch.setenv("PATH", os.defpath)
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        try:
            yield Executed(tmp_path_factory.mktemp("notebook"), script)
        finally:
            for server in (home / ".tensorboard-info").glob("*.info"):  # the kernel may have ended it
                with suppress(ProcessLookupError):
                    os.kill(json.loads(server.read_text())["pid"], signal.SIGTERM)


def test_it_shows_the_run(executed: Executed) -> None:
    run = read(executed.root / "run")
    assert (run.status, run.steps) == ("complete", 14)
    assert "epochs: 2" in executed.text("compose")
    assert f"{run.objective:.4f}" in executed.text("execute")
    assert executed.text("execute").endswith(str(run.objective))
    assert executed.text("read").startswith("complete after 14 batches, val/accuracy ")
    assert str(run.metrics["test/loss"]) in executed.text("read")


def test_it_shows_the_pictures(executed: Executed) -> None:
    run = read(executed.root / "run")
    assert len(executed.pictures("loss")) == len(executed.pictures("curves")) == 1
    first, last = executed.pictures("predictions")
    kept = run.images["view/predictions"]
    assert executed.text("predictions").startswith("after 4 batches\n")
    assert (first.tobytes(), last.tobytes()) == (kept[0][1].tobytes(), kept[-1][1].tobytes())
    assert executed.pictures("confusion")[0].size == run.images["view/confusion_matrix"][0][1].size


def test_it_shows_the_sweep(executed: Executed) -> None:
    members = sweep.read(executed.root / "sweep")
    assert [member.status for member in members] == ["complete"] * 3
    rows = executed.text("sweep").splitlines()[-4:]
    assert {row.split()[0] for row in rows[1:]} == {"0.003", "0.01", "0.03"}
    best = sweep.ranked(members, "val/accuracy")[0]
    assert rows[1].endswith(best.folder.name)
    assert f"{best.objective:.4f}" in rows[1]


def test_tensorboard_is_that_of_the_environment(executed: Executed) -> None:
    (frame,) = (output for output in executed.cells["tensorboard"].outputs if output.output_type == "display_data")
    assert "tensorboard-frame" in frame.data["text/html"], executed.text("tensorboard")


def test_nothing_is_written_beside_the_notebook(executed: Executed) -> None:
    assert {path.name for path in executed.folder.iterdir()} == {"docs", "runs"}
    assert list((executed.folder / "docs").iterdir()) == []
    assert {path.name for path in executed.root.iterdir()} == {"run", "sweep"}
    assert json.loads((executed.root / "run" / "result.json").read_text())["failures"] == {}
