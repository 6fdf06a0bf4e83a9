"""What the sweeps of these tests name in their configuration: models that fail or can be held up, and a stage."""

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fmexp.run import Run

# A folder: while it has no file `open`, models creep from their sixth batch on; while it has a file `hold-<tag>`, the
# model of that tag stands still.
GATE = "SWEEP_GATE"


class Model(nn.Module):
    """A linear layer.

    Args:
        tag: a name, to tell members apart.
        build_fails, batch_fails: the tags that fail when the model is built, or at its third batch.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        tag: str = "a",
        build_fails: str = "",
        batch_fails: str = "",
    ) -> None:
        super().__init__()
        if tag == build_fails:
            raise ValueError(f"the model {tag} does not want to be built")
        self.layer = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
        self.tag, self.fails, self.batches = tag, tag == batch_fails, 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
            if self.fails and self.batches == 3 and not os.environ.get("SWEEP_MENDED"):
                raise ValueError(f"the model {self.tag} does not want to be trained")
            gate = os.environ.get(GATE)
            if gate and self.batches > 5 and not Path(gate, "open").exists():
                Path(gate, f"{self.tag}.{os.getpid()}").write_text(os.environ.get("RANK", "0"))
                time.sleep(0.5)
                while Path(gate, f"hold-{self.tag}").exists():
                    time.sleep(0.05)
        output: Tensor = self.layer(images.flatten(1))
        return output


def threads(run: Run) -> None:
    """Note with how many threads, and by which process, this member is executed."""
    noted = {"threads": torch.get_num_threads(), "pid": os.getpid(), "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}
    (run.output_dir / "noted.json").write_text(json.dumps(noted))


def fails(run: Run) -> None:
    """A stage that raises."""
    raise ValueError("this stage fails")
