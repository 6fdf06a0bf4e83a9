"""Losses: each beside its formula, class weights and smoothing together, and what is refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tools import assert_same_weights, read_events, scalars, small
from torch import Tensor

from fmexp import execute
from fmexp.build import build
from fmexp.engine import loss
from fmexp.errors import ConfigError

K = 5
LOGITS = torch.randn(12, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(K, (12,), generator=torch.Generator().manual_seed(2))
MIXED = torch.rand(12, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64)


def smoothed(labels: Tensor, share: float) -> Tensor:
    """The probabilities that smoothed labels are."""
    wanted = labels if labels.is_floating_point() else F.one_hot(labels, K).double()
    return wanted * (1 - share) + share / K


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "probabilities"])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_cross_entropy_weighs_images_and_smooths_once(labels: Tensor, share: float) -> None:
    each = -(smoothed(labels, share) * LOGITS.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss.cross_entropy(LOGITS, labels, label_smoothing=share), each.mean())
    weights = labels @ WEIGHTS if labels.is_floating_point() else WEIGHTS[labels]
    weighted = loss.cross_entropy(LOGITS, labels, label_smoothing=share, class_weights=WEIGHTS)
    torch.testing.assert_close(weighted, (each * weights).sum() / weights.sum())
    if not share and not labels.is_floating_point():
        torch.testing.assert_close(weighted, F.cross_entropy(LOGITS, labels, WEIGHTS))


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "probabilities"])
def test_focal(labels: Tensor) -> None:
    p = LOGITS.softmax(1)
    each = -(smoothed(labels, 0) * (1 - p) ** 1.5 * p.log()).sum(1)
    torch.testing.assert_close(loss.focal(LOGITS, labels, gamma=1.5), each.mean())
    torch.testing.assert_close(loss.focal(LOGITS, labels, gamma=0.0), loss.cross_entropy(LOGITS, labels))
    weights = labels @ WEIGHTS if labels.is_floating_point() else WEIGHTS[labels]
    weighted = loss.focal(LOGITS, labels, gamma=1.5, class_weights=WEIGHTS)
    torch.testing.assert_close(weighted, (each * weights).sum() / weights.sum())


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["labels", "probabilities"])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_binary(labels: Tensor, share: float) -> None:
    wanted, p = smoothed(labels, share), LOGITS.sigmoid()
    each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
    torch.testing.assert_close(loss.binary(LOGITS, labels, label_smoothing=share), each.mean())


def test_a_batch_in_which_nothing_counts_is_no_divergence() -> None:
    labels = torch.full((4,), 3)
    assert loss.cross_entropy(LOGITS[:4], labels, class_weights=WEIGHTS) == 0


def test_balanced_weights_give_each_class_the_same_share() -> None:
    weights = loss.weights_of_classes("balanced", torch.tensor([0, 0, 0, 1, 2, 2]), 4)
    assert weights.tolist() == pytest.approx([6 / 12, 6 / 4, 6 / 8, 6 / 4])  # as scikit-learn, and 1 image for none


def halved(logits: Tensor, labels: Tensor, *, factor: float) -> Tensor:
    """A loss of one's own."""
    return factor * F.cross_entropy(logits, labels)


def own_loss(folder: Path, content: str) -> tuple[str, str]:
    """The words that choose a loss of one's own."""
    (folder / "loss").mkdir(parents=True)
    (folder / "loss" / "own.yaml").write_text(content)
    return "loss=own", f"hydra.searchpath=[{folder.as_uri()}]"


def test_a_run_is_trained_by_its_loss_and_evaluated_by_cross_entropy(tmp_path: Path) -> None:
    own = own_loss(tmp_path / "conf", "_target_: test_loss.halved\nfactor: 0.5")
    runs = {
        "plain": ("optimizer.lr=0.1",),
        "own": (*own, "optimizer.lr=0.2"),  # half the gradient, twice the rate: a power of two changes no bit
        "weighted": ("optimizer.lr=0.1", f"loss.class_weights={[1] * 10}"),
        "focal": ("optimizer.lr=0.1", "loss=focal"),
    }
    for name, words in runs.items():
        execute(small(*words, "logging=light", "optimizer.momentum=0"), tmp_path / name)
    assert_same_weights(tmp_path / "plain", tmp_path / "own")
    events = {name: read_events(tmp_path / name) for name in runs}
    for (_, plain), (_, half) in zip(*(scalars(events[n], "train/loss") for n in ("plain", "own")), strict=True):
        assert half == pytest.approx(plain / 2, rel=1e-6)
    assert scalars(events["own"], "test/loss") == scalars(events["plain"], "test/loss")
    assert scalars(events["weighted"], "test/loss")[0][1] == pytest.approx(scalars(events["plain"], "test/loss")[0][1])
    assert scalars(events["focal"], "train/loss")[0][1] < 0.9 * scalars(events["plain"], "train/loss")[0][1]
    assert scalars(events["focal"], "test/loss")[0][1] == pytest.approx(2.3, abs=0.1)


def no_scalar(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.class_weights=[1,2]"], r"loss.class_weights=\[1, 2\] must be null, balanced or 10 numbers"),
        (["loss.class_weights=-1"], "loss.class_weights=-1 must be"),
        ([f"loss.class_weights={[-1] * 10}"], "none of them negative"),
        ([f"loss.class_weights={['a'] * 10}"], "must be null, balanced or 10 numbers"),
        (["dataset._target_=reliability_parts.augmented", "loss.class_weights=balanced"], "has no `targets`"),
        (["+loss.x=1"], "Its arguments are label_smoothing, class_weights"),
    ],
)
def test_what_is_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "reliability"))
    with pytest.raises(ConfigError, match=said):
        build(small(*words))


def test_a_loss_that_is_no_scalar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss._target_=test_loss.no_scalar cannot be built: it returns \(2,\)"):
        build(small(*own_loss(tmp_path, "_target_: test_loss.no_scalar")))
