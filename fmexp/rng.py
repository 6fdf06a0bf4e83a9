"""Random numbers that depend on what they are for, and a random state that can be kept and given back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import get_bit_generator, set_bit_generator  # type: ignore[attr-defined]  # its stubs lack them


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from the run's seed and what it is for, such as derive_seed(seed, "order", epoch)."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    """Seed torch (all devices), Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_state() -> dict[str, Any]:
    """Every global random state, as types that torch.load reads with weights_only=True."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": numpy,
    }


def set_state(state: dict[str, Any]) -> None:
    """Give back what `get_state` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() >= len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})


@contextmanager
def fork(seed: int) -> Iterator[None]:
    """Seed everything for the block, and give the random state back after it."""
    state = get_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_state(state)


_spare = np.random.MT19937()  # NumPy draws from it for a while: to copy the state of its own takes 70 us


@contextmanager
def fork_cpu(seed: int) -> Iterator[None]:
    """As `fork`, without the generators of devices and in a tenth of the time (30 us); not within itself."""
    state = torch.get_rng_state(), random.getstate(), get_bit_generator()
    set_bit_generator(_spare)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        set_bit_generator(state[2])
