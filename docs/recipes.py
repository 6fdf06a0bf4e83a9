"""Repeat what docs/recipes.md measured: its runs, and the pictures of their curves in TensorBoard.

    python docs/recipes.py [<folder of the runs>]

Prints accuracy and loss on the test split, and the accuracies of the classes. Runs that the folder holds already are
not executed again. Fashion-MNIST is taken from FMEXP_DATA or downloaded. Needs the extra `browser`, and a Chromium on
the PATH or at $CHROMIUM.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent / "tests"), str(DOCS.parent / "tests" / "client")]

import browser  # noqa: E402
from playwright.sync_api import ViewportSize  # noqa: E402
from program import TensorBoard  # noqa: E402

from fmexp import sweep  # noqa: E402

PAGE = DOCS / "recipes.md"
COMMAND = r"^ {4}python -m fmexp (.*)$"
ADDED = ("seed=0,1", "backend.threads=1", "logging=light")  # two seeds, so that chance is seen
SIZE = ViewportSize(width=1000, height=520)


def groups() -> dict[str, tuple[str, dict[str, list[str]]]]:
    """By picture: the tag that it shows, which its text begins with, and its commands by what each has more than the
    first."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        if picture := re.search(r"!\[(\S+).*?\]\(pictures/(\w+)\.png\)", part):
            words = [shlex.split(line) for line in re.findall(COMMAND, part, re.MULTILINE)]
            commands = {" ".join(word for word in line if word not in words[0]) or "without": line for line in words}
            found[picture[2]] = picture[1], commands
    return found


def execute() -> None:
    """Execute all commands below the current folder, and print their accuracies."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(code), PAGE.name, "exec"), {})  # the arrays that commands read
    first = next(line for line in re.findall(COMMAND, PAGE.read_text(), re.MULTILINE) if "hydra.run.dir=" in line)
    subprocess.run(
        [sys.executable, "-m", "fmexp", *shlex.split(first)], check=True
    )  # whose weights another begins from
    for name, (_, commands) in groups().items():
        for more, words in commands.items():
            for member in sweep.start([*ADDED, *words], Path("runs", name, more)):
                figures = member.metrics["test/accuracy"], member.metrics["test/loss"]
                classes = [points[-1][1] for tag, points in member.scalars.items() if tag.startswith("within_class")]
                numbers = (f"{value:.4f}" for value in (*figures, *classes))
                print(name, more, member.name, *numbers, sep="  ", flush=True)


def draw(folder: Path) -> None:
    """Make the pictures, from the runs below the current folder."""
    with browser.pages(SIZE) as page:
        # Room for the names, and curves as they are: TensorBoard has smoothed them by 0.6 otherwise.
        settings = json.dumps({"sideBarWidthInPercent": 38, "scalarSmoothing": 0})
        page.add_init_script(f"localStorage.setItem('_tb_global_settings', {settings!r})")
        for name, (tag, commands) in groups().items():
            with TensorBoard(Path("runs", name)) as server:
                server.wait(*(f"{more}/0_seed-0" for more in commands))
                browser.open_tab(page, server.url, "timeseries", runs="seed-0$", tags=f"^{tag}$")
                page.locator("line-chart").first.wait_for()
                if page.get_by_text("Card Width").is_visible():
                    page.get_by_role("button", name="Settings").first.click()
                page.get_by_role("button", name="Toggle full size mode").click()
                page.mouse.move(0, 0)
                page.wait_for_timeout(2000)  # until nothing moves any more: for the eye, and not for being right
                browser.save(page, folder / f"{name}.png")


def main(folder: Path) -> None:
    os.environ["FMEXP_DATA"] = str(Path(os.environ.get("FMEXP_DATA", DOCS.parent / "data")).resolve())
    os.chdir(folder)
    execute()
    draw(DOCS / "pictures")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
