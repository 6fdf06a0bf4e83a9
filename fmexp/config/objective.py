"""What a run may be judged by, and which way is better."""

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


def maximised(objective: str) -> bool:
    """Whether more of a metric is better, such as of val/f1 or test/accuracy/best; any other name is that of a loss."""
    split, _, name = objective.removesuffix("/best").partition("/")
    return split in SPLITS and MORE_IS_BETTER.get(name, False)
