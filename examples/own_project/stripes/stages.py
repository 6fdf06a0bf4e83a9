"""The stage: a look at the run at one of its moments."""

from fmexp.run import Run


def weight_norm(run: Run, *, tag: str) -> None:
    """Write the length of all weights as one vector."""
    squares = [float(weight.detach().square().sum()) for weight in run.model.parameters()]
    run.scalar(tag, sum(squares) ** 0.5)
