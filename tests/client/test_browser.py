"""Each tab of TensorBoard shows in a real browser what a run and a sweep wrote; pictures land in screenshots/."""

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from playwright.sync_api import Page, expect
from program import TensorBoard

from fmexp import datasets, sweep

if not browser.chromium():
    pytest.skip("there is no Chromium on the PATH or at $CHROMIUM", allow_module_level=True)

SCREENSHOTS = Path(__file__).resolve().parents[2] / "screenshots"
CLASSES = "Trouser", "Sandal", "Ankle Boot"


@pytest.fixture(scope="session")
def tensorboard(logdir: Path, members: list[sweep.Member]) -> Iterator[TensorBoard]:
    """TensorBoard as a user starts it."""
    with TensorBoard(logdir, fast=True) as running:
        running.wait("tutorial", *(f"sweep/{member.folder.name}" for member in members))
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser.pages() as page:
        yield page


@pytest.fixture(autouse=True)
def picture(request: pytest.FixtureRequest, page: Page) -> Iterator[None]:
    """After each test, whether it failed or not, save what the page shows; an empty page has but a few colours."""
    yield
    name = request.node.name.removeprefix("test_")
    assert browser.save(page, SCREENSHOTS / f"{name}.png") > 16


def test_time_series(page: Page, tensorboard: TensorBoard, members: list[sweep.Member]) -> None:
    browser.open_tab(page, tensorboard.url, "timeseries", tags="^(test/accuracy|train/loss)$")
    for tag in ("test/accuracy", "train/loss"):
        card = page.locator("card-view").filter(has_text=tag).first
        expect(card.locator("line-chart").first).to_be_visible()
    for member in members:
        expect(page.get_by_text(f"sweep/{member.folder.name}").first).to_be_visible()


def test_time_series_opens_on_curves(page: Page, singles: TensorBoard) -> None:
    browser.open_tab(page, singles.url, "timeseries")
    page.locator("line-chart").first.wait_for()
    groups = page.locator("metrics-card-group-toolbar .group-title").all_inner_texts()
    assert groups == ["test", "train", "val", "view", "wall_seconds", "within_class_accuracy"]
    opened = page.locator("card-view").all_inner_texts()  # of the first two groups; TensorBoard opens no more
    names = ["".join(text.partition("Alt")[0].split()) for text in opened]  # as in "Alt + Scroll to Zoom"
    assert names == ["test/accuracy", "test/loss", "train/accuracy", "train/loss", "train/lr"]


def test_learning_comes_after_the_curves_a_group_for_each_figure(page: Page, learnt: TensorBoard) -> None:
    browser.open_tab(page, learnt.url, "timeseries")
    page.locator("line-chart").first.wait_for()
    groups = page.locator("metrics-card-group-toolbar .group-title").all_inner_texts()
    figures = ("grad_histogram", "grad_norm", "histogram", "norm", "update_ratio")
    assert groups == ["test", "train", "val", "wall_seconds", *(f"weights_{figure}" for figure in figures),
                      "within_class_accuracy"]  # fmt: skip
    for figure in ("grad_norm", "norm", "update_ratio"):
        browser.open_tab(page, learnt.url, "timeseries", tags=f"^weights_{figure}/(conv1|fc3)$")
        for layer in ("conv1", "fc3"):
            card = page.locator("card-view").filter(has_text=f"weights_{figure}/{layer}").first
            card.locator("line-chart").first.wait_for()


def test_histograms(page: Page, learnt: TensorBoard) -> None:
    browser.open_tab(page, learnt.url, "timeseries", tags="^weights_(grad_)?histogram/fc3.weight")
    for tag in ("weights_histogram/fc3.weight", "weights_grad_histogram/fc3.weight"):
        card = page.locator("card-view").filter(has_text=tag).first
        card.locator("tb-histogram path").first.wait_for(state="attached")


def test_profile(page: Page, learnt: TensorBoard) -> None:
    browser.open_tab(page, learnt.url, "text")
    page.locator("tf-tag-filterer input").fill("^profile")  # the third tag: TensorBoard opens two by itself
    table = page.get_by_text("training step").first
    table.scroll_into_view_if_needed()
    expect(table).to_be_visible()
    expect(page.get_by_text("Self CPU %").first).to_be_visible()


def test_hparams_of_single_runs_shows_no_classes_at_first(page: Page, singles: TensorBoard) -> None:
    page.set_viewport_size({**browser.SIZE, "width": 2600})  # the table leaves out columns that are out of sight
    browser.open_tab(page, singles.url, "hparams")
    table = page.locator("tf-hparams-table-view")
    places = []
    for name in ("test/accuracy", "test/loss", "train/accuracy", "train/loss", "train/lr"):
        column = table.get_by_text(name, exact=True).first
        column.wait_for(state="attached")
        places.append(column.evaluate("element => element.getBoundingClientRect().x"))
    page.set_viewport_size(browser.SIZE)
    assert places == sorted(set(places))
    assert table.get_by_text("within_class_accuracy").count() == 0  # TensorBoard shows the first five


def test_scalars(page: Page, tensorboard: TensorBoard) -> None:
    browser.open_tab(page, tensorboard.url, "scalars", runs="^tutorial$")
    expect(page.locator("tf-scalar-card").first).to_be_visible()


def test_images(page: Page, tensorboard: TensorBoard) -> None:
    browser.open_tab(page, tensorboard.url, "images", runs="^tutorial$")
    sizes = {"four_fashion_mnist_images": (122, 32), "predictions": (700, 230), "mistakes": (700, 460)}
    for tag, size in (*sizes.items(), ("calibration", (700, 430))):
        page.locator("tf-tag-filterer input").fill(tag)
        browser.wait_for_picture(page, *size)


def test_graph(page: Page, tensorboard: TensorBoard) -> None:
    browser.open_tab(page, tensorboard.url, "graphs", runs="^tutorial$")
    node = page.locator("g.node[data-name='LeNet']").first
    node.wait_for()
    node.dblclick()
    for layer in ("Conv2d[conv1]", "Linear[fc3]"):
        page.locator(f"g.node[data-name='LeNet/{layer}']").first.wait_for()


def test_projector(page: Page, tensorboard: TensorBoard, tutorial_data: datasets.Dataset) -> None:
    browser.open_tab(page, tensorboard.url, "projector")
    shown = browser.projector(page)
    shown.get_by_text("Points: 100").first.wait_for()
    shown.get_by_text("Dimension: 784").first.wait_for()
    browser.colour_by_class(page)
    for name in tutorial_data.classes:  # the legend
        shown.locator("vz-projector-legend").get_by_text(name, exact=True).first.wait_for()


def test_pr_curves(page: Page, tensorboard: TensorBoard, tutorial_data: datasets.Dataset) -> None:
    browser.open_tab(page, tensorboard.url, "pr_curves", runs="^tutorial$")
    page.get_by_text("is at step").first.wait_for()
    for name in CLASSES:
        assert name in tutorial_data.classes
        expect(page.get_by_text(name, exact=True).first).to_be_attached()


def test_hparams(page: Page, tensorboard: TensorBoard, members: list[sweep.Member]) -> None:
    browser.open_tab(page, tensorboard.url, "hparams")
    expect(page.get_by_text("optimizer.lr").first).to_be_visible()
    for member in members:
        expect(page.get_by_text(f"{member.objective:.4f}"[:5]).first).to_be_attached()


def test_text(page: Page, tensorboard: TensorBoard) -> None:
    browser.open_tab(page, tensorboard.url, "text", runs="^tutorial$")
    expect(page.get_by_text("batch_size: 4").first).to_be_visible()
