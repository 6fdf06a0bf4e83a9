"""Execute docs/fmexp.ipynb and store it with its outputs, so that it shows something where nobody executes it.

    python docs/notebook.py

What its runs write lands in a temporary folder. Needs the extra `test`.
"""

import base64
import io
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOK = Path(__file__).with_name("fmexp.ipynb")


def execute(notebook: NotebookNode, folder: Path, skip: str = "tensorboard") -> None:
    """Execute a notebook in `folder`/docs, except for the cells that are tagged `skip`."""
    (folder / "docs").mkdir()
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        skip_cells_with_tag=skip,
        resources={"metadata": {"path": str(folder / "docs")}},
    )
    client.execute()


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with text that was printed piece by piece as one."""
    whole: list[NotebookNode] = []
    for output in outputs:
        if whole and output.get("name") == whole[-1].get("name") == "stdout":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def smaller(png: str) -> str:
    """A picture in 256 colours, in base64 as notebooks have it."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def clean(notebook: NotebookNode, folder: Path) -> None:
    """Remove what is of this machine alone, such as paths, times and versions, and make the pictures smaller."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "text" in output:
                relative = output.text.replace(f"{folder}/docs/", "").replace(f"{folder}/", "../")
                output.text = re.sub(r" in \d+\.\d s\b", "", relative)
            elif "image/png" in output.data:
                output.data = {"image/png": smaller(output.data["image/png"]), "text/plain": output.data["text/plain"]}
    notebook.metadata.language_info = {"name": "python"}


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        execute(notebook, folder)
        clean(notebook, folder)
    nbformat.write(notebook, NOTEBOOK)
    print(NOTEBOOK, f"{NOTEBOOK.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
