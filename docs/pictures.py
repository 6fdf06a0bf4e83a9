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
sys.path.insert(0, str(DOCS.parent / "tests" / "client"))

import browser  # noqa: E402
from playwright.sync_api import Page  # noqa: E402
from server import Server  # noqa: E402

from fmexp import compose, execute, sweep  # noqa: E402

SWEEP = (
    "optimizer.lr=0.001,0.01",
    "optimizer=sgd,adam",
    "train.log_every=150",
    "train.max_steps=3000",
    "logging=light",
)
TUTORIAL, SWEPT = "^tutorial$", "^sweep/[0-9]"


def time_series(page: Page, url: str) -> None:
    browser.open_tab(page, url, "timeseries", runs=SWEPT, tags="^(train/loss|test/accuracy)$")
    page.locator("line-chart").first.wait_for()
    page.get_by_role("button", name="Settings").first.click()  # closes them


def images(page: Page, url: str) -> None:
    browser.open_tab(page, url, "images", runs=TUTORIAL)
    page.locator("tf-tag-filterer input").fill("four")
    browser.wait_for_picture(page, 122, 32)


def predictions(page: Page, url: str) -> None:
    browser.open_tab(page, url, "images", runs=TUTORIAL)
    page.locator("tf-tag-filterer input").fill("predictions")
    page.get_by_text("Show actual image size").first.click()
    browser.wait_for_picture(page, 1200, 300)


def graph(page: Page, url: str) -> None:
    browser.open_tab(page, url, "graphs", runs=TUTORIAL)
    node = page.locator("g.node[data-name='LeNet']").first
    node.wait_for()
    node.dblclick()
    page.locator("g.node[data-name='LeNet/Linear[fc3]']").first.wait_for()


def projector(page: Page, url: str) -> None:
    browser.open_tab(page, url, "projector")
    browser.projector(page).get_by_text("Points: 100").first.wait_for()


def pr_curves(page: Page, url: str) -> None:
    browser.open_tab(page, url, "pr_curves", runs=TUTORIAL)
    page.get_by_text("is at step").first.wait_for()


def hparams(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 1900, "height": 720})
    browser.open_tab(page, url, "hparams", runs=SWEPT)
    page.get_by_text("optimizer.lr").first.wait_for()


TABS: tuple[Callable[[Page, str], None], ...] = (time_series, images, predictions, graph, projector, pr_curves, hparams)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if "FMEXP_DATA" not in os.environ:
            os.environ["FMEXP_DATA"] = str(DOCS.parent / "data")
        execute(compose(["experiment=tutorial"]), root / "tutorial")
        members = sweep.start(SWEEP, root / "sweep")
        with Server(root, fast=True) as server, browser.pages({"width": 1200, "height": 720}) as page:
            server.wait({"tutorial", *(f"sweep/{member.folder.name}" for member in members)})
            for tab in TABS:
                tab(page, server.url)
                page.wait_for_timeout(2000)  # until nothing moves any more: for the eye, and not for being right
                path = folder / f"{tab.__name__}.png"
                browser.save(page, path)
                print(path, f"{path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pictures")
