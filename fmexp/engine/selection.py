"""Which epoch's weights a run keeps, and after which epoch it ends early."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Selection:
    """Follows an objective from epoch to epoch.

    Args:
        maximised: whether more of it is better.
        keep: whether to keep a copy of the weights of the best epoch; the first of equal ones.
        patience: end when the objective has not improved for so many epochs (as in Keras); None: never.
        min_delta: what is not better by more than this is no improvement, and counts for `patience` alone.

    Attributes:
        best: {epoch, score, metrics} of the best epoch, metrics being all values at its end; empty before the first.
        weights: the model's state_dict at the best epoch; empty where none is kept.
        waited: epochs since the last improvement.
    """

    def __init__(self, *, maximised: bool, keep: bool, patience: int | None, min_delta: float) -> None:
        self.sign, self.keep, self.patience, self.min_delta = 1 if maximised else -1, keep, patience, min_delta
        self.best: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        self.reference, self.waited = -math.inf, 0  # the score, signed, that an improvement has to beat

    def after_epoch(self, objective: float, epoch: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Take in an epoch's objective, with the model as it was evaluated."""
        score = self.sign * objective
        if not self.best or score > self.sign * self.best["score"]:
            self.best = {"epoch": epoch, "score": objective, "metrics": dict(metrics)}
            if self.keep:
                state = model.state_dict()
                self.weights = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        if score > self.reference + self.min_delta:
            self.reference, self.waited = score, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("best", "weights", "reference", "waited")
