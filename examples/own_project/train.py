"""The same from Python: trains with three seeds, and prints what their accuracies have in common."""

import statistics
from pathlib import Path

from fmexp import compose, execute, read

HERE = Path(__file__).resolve().parent


def train(seed: int) -> float:
    """Train in runs/seed_<seed> and return the test accuracy; what has been trained there is not trained again."""
    cfg = compose(["experiment=stripes", f"seed={seed}"], config_dir=HERE / "conf")
    folder = HERE / "runs" / f"seed_{seed}"
    execute(cfg, folder)
    return read(folder).metrics["test/accuracy"]


if __name__ == "__main__":
    accuracies = [train(seed) for seed in range(3)]
    print(f"test accuracy {statistics.mean(accuracies):.3f}, spread {statistics.stdev(accuracies):.3f}")
