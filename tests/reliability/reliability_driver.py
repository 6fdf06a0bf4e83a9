"""Starts runs quickly: a process that has imported everything once, and forks a new process for each command line.

Each is a process of its own, which ends in the way that it ends. A request is a line of JSON on stdin,
{"args": [...], "output": file, "break": null or the arguments of reliability_breaker.install, "cwd": folder,
"environment": {...}}; the answers are {"pid": ...} and, when it has ended, {"status": as os.waitpid has it}.
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


def main() -> None:
    torch.set_num_threads(1)
    for module in ("fmexp.cli", "fmexp.run", "fmexp.synthetic", "matplotlib.figure", "torchvision.utils",
                   "PIL.PngImagePlugin", "torch.utils.tensorboard", "reliability_parts", "reliability_breaker"):  # fmt: skip
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request, number)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)


def become(request: dict[str, Any], number: int) -> None:
    """Be the process that a command line starts: the same input and output, working folder and exit status.

    Its clock is two seconds further than that of the one before, so that it need not wait for a new second to begin.
    """
    import reliability_breaker

    from fmexp.cli import main as fmexp_main

    status = 1
    now = time.time
    time.time = lambda: now() + 2 * number
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_CREAT)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        logging.getLogger().handlers.clear()
        if request["break"] is not None:
            reliability_breaker.install(**request["break"])
        sys.argv = ["python -m fmexp", *request["args"]]
        fmexp_main()
        status = 0
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
