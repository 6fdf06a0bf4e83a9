"""Which epoch's weights are kept, and when a run ends early."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fmexp.engine.selection import Selection


def follow(scores: list[float], **how: object) -> tuple[Selection, list[int]]:
    """After all epochs up to the one that ends the run: the selection, and the epochs whose weights it took."""
    selection = Selection(**{"maximised": True, "keep": True, "patience": None, "min_delta": 0.0, **how})
    model, taken = nn.Linear(1, 1), []
    for epoch, score in enumerate(scores, 1):
        nn.init.constant_(model.weight, epoch)
        selection.after_epoch(score, epoch, {"val/accuracy": score}, model)
        taken.append(int(selection.weights["weight"]) if selection.weights else 0)
        if selection.exhausted:
            break
    return selection, taken


def test_the_first_of_equally_good_epochs_is_kept() -> None:
    selection, taken = follow([0.5, 0.7, 0.6, 0.7])
    assert taken == [1, 2, 2, 2]
    assert selection.best == {"epoch": 2, "score": 0.7, "metrics": {"val/accuracy": 0.7}}


def test_of_a_loss_the_lowest_is_kept() -> None:
    assert follow([0.5, 0.7, 0.4, 0.6], maximised=False)[1] == [1, 1, 3, 3]


def test_a_copy_is_kept() -> None:
    selection, _ = follow([0.9, 0.1])
    assert selection.weights["weight"].item() == 1


def test_last_keeps_nothing() -> None:
    assert follow([0.5, 0.7], keep=False)[0].weights == {}


@pytest.mark.parametrize(
    ("patience", "min_delta", "epochs"),
    [(1, 0.0, 3), (2, 0.0, 7), (3, 0.0, 8), (1, 0.15, 2), (2, 0.15, 3), (None, 0.0, 8)],
)
def test_patience(patience: int | None, min_delta: float, epochs: int) -> None:
    selection, taken = follow([0.5, 0.6, 0.6, 0.7, 0.71, 0.7, 0.7, 0.7], patience=patience, min_delta=min_delta)
    assert len(taken) == epochs
    assert selection.exhausted == (patience is not None)


def test_what_is_no_improvement_for_patience_is_kept_all_the_same() -> None:
    assert follow([0.5, 0.55, 0.58], min_delta=0.1)[1] == [1, 2, 3]


def test_its_state_goes_through_a_file(tmp_path: Path) -> None:
    selection, _ = follow([0.5, 0.7, 0.6], patience=2)
    torch.save(selection.state_dict(), tmp_path / "state.pt")
    other, _ = follow([])
    other.patience = 2
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.after_epoch(0.6, 4, {}, nn.Linear(1, 1))
    assert other.exhausted
    assert (other.best["epoch"], other.weights["weight"].item()) == (2, 2)
