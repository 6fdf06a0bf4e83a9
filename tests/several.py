"""Runs of several processes: started by torchrun, as a person does."""

import json
import sys
from pathlib import Path

from program import CHECKOUT, INSTALLED, STAGES, Finished, environment, run

PARTS = CHECKOUT / "tests" / "engine"
# 9 batches an epoch, the last of which is one image.
DRAWN = ("dataset=synthetic", "dataset.train_size=65", "dataset.test_size=40", "dataset.image_size=16", "device=cpu",
         "train.batch_size=8", "train.log_every=4", "train.validation=0", "objective=test/accuracy",
         *(f"stage.{stage}.enabled=false" for stage in STAGES))  # fmt: skip


def torchrun(*words: str, cwd: Path, processes: int = 2, **environ: str) -> Finished:
    """Start a program, `-m fmexp ...` or a file with its arguments, in several processes of one thread; to its end."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    env = environment(INSTALLED, CHECKOUT / "tests", PARTS, OMP_NUM_THREADS="1", TQDM_DISABLE="1", **environ)
    return run(*words, cwd=cwd, command=command, env=env)


def fmexp(*overrides: str, cwd: Path, processes: int = 2, **environ: str) -> Finished:
    """The command line of fmexp in several processes."""
    return torchrun("-m", "fmexp", *overrides, cwd=cwd, processes=processes, **environ)


def execute_all(
    cases: dict[str, list[str]], folder: Path, processes: int = 2, pauses: tuple[int, ...] = (), **environ: str
) -> Finished:
    """Execute runs, by their name overrides, one after another in folders of these names, by one start of torchrun."""
    runs = folder / f"{processes}.json"
    content = [[[*DRAWN, *overrides], str(folder / name), pauses] for name, overrides in cases.items()]
    runs.write_text(json.dumps(content))
    return torchrun(str(PARTS / "distributed_parts.py"), str(runs), cwd=folder, processes=processes, **environ)
