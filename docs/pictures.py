"""Make the pictures of the README and of docs/: a run and a sweep, seen in TensorBoard by a headless Chromium.

    python docs/pictures.py [<folder of the pictures>]

Fashion-MNIST is taken from FMEXP_DATA or downloaded. Needs the extra `browser`, and a Chromium on the PATH or at
$CHROMIUM.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent / "tests"), str(DOCS.parent / "tests" / "client")]

import browser  # noqa: E402
from playwright.sync_api import Page, ViewportSize  # noqa: E402
from program import TensorBoard  # noqa: E402

from fmexp import compose, execute, sweep  # noqa: E402

# Five epochs: curves, and not dots.
SWEEP = (
    "optimizer.lr=0.001,0.01",
    "optimizer=sgd,adam",
    "train.batch_size=64",
    "train.epochs=5",
    "train.log_every=200",
    "logging=light",
)
SIZE = ViewportSize(width=1200, height=720)
TUTORIAL, SWEPT = "^tutorial$", "^sweep/[0-9]"


def time_series(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 1200, "height": 640})
    _curves(page, url, SWEPT, "^(train/loss|test/accuracy)$")


def training(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 1200, "height": 560})
    _curves(page, url, TUTORIAL, "^training loss$")


def _curves(page: Page, url: str, runs: str, tags: str) -> None:
    browser.open_tab(page, url, "timeseries", runs=runs, tags=tags)
    page.locator("line-chart").first.wait_for()
    if page.get_by_text("Card Width").is_visible():
        page.get_by_role("button", name="Settings").first.click()  # closes them, for the pages after this one as well


def images(page: Page, url: str) -> None:
    _picture(page, url, "four", (122, 32))


def predictions(page: Page, url: str) -> None:
    _picture(page, url, "predictions", (700, 230), full=True)


def confusion_matrix(page: Page, url: str) -> None:
    _picture(page, url, "confusion", (700, 430), full=True)


def _picture(page: Page, url: str, tag: str, size: tuple[int, int], *, full: bool = False) -> None:
    """One picture of the tutorial's run in the tab IMAGES, in its card's size or in its full size."""
    page.set_viewport_size({"width": 1200, "height": 300 + (size[1] if full else 120)})
    browser.open_tab(page, url, "images", runs=TUTORIAL)
    page.locator("tf-tag-filterer input").fill(tag)
    if full:
        page.get_by_text("Show actual image size").first.click()
    browser.wait_for_picture(page, *size)


def graph(page: Page, url: str) -> None:
    page.set_viewport_size(SIZE)
    browser.open_tab(page, url, "graphs", runs=TUTORIAL)
    node = page.locator("g.node[data-name='LeNet']").first
    node.wait_for()
    node.dblclick()
    page.locator("g.node[data-name='LeNet/Linear[fc3]']").first.wait_for()
    page.wait_for_timeout(1000)  # while it unfolds
    page.mouse.click(320, 700)  # beside it: nothing is selected any more
    page.get_by_text("Fit to screen").first.click()
    page.wait_for_timeout(1000)
    page.mouse.move(500, 400)
    page.mouse.wheel(0, 50)  # a little smaller: the input is below the edge


def projector(page: Page, url: str) -> None:
    browser.open_tab(page, url, "projector")
    browser.projector(page).get_by_text("Points: 100").first.wait_for()
    browser.colour_by_class(page)


def pr_curves(page: Page, url: str) -> None:
    browser.open_tab(page, url, "pr_curves", runs=TUTORIAL)
    page.get_by_text("is at step").first.wait_for()


def hparams(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 1900, "height": 480})
    browser.open_tab(page, url, "hparams", runs=SWEPT)
    page.get_by_text("optimizer.lr").first.wait_for()


TABS: tuple[Callable[[Page, str], None], ...] = (
    *(time_series, training, images, predictions, confusion_matrix, graph, projector, pr_curves, hparams),
)


def main(folder: Path) -> None:
    os.environ["FMEXP_DATA"] = str(Path(os.environ.get("FMEXP_DATA", DOCS.parent / "data")).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        root = Path("runs")  # TensorBoard shows the path that it was given
        execute(compose(["experiment=tutorial"]), root / "tutorial")
        members = sweep.start(SWEEP, root / "sweep")
        with TensorBoard(root) as server, browser.pages(SIZE) as page:
            server.wait("tutorial", *(f"sweep/{member.folder.name}" for member in members))
            for tab in TABS:
                tab(page, server.url)
                page.wait_for_timeout(2000)  # until nothing moves any more: for the eye, and not for being right
                path = folder / f"{tab.__name__}.png"
                browser.save(page, path)
                print(path, f"{path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else DOCS / "pictures")
