"""Fixtures of the reliability tests: a driver that starts runs quickly, and the uninterrupted runs to compare with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("reliability_tools")

from reliability_tools import Driver  # noqa: E402


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def other_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A second one, for two processes at once."""
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def truth(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the uninterrupted run of some overrides, executed once; "cli" first: through the command line."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*args: str) -> Path:
        if args not in known:
            known[args] = folder = tmp_path_factory.mktemp("truth") / "run"
            words = [arg for arg in args if arg != "cli"]
            trace = folder.parent / "trace.txt"
            ended = driver.run(*words, f"hydra.run.dir={folder}", trace=trace, cli="cli" in args)
            assert ended.code == 0, ended.output
        return known[args]

    return run
