"""Tests fmexp.datasets.download against a real HTTP server on this machine, real processes and damaged files."""

import errno
import gzip
import hashlib
import http.server
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from program import CHECKOUT

from fmexp.datasets.download import Remote, fetch, open_checked, read_idx
from fmexp.errors import DataError

HINT = "Use dataset=synthetic instead."
GATE_S = 60  # bounds a broken test only; no passing test waits for it

CHILD = """
import logging, signal, sys
from pathlib import Path
from fmexp.datasets.download import Remote, fetch
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
folder, mirror, *pairs = sys.argv[1:]
fetch([Remote(*pair.split("=")) for pair in pairs], Path(folder), [mirror], download=True, hint="")
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
IDX = idx(ARRAY)
PACKED = gzip.compress(IDX, mtime=0)
SMALL = Remote("small.gz", sha256(PACKED))

# Several chunks long, and not to be compressed away.
BIG_BODY = gzip.compress(np.random.default_rng(0).bytes(300_000), mtime=0)
BIG = Remote("big.gz", sha256(BIG_BODY), len(BIG_BODY))
BODIES = {SMALL: PACKED, BIG: BIG_BODY}


@dataclass
class Answer:
    """What the server sends for a path; `claimed` is a Content-Length other than the true one."""

    body: bytes
    claimed: int | None = None


class Server(http.server.ThreadingHTTPServer):
    """Serves `answers`, keeps the paths asked for, and sends second halves of bodies only while `gate` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.halfway = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def serve_all(self, mirror: str) -> str:
        """Serve every file rightly below /mirror, whose url is returned."""
        for file, body in BODIES.items():
            self.answers[f"/{mirror}/{file.name}"] = Answer(body)
        return f"{self.url}/{mirror}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path)
        if answer is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer.body) if answer.claimed is None else answer.claimed))
        self.end_headers()
        half = len(answer.body) // 2
        try:
            self.wfile.write(answer.body[:half])
            self.server.halfway.set()
            self.server.gate.wait(GATE_S)
            self.wfile.write(answer.body[half:])
        except ConnectionError:
            pass  # the client was killed, as some tests do

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "fashion"


def held(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in the folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def start(folder: Path, mirror: str, files: list[Remote]) -> subprocess.Popen[str]:
    """Start a process that fetches, and return once it has found files missing and is about to take the lock."""
    pairs = [f"{file.name}={file.sha256}" for file in files]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), mirror, *pairs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("downloading"), process.communicate()
    return process


def test_downloads_each_file_once(server: Server, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mirror = server.serve_all("one")
    fetch([SMALL, BIG], folder, [mirror + "/", server.url + "/never"], download=True, hint=HINT)
    assert held(folder) == {SMALL.name: PACKED, BIG.name: BIG_BODY}
    assert Counter(server.requests) == {"/one/small.gz": 1, "/one/big.gz": 1}
    assert capfd.readouterr().err == ""  # no bar where nobody looks

    fetch([SMALL, BIG], folder, [mirror], download=True, hint=HINT)
    assert len(server.requests) == 2


def test_downloads_only_what_is_missing(server: Server, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "small").write_bytes(b"not looked at")
    fetch([SMALL, BIG], folder, [server.serve_all("one")], download=True, hint=HINT)
    assert server.requests == ["/one/big.gz"]
    assert held(folder) == {"small": b"not looked at", BIG.name: BIG_BODY}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "404"),
        (Answer(BIG_BODY[:-1], len(BIG_BODY)), f"truncated: expected {len(BIG_BODY)} bytes, found {len(BIG_BODY) - 1}"),
        (Answer(BIG_BODY[:99_999], len(BIG_BODY)), f"truncated: expected {len(BIG_BODY)} bytes, found 99999"),
        (Answer(BIG_BODY[:-1]), f"wrong checksum: expected sha256 {BIG.sha256}, found sha256 "),
        (Answer(BIG_BODY + b"x"), f"too long: expected {len(BIG_BODY):,} bytes"),
        (Answer(b"<html>Please log in</html>"), "wrong checksum"),
        (Answer(b""), "wrong checksum"),
    ],
    ids=["missing", "one byte short", "cut in the middle", "wrong bytes", "too long", "another page", "empty"],
)
def test_next_mirror_is_tried(
    server: Server, folder: Path, caplog: pytest.LogCaptureFixture, bad: Answer | None, reason: str
) -> None:
    if bad is not None:
        server.answers["/bad/big.gz"] = bad
    fetch([BIG], folder, [f"{server.url}/bad", server.serve_all("good")], download=True, hint=HINT)
    assert held(folder) == {BIG.name: BIG_BODY}
    assert server.requests == ["/bad/big.gz", "/good/big.gz"]
    (warning,) = [record for record in caplog.records if record.name == "fmexp.datasets.download"]
    assert warning.levelno == logging.WARNING
    assert f"{server.url}/bad/big.gz" in warning.getMessage()
    assert reason in warning.getMessage()


def test_mirrors_that_do_not_answer(server: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # keeps the port from others, and refuses connections
        refusing = f"http://127.0.0.1:{silent.getsockname()[1]}"
        mirrors = [refusing, "no url", f"{server.url}/a space", server.serve_all("good")]
        fetch([SMALL], folder, mirrors, download=True, hint=HINT)
    assert held(folder) == {SMALL.name: PACKED}
    assert server.requests == ["/good/small.gz"]
    assert len(caplog.records) == 3
    assert "refused" in caplog.messages[0]


def test_all_mirrors_fail(server: Server, folder: Path) -> None:
    server.answers["/wrong/big.gz"] = Answer(b"other")
    server.answers["/short/big.gz"] = Answer(BIG_BODY[:-5], len(BIG_BODY))
    mirrors = [f"{server.url}/{name}" for name in ("wrong", "short", "gone")]
    with pytest.raises(DataError) as caught:
        fetch([BIG], folder, mirrors, download=True, hint=HINT)
    message = str(caught.value)
    for part in [str(folder), BIG.name, HINT, *mirrors, "wrong checksum", "truncated", "404"]:
        assert part in message
    assert held(folder) == {}


def test_no_mirrors(folder: Path) -> None:
    with pytest.raises(DataError, match="no mirrors"):
        fetch([BIG], folder, [], download=True, hint=HINT)
    assert held(folder) == {}


def test_no_download_uses_no_network(server: Server, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch([SMALL, BIG], folder, [server.serve_all("one")], download=False, hint=HINT)
    for part in [str(folder), SMALL.name, BIG.name, HINT]:
        assert part in str(caught.value)
    assert server.requests == []
    assert not folder.parent.exists()


def test_two_processes_download_once(server: Server, folder: Path) -> None:
    server.gate.clear()  # no download ends before both processes have found the folder empty
    mirror = server.serve_all("one")
    with start(folder, mirror, [SMALL, BIG]) as one, start(folder, mirror, [SMALL, BIG]) as two:
        server.gate.set()
        for process in (one, two):
            output = process.communicate()
            assert process.returncode == 0, output
    assert Counter(server.requests) == {"/one/small.gz": 1, "/one/big.gz": 1}
    assert held(folder) == {SMALL.name: PACKED, BIG.name: BIG_BODY}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ended_in_the_middle(server: Server, folder: Path, end: signal.Signals) -> None:
    server.gate.clear()
    mirror = server.serve_all("one")
    with start(folder, mirror, [BIG]) as process:
        assert server.halfway.wait(GATE_S)
        process.send_signal(end)
        process.communicate()
        assert process.returncode != 0
    if end == signal.SIGINT:
        assert held(folder) == {}
    else:
        assert list(held(folder)) != [], "the test is to leave a temporary file"
        with pytest.raises(DataError):
            open_checked(folder, BIG)
    server.gate.set()
    fetch([BIG], folder, [mirror], download=True, hint=HINT)
    assert held(folder) == {BIG.name: BIG_BODY}


def test_folder_with_all_files_is_not_written_to(server: Server, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "small").write_bytes(IDX)
    (folder / BIG.name).write_bytes(BIG_BODY)
    paths = [folder / "small", folder / BIG.name, folder]
    for path in paths:
        path.chmod(0o555)  # does not stop root, hence the old times: any write would change them
        os.utime(path, ns=(1, 1))
    for download in (True, False):
        fetch([SMALL, BIG], folder, [server.serve_all("one")], download=download, hint=HINT)
    assert [path.stat().st_mtime_ns for path in paths] == [1, 1, 1]
    assert held(folder) == {"small": IDX, BIG.name: BIG_BODY}
    assert not (folder / ".lock").exists()
    assert server.requests == []
    folder.chmod(0o755)


def test_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "data"
    with pytest.raises(DataError, match="Not a directory") as caught:
        fetch([SMALL], folder, [server.serve_all("one")], download=True, hint=HINT)
    assert str(folder) in str(caught.value)
    assert HINT in str(caught.value)
    assert server.requests == []


def test_full_disk_is_not_blamed_on_the_mirror(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    mirror = server.serve_all("one")
    with pytest.raises(DataError, match="No space left") as caught:
        fetch([SMALL], folder, [mirror, mirror], download=True, hint=HINT)
    assert str(folder) in str(caught.value)
    assert server.requests == ["/one/small.gz"]
    assert held(folder) == {}


@pytest.mark.parametrize("names", [{"small.gz"}, {"small"}, {"small", "small.gz"}])
def test_reads_packed_and_unpacked(tmp_path: Path, names: set[str]) -> None:
    # The packed file is damaged where both stand: it is not to be looked at.
    contents = {"small": IDX, "small.gz": PACKED if names == {"small.gz"} else b"damaged"}
    for name in names:
        (tmp_path / name).write_bytes(contents[name])
    assert open_checked(tmp_path, SMALL) == IDX
    array = read_idx(tmp_path, SMALL)
    assert array.dtype == np.uint8
    assert array.flags.writeable
    assert array.flags.owndata
    np.testing.assert_array_equal(array, ARRAY)


def test_file_that_is_never_packed_is_checked(tmp_path: Path) -> None:
    (tmp_path / "plain.bin").write_bytes(b"right")
    assert open_checked(tmp_path, Remote("plain.bin", sha256(b"right"))) == b"right"
    with pytest.raises(DataError, match=sha256(b"other")):
        open_checked(tmp_path, Remote("plain.bin", sha256(b"other")))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_idx(tmp_path, SMALL)
    (tmp_path / "small.gz").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read_idx(tmp_path, SMALL)


def refused(path: Path, file: Remote, *parts: str) -> None:
    """Assert that reading fails with the path, the parts and the cure."""
    with pytest.raises(DataError) as caught:
        read_idx(path.parent, file)
    for part in [str(path), *parts, "expected", "found", "Delete it and run again"]:
        assert part in str(caught.value)


def test_wrong_checksum_on_disk(tmp_path: Path) -> None:
    path = tmp_path / SMALL.name
    path.write_bytes(PACKED + b"\x00")
    refused(path, SMALL, SMALL.sha256, sha256(PACKED + b"\x00"))


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        PACKED[:-1],
        PACKED[:15],
        PACKED[:5],
        PACKED[:10] + b"\xff" + PACKED[11:],
        PACKED[:-6] + b"!" + PACKED[-5:],
        PACKED + b"more",
        b"",
    ],
    ids=["no gzip", "no end", "half", "half a header", "wrong block", "wrong crc", "more", "empty"],
)
def test_corrupt_gzip_with_the_right_checksum(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "small.gz"
    path.write_bytes(content)
    refused(path, Remote("small.gz", sha256(content)))


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        (b"", "00 00 08", "nothing"),
        (IDX[:3], "00 00 08", "00 00 08"),
        (b"\x89PNG" + IDX, "00 00 08", "89 50 4e 47"),
        (b"\x00\x00\x0d" + IDX[3:], "00 00 08", "00 00 0d 03"),
        (b"\x00\x00\x08\x00" + b"a", "1 to 8 dimensions", "found 0"),
        (b"\x00\x00\x08\xff" + bytes(4 * 255), "1 to 8 dimensions", "found 255"),
        (IDX[:15], "16 bytes", "15 bytes"),
        (IDX[:16], "40 bytes", "16 bytes"),
        (IDX[:-1], "40 bytes", "39 bytes"),
        (IDX + b"\x00", "40 bytes", "41 bytes"),
        (IDX[:4] + b"\xff" * 12 + IDX[16:], "4294967295", "40 bytes"),
        (IDX[:4] + struct.pack(">3I", 0, 2**32 - 1, 2**32 - 1), "dimensions of 1 or more", "16 bytes"),
    ],
    ids=[
        "empty",
        "half a magic number",
        "another format",
        "floats",
        "no dimensions",
        "255 dimensions",
        "half a header",
        "no data",
        "a byte short",
        "a byte long",
        "huge",
        "huge and zero",
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, expected: str, found: str) -> None:
    (tmp_path / "small").write_bytes(content)
    refused(tmp_path / "small", SMALL, expected, found)

    (tmp_path / "small").unlink()
    packed = gzip.compress(content)
    (tmp_path / "small.gz").write_bytes(packed)
    refused(tmp_path / "small.gz", Remote("small.gz", sha256(packed)), expected, found)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for all examples of the generated tests: each writes every file that it reads."""
    return tmp_path_factory.mktemp("shared")


@dataclass
class Mutation:
    """One damage: a byte changed, the end cut off, or bytes put behind."""

    kind: str
    position: int
    change: int
    more: bytes

    def apply(self, content: bytes) -> bytes:
        position = self.position % max(len(content), 1)
        if self.kind == "extend":
            return content + self.more
        if self.kind == "truncate" or not content:
            return content[:position]
        return content[:position] + bytes([content[position] ^ self.change]) + content[position + 1 :]


mutations = st.builds(
    Mutation,
    kind=st.sampled_from(["flip", "truncate", "extend"]),
    position=st.integers(0, 200),
    change=st.integers(1, 255),
    more=st.binary(min_size=1, max_size=20),
)


def read(path: Path, content: bytes, file: Remote) -> NDArray[np.uint8] | None:
    """Return the array read from `content` at `path`, or None for the only error allowed."""
    path.write_bytes(content)
    try:
        array = read_idx(path.parent, file)
    except DataError as error:
        message = str(error)
    else:
        assert array.dtype == np.uint8
        return array
    assert str(path) in message
    return None


@settings(deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=8, min_side=1, max_side=3)))
def test_any_array_is_read_back(shared: Path, array: NDArray[np.uint8]) -> None:
    found = read(shared / "any", idx(array), Remote("any.gz", ""))
    assert found is not None
    np.testing.assert_array_equal(found, array)


@settings(deadline=None, max_examples=500)
@given(st.lists(mutations, max_size=4), st.booleans())
def test_damaged_gzip_is_refused_or_harmless(shared: Path, damage: list[Mutation], checksum_follows: bool) -> None:
    content = PACKED
    for mutation in damage:
        content = mutation.apply(content)
    # With a checksum that follows the damage, it is gzip and IDX alone that must notice.
    found = read(
        shared / "packed.gz", content, Remote("packed.gz", sha256(content) if checksum_follows else SMALL.sha256)
    )
    if not checksum_follows:
        assert (found is not None) == (content == PACKED)
    if found is not None:
        np.testing.assert_array_equal(found, ARRAY)


@settings(deadline=None, max_examples=500)
@given(mutations)
def test_damaged_idx_is_refused_or_keeps_its_shape(shared: Path, mutation: Mutation) -> None:
    content = mutation.apply(IDX)
    found = read(shared / "unpacked", content, Remote("unpacked.gz", ""))
    header = len(IDX) - ARRAY.size
    # Without a checksum a changed pixel cannot be seen.
    if len(content) == len(IDX) and content[:header] == IDX[:header]:
        assert found is not None
        assert found.shape == ARRAY.shape
        assert found.tobytes() == content[header:]
    else:
        assert found is None


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.integers(0, 4) | st.integers(0, 2**32 - 1), max_size=12),
    st.integers(0, 255) | st.none(),
    st.binary(max_size=30),
)
def test_any_header_is_refused_or_obeyed(shared: Path, shape: list[int], count: int | None, data: bytes) -> None:
    claimed = len(shape) if count is None else count
    content = struct.pack(f">HBB{len(shape)}I", 0, 8, claimed, *shape) + data
    found = read(shared / "header", content, Remote("header.gz", ""))
    if found is not None:
        assert found.ndim == claimed
        assert 4 + 4 * claimed + math.prod(found.shape) == len(content)
        assert found.tobytes() == content[4 + 4 * claimed :]
