"""Starts runs quickly: a process that has imported everything once, and forks a new process for each command line.

Each is a process of its own, which ends in the way that it ends. A request is a line of JSON on stdin,
{"args": [...], "cli": bool, "output": file, "break": null or the arguments of reliability_breaker.install,
"cwd": folder, "environment": {...}}; the answers are {"pid": ...} and, when it has ended, {"status": as os.waitpid has
it}. Without "cli" the process calls fmexp.execute with a configuration that was composed before, for composing takes
longer than such a run.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
from typing import Any

import torch

import fmexp
from fmexp.errors import FmexpError

IMPORTED = ("fmexp.cli", "fmexp.execution", "fmexp.datasets.garments", "fmexp.stages",
            "matplotlib.figure", "torchvision.utils",
            "PIL.PngImagePlugin", "torch.utils.tensorboard", "reliability_parts", "reliability_breaker")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    composed: dict[tuple[str, ...], Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        words = tuple(arg for arg in request["args"] if not arg.startswith("hydra.run.dir="))
        if not request["cli"] and words not in composed:
            with contextlib.suppress(Exception):  # the process itself will find it
                composed[words] = fmexp.compose(words)
        pid = os.fork()
        if pid == 0:
            become(request, composed.get(words))
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)


def become(request: dict[str, Any], cfg: Any) -> None:
    """Be the process that a command line starts: the same input and output, working folder and exit status.

    Its clock is set forward by as many seconds as the environment's RELIABILITY_CLOCK says.
    """
    import reliability_breaker
    import reliability_parts

    from fmexp.cli import main as fmexp_main
    from fmexp.datasets import image_folder

    status = 1
    now = time.time
    time.time = lambda: now() + int(os.environ.get("RELIABILITY_CLOCK", 0))
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_CREAT)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        logging.getLogger().handlers.clear()
        if "RELIABILITY_LOADS" in os.environ:
            for owner, name in ((reliability_parts.Augmented, "__getitem__"), (image_folder.Pictures, "pixels")):
                setattr(owner, name, reliability_parts.deadly(getattr(owner, name)))
        if request["break"] is not None:
            reliability_breaker.install(**request["break"])
        sys.argv = ["python -m fmexp", *request["args"]]
        if request["cli"]:
            fmexp_main()
        else:
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
            fmexp.execute(
                cfg or fmexp.compose(request["args"]),
                next(arg.partition("=")[2] for arg in request["args"] if arg.startswith("hydra.run.dir=")),
            )
        status = 0
    except FmexpError as error:
        print(error)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
