"""What a run imports, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

# What is imported


def test_a_run_imports_neither_dynamo_nor_torchvision_nor_pyplot(tmp_path: Path) -> None:
    overrides = ["dataset=synthetic", "dataset.train_size=64", "dataset.test_size=40", "device=cpu",
                 "train.log_every=4", "train.checkpoint_every=4"]  # fmt: skip
    program = (
        f"import sys; from fmexp import compose, execute; execute(compose({overrides}), {str(tmp_path / 'run')!r});"
        "print([name for name in ('torch._dynamo', 'torchvision', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["failures"] == {}
