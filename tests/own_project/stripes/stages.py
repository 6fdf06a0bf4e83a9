"""Stages of one's own: one writes how large the weights are, one fails when it is told to."""

from fmexp.run import Run


def weight_norm(run: Run, *, tag: str) -> None:
    """Write the length of all weights as one vector."""
    run.scalar(tag, sum(float(weight.detach().square().sum()) for weight in run.model.parameters()) ** 0.5)


def faulty(run: Run, *, complaint: str | None) -> None:
    """Raise a ValueError with the complaint, if there is one."""
    if complaint is not None:
        raise ValueError(complaint)
