"""A real TensorBoard server, to be asked over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


class Server:
    """TensorBoard on a folder; `get` asks one of its routes."""

    def __init__(self, logdir: Path, *, fast: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [f"--logdir={logdir}", "--host=127.0.0.1", f"--port={self.port}", "--reload_interval=1"]
        arguments += [
            f"--load_fast={str(fast).lower()}",
            "--samples_per_plugin=images=1000,pr_curves=1000,scalars=1000",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def bytes(self, path: str, **query: Any) -> bytes:
        words = f"?{urllib.parse.urlencode(query)}" if query else ""
        with urllib.request.urlopen(f"{self.url}/data/{path}{words}", timeout=30) as answer:
            return bytes(answer.read())

    def get(self, path: str, **query: Any) -> Any:
        return json.loads(self.bytes(path, **query))

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(f"{self.url}/data/{path}", json.dumps(body).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def wait(self, runs: set[str]) -> None:
        """Wait until it has read these runs."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if runs <= set(self.get("runs")) and runs <= set(self.get("plugin/scalars/tags")):
                    return
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.2)
        raise TimeoutError(f"TensorBoard does not show {runs}")
