"""TensorBoard's tabs in a headless Chromium: opening one, waiting until it shows what it should, a picture of it."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import FrameLocator, Page, ViewportSize, sync_playwright

LIMIT_MS = 60_000
SIZE = ViewportSize(width=1280, height=800)  # pixels
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def chromium() -> str | None:
    """The path of a Chromium: the one at $CHROMIUM, or the one on the PATH; None: there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def pages(size: ViewportSize = SIZE) -> Iterator[Page]:
    """An empty page of a browser that is closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport=size)
        page.set_default_timeout(LIMIT_MS)
        try:
            yield page
        finally:
            browser.close()


def open_tab(page: Page, url: str, tab: str, *, runs: str = "", tags: str = "") -> None:
    """Open a tab of a TensorBoard, with the runs and tags that match these regular expressions; "": all."""
    page.goto("about:blank")  # a change after # alone would not load the page again
    page.goto(f"{url}/?{urlencode({'runFilter': runs, 'tagFilter': tags})}#{tab}")


def projector(page: Page) -> FrameLocator:
    """What the projector's tab shows, which is a page in a page in a page."""
    return page.frame_locator("iframe").frame_locator("iframe")


def colour_by_class(page: Page) -> None:
    """Choose `label` under "Color by" in the projector's tab."""
    shown = projector(page)
    choice = shown.locator("#colorby paper-item").filter(has_text="colors").first
    choice.wait_for(state="attached")
    shown.locator("#colorby").click()
    choice.click()


def wait_for_picture(page: Page, width: int, height: int) -> None:
    """Wait until a picture of this size in pixels is loaded and in sight, as TensorBoard serves it."""
    page.wait_for_function(
        """([width, height]) => {
            const walk = (root) => [...root.querySelectorAll('*')].some((element) =>
                (element.tagName === 'IMG' && element.offsetParent
                    && element.naturalWidth === width && element.naturalHeight === height)
                || (element.shadowRoot && walk(element.shadowRoot)));
            return walk(document);
        }""",
        arg=[width, height],
    )


def save(page: Page, path: Path) -> int:
    """Save a picture of the page, in at most 256 colours; the number of those that it has."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    return len(picture.getcolors(256) or ())
