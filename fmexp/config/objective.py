"""What a run may be judged by, and which way is better."""

from typing import Any

SPLITS = ("train", "val", "test")

# The metrics of a split, <split>/<name>, and whether more of them is better.
MORE_IS_BETTER = {
    "loss": False,
    "accuracy": True,
    "top5": True,
    "f1": True,
    "balanced_accuracy": True,
    "auroc": True,
    "average_precision": True,
    "ece": False,
    "log_loss": False,
}


CURVES = ("loss", "accuracy")


def is_shown(tag: str, objective: str) -> bool:
    """Whether a metric has a curve in TensorBoard and a column in tables.

    Of a split's metrics the loss, the accuracy and the objective have, to be seen first; result.json has all.
    """
    split, _, name = tag.partition("/")
    return tag == objective or split not in SPLITS or name not in MORE_IS_BETTER or name in CURVES


def rung_metric(tree: dict[str, Any]) -> str:
    """What a run of a resolved configuration is compared by before its end: its objective, on the split that is looked
    at while it trains."""
    split = "val" if tree["train"]["validation"] else "test"
    return f"{split}/{str(tree['objective']).partition('/')[2]}"


def maximised(objective: str) -> bool:
    """Whether more of a metric is better, such as of val/f1 or test/accuracy/best; any other name is that of a loss."""
    split, _, name = objective.removesuffix("/best").partition("/")
    return split in SPLITS and MORE_IS_BETTER.get(name, False)
