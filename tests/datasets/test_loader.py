"""The order of the training images and their batches, which depend on nothing hidden."""

import io
import json
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import program
import pytest
import torch
from PIL import Image
from tools import SMALL, assert_same_weights, small, weights
from torch import Tensor, nn

from fmexp import datasets, execute, models, process
from fmexp.datasets import Dataset, Split, Workers, loader
from fmexp.errors import DataError
from fmexp.trainer import Trainer

CPU = torch.device("cpu")

DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Fail if the block draws from, or seeds, a global generator."""
    before = torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(np.random.get_state(legacy=False)), random.getstate()) == before[1:]


def test_batches_in_memory_hold_the_chosen_images_in_their_order() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
    split = Split(images, torch.arange(10))
    dataset = Dataset(split, split, DIGITS)
    indices = torch.tensor([7, 2, 9, 0, 4])
    with untouched_random_state():
        found = list(datasets.batches(dataset, split, indices, 2, device=CPU))
    assert [labels.tolist() for _, labels in found] == [[7, 2], [9, 0], [4]]
    for pixels, labels in found:
        assert torch.equal(pixels, dataset.normalise(images[labels]))


# The order


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_order_is_a_permutation(count: int) -> None:
    order = datasets.order(3, 4, count)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    with untouched_random_state():
        first = datasets.order(3, 4, 1000)
    torch.manual_seed(2)
    datasets.order(9, 9, 10)
    assert torch.equal(datasets.order(3, 4, 1000), first)
    for seed, epoch in ((3, 5), (4, 4), (4, 3)):
        same = int((datasets.order(seed, epoch, 1000) == first).sum())
        assert same < 20  # 1 by chance


# Data that does not fit in memory


class Noisy(torch.utils.data.Dataset[Any]):
    """Images of their own index with fresh noise from every generator that augmentations use."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(1, 3, 4) + float(np.random.normal()) + random.gauss(0, 1)
        return index + noise, index % 10


def noisy_batches(num_workers: int, *, start: int = 0, seed: tuple[int, int] = (5, 1)) -> list[tuple[Tensor, Tensor]]:
    split = Noisy()
    dataset = Dataset(split, split, DIGITS)
    indices = datasets.order(*seed, len(split))[start:]
    with untouched_random_state(), Workers(dataset, num_workers, CPU) as workers:
        return list(datasets.batches(dataset, split, indices, 4, device=CPU, workers=workers, seed=seed))


@pytest.fixture(scope="module")
def noisy() -> list[tuple[Tensor, Tensor]]:
    return noisy_batches(0)


def assert_equal_batches(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (others, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_a_map_style_split_is_loaded_in_order_and_augmented(noisy: list[tuple[Tensor, Tensor]]) -> None:
    assert [tuple(images.shape) for images, _ in noisy] == [(4, 1, 3, 4)] * 5 + [(1, 1, 3, 4)]
    assert {(images.dtype, labels.dtype) for images, labels in noisy} == {(torch.float32, torch.int64)}
    order = datasets.order(5, 1, 21)
    assert torch.cat([labels for _, labels in noisy]).tolist() == (order % 10).tolist()
    noise = torch.cat([images for images, _ in noisy]) - order.float()[:, None, None, None]
    assert len(noise.flatten().unique()) > 200  # of 252: no sample's noise is another's


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # on fewer cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("begun", [0, 3])
def test_map_style_batches_do_not_depend_on_workers_or_on_where_one_begins(
    noisy: list[tuple[Tensor, Tensor]], num_workers: int, begun: int
) -> None:
    torch.manual_seed(num_workers)
    random.seed(num_workers)
    np.random.seed(num_workers)
    assert_equal_batches(noisy_batches(num_workers, start=4 * begun), noisy[begun:])


@pytest.mark.parametrize("seed", [(5, 2), (6, 1)])
def test_augmentation_changes_with_seed_and_epoch(noisy: list[tuple[Tensor, Tensor]], seed: tuple[int, int]) -> None:
    def noise_by_index(batches: list[tuple[Tensor, Tensor]], seed: tuple[int, int]) -> dict[int, list[float]]:
        images, order = torch.cat([images for images, _ in batches]), datasets.order(*seed, 21)
        return {int(index): (image - index).flatten().tolist() for image, index in zip(images, order, strict=True)}

    before, now = noise_by_index(noisy, (5, 1)), noise_by_index(noisy_batches(0, seed=seed), seed)
    assert all(before[index] != now[index] for index in range(21))


class Loaded(torch.utils.data.Dataset[Any]):
    """A split of bytes, given out one normalised image at a time."""

    def __init__(self, dataset: Dataset, split: Split) -> None:
        self.dataset, self.split = dataset, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset.normalise(self.split.images[index][None])[0], int(self.split.labels[index])


def loaded(train_size: int, test_size: int, image_size: int, seed: int) -> Dataset:
    """The drawn garments as map-style splits."""
    data = datasets.synthetic(train_size, test_size, image_size, seed)
    return Dataset(Loaded(data, data.train), Loaded(data, data.test), data.classes)


def test_a_run_on_map_style_data_equals_the_run_in_memory(tmp_path: Path) -> None:
    fast = ("logging=light", "stage.image_grid.enabled=true", "train.epochs=2", "train.max_steps=20")
    own = "dataset._target_=test_loader.loaded"
    runs = {"memory": [], "0": [own, "train.num_workers=0"], "2": [own, "train.num_workers=2"]}
    accuracy = {name: execute(small(*fast, *more), tmp_path / name) for name, more in runs.items()}
    for name in ("0", "2"):
        assert accuracy[name] == accuracy["memory"]
        assert_same_weights(tmp_path / name, tmp_path / "memory")


# The processes that load it


class Trouble(Noisy):
    """Loads in a process of its own until something happens to image 12, or to the process."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        worker = torch.utils.data.get_worker_info()
        if worker and index == 12:
            if self.what == "broken":
                Image.open(io.BytesIO(b"no picture"))
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if worker and worker.id and self.what != "killed":
            threading.Event().wait()  # the other process never gives anything
        return super().__getitem__(index)


def troubled(what: str) -> Dataset:
    """The name is for YAML."""
    return Dataset(Trouble(what), Noisy(), DIGITS)


@pytest.mark.parametrize("what", ["broken", "killed", "left"])
def test_loading_processes_end_whatever_they_do(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "GRACE_S", 0.1)
    before, dataset = multiprocessing.active_children(), troubled(what)
    workers = Workers(dataset, 2, CPU)
    batches = datasets.batches(dataset, dataset.train, torch.tensor([12, 1, 2, 3]), 2, device=CPU, workers=workers)
    if what == "left":
        next(batches)
        assert len(multiprocessing.active_children()) == len(before) + 2
        workers.close()
    else:
        with pytest.raises((DataError, RuntimeError)) as caught, workers:
            list(batches)
        said = str(datasets.killed_worker(caught.value) or caught.value)
        named = {"broken": ["training image 12", "identify"], "killed": ["was killed", "memory", "train.num_workers=0"]}
        assert all(words in said for words in named[what]), said
        assert "Traceback" not in said
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("tight", ["shm", "TMPDIR"])
def test_a_batch_that_cannot_be_handed_over_is_told(
    tight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(parts: Any) -> bytes:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    if tight == "shm":
        monkeypatch.setattr(loader, "ForkingPickler", SimpleNamespace(dumps=full))
    else:  # in which a socket is bound, whose path may have some 100 letters
        monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: f"{tmp_path}/{'x' * 120}")
    monkeypatch.setattr(loader, "SMALL", 0)
    dataset = Dataset(Noisy(), Noisy(), DIGITS)
    match = r"(?s)(No space|AF_UNIX).*/dev/shm.*TMPDIR.*train\.num_workers=0"
    with Workers(dataset, 1, CPU) as workers, pytest.raises(DataError, match=match):
        list(datasets.batches(dataset, dataset.train, torch.arange(4), 2, device=CPU, workers=workers))


def test_workers_live_from_pass_to_pass_and_forget_one_that_was_left(noisy: list[tuple[Tensor, Tensor]]) -> None:
    """Also one of another split, and one that ended in an error."""
    split, before = Noisy(), multiprocessing.active_children()
    dataset, order = Dataset(split, Trouble("broken"), DIGITS), datasets.order(5, 1, 21)
    with Workers(dataset, 2, CPU) as workers:
        next(datasets.batches(dataset, split, order, 4, device=CPU, workers=workers, seed=(5, 0)))
        processes = multiprocessing.active_children()
        with pytest.raises(DataError, match="test image 12"):
            list(datasets.batches(dataset, dataset.test, torch.tensor([12]), 4, device=CPU, workers=workers))
        for _ in range(2):
            found = datasets.batches(dataset, split, order, 4, device=CPU, workers=workers, seed=(5, 1))
            assert_equal_batches(list(found), noisy)
        assert len(processes) == len(before) + 2
        assert multiprocessing.active_children() == processes
    assert multiprocessing.active_children() == before


class Together(Noisy):
    """Gives several images at once, as torch's __getitems__ has it, or as many as it is told."""

    def __init__(self, given: int | None = None) -> None:
        self.given, self.asked = given, 0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        self.asked += 1
        return [self[index] for index in indices][: self.given]


def test_images_are_asked_for_together_where_the_split_has_it(noisy: list[tuple[Tensor, Tensor]]) -> None:
    split, order = Together(), datasets.order(5, 1, 21)
    dataset = Dataset(split, Together(2), DIGITS)
    assert_equal_batches(list(datasets.batches(dataset, split, order, 4, device=CPU, seed=(5, 1))), noisy)
    assert split.asked == len(noisy)
    with pytest.raises(DataError, match="gave 2 of 4 images"):
        list(datasets.batches(dataset, dataset.test, order, 4, device=CPU))
    broken = torch.utils.data.Subset(Trouble("broken"), range(21))
    with Workers(Dataset(broken, broken, DIGITS), 1, CPU) as workers:
        batches = datasets.batches(workers.batches.dataset, broken, torch.arange(21), 21, device=CPU, workers=workers)
        with pytest.raises(DataError, match="training image 12 cannot be read"):
            next(batches)


class Sees(Loaded):
    """Notes in $SEEN which process loads."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (Path(os.environ["SEEN"]) / f"{len(self)}-{os.getpid()}").touch()
        return super().__getitem__(index)


def seen(**arguments: int) -> Dataset:
    """The name is for YAML."""
    made = loaded(**arguments)
    return Dataset(*(Sees(split.dataset, split.split) for split in (made.train, made.test)), made.classes)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_has_the_same_workers_for_all_epochs_and_all_evaluations(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    before = multiprocessing.active_children()
    own = small("dataset._target_=test_loader.seen", "train.num_workers=1", "train.epochs=3", "logging=light")
    if fails:
        monkeypatch.setattr(Trainer, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        execute(own, tmp_path / "run")
    loads = [entry.name.split("-") for entry in (tmp_path / "seen").iterdir()]
    others = {split: {int(pid) for size, pid in loads if size == split} - {os.getpid()} for split in ("64", "40")}
    assert [len(pids) for pids in others.values()] == [2, 1]
    assert others["40"] < others["64"], "whose last batches are evaluated, too"
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize(("cores", "sharers", "count"), [(1, 1, 1), (6, 1, 6), (64, 1, 8), (6, 2, 3), (2, 4, 1)])
def test_by_default_there_are_as_many_workers_as_cores(
    cores: int, sharers: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(process, "sharers", sharers)
    dataset = Dataset(Noisy(), Noisy(), DIGITS)
    assert Workers(dataset, small().train.num_workers, CPU).count == count


def test_large_batches_are_the_same_through_shared_memory(
    noisy: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SMALL", 0)
    assert_equal_batches(noisy_batches(2), noisy)


def test_a_killed_loading_process_ends_the_run_with_words(tmp_path: Path) -> None:
    """In a process of its own, whose end once waited for those that load."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "own.yaml").write_text("_target_: test_loader.troubled\nwhat: killed\n")
    own = (
        "--config-dir",
        str(tmp_path),
        "dataset=own",
        "device=cpu",
        "logging=light",
        "model=mlp",
        "hydra.run.dir=run",
    )
    done = program.run(*own, cwd=tmp_path, env=program.environment(*IMPORTABLE))
    assert done.status == 1
    assert "was killed" in done.err
    assert "train.num_workers=0" in done.err
    assert "Traceback" not in done.out + done.err
    assert "was killed" in json.loads((tmp_path / "run" / "result.json").read_text())["error"]


IMPORTABLE = (program.INSTALLED, Path(__file__).parent, Path(program.__file__).parent)
KINDS = {
    "memory": [],
    "0": ["dataset._target_=test_loader.loaded", "train.num_workers=0"],
    "2": ["dataset._target_=test_loader.loaded", "train.num_workers=2"],
}


@pytest.mark.parametrize(
    ("launcher", "kind"),
    [
        ("joblib", "2"),
        *(pytest.param("joblib", kind, marks=pytest.mark.slow) for kind in ("memory", "0")),
        *(pytest.param("basic", kind, marks=pytest.mark.slow) for kind in KINDS),
        pytest.param(
            "slurm",
            "2",
            marks=[pytest.mark.slow, pytest.mark.skipif(not program.slurm_answers(), reason="no Slurm answers")],
        ),
    ],
)
def test_every_launcher_with_every_kind_of_data(launcher: str, kind: str, tmp_path: Path) -> None:
    fast = ("logging=light", "train.epochs=2", "model=mlp", "model.hidden=[8]")
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = program.run(
        "-m", *SMALL, *fast, *KINDS[kind], f"hydra/launcher={launcher}", *at_once, "seed=1,2", "hydra.sweep.dir=sweep",
        cwd=tmp_path, env=program.environment(*IMPORTABLE),
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    for seed in (1, 2):
        execute(small(*fast, f"seed={seed}"), tmp_path / str(seed))
        assert_same_weights(next((tmp_path / "sweep").glob(f"*seed-{seed}")), tmp_path / str(seed))


LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false")


def test_normalising_a_batch_gives_the_bits_of_normalising_everything() -> None:
    data = datasets.synthetic(64, 10, 28, 0)
    assert isinstance(data.train, datasets.Split)
    everything = data.train.images.float().div(255).sub(0.5).div(0.5)
    order = torch.randperm(64)
    for chosen in order.split(7):
        assert torch.equal(data.take(data.train, chosen)[0], everything[chosen])


@pytest.mark.parametrize("size", [28, 17])  # 17 x 17 pixels end in the midst of 64 bytes
@pytest.mark.parametrize("batch_size", [3, 4, 600])
def test_batches_are_the_same_and_as_aligned_wherever_one_begins(size: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1300, 1, size, size), generator=generator, dtype=torch.uint8)
    data = datasets.Dataset(
        datasets.Split(images, torch.arange(1300)), datasets.Split(images, torch.arange(1300)), "ab"
    )
    order = datasets.order(0, 0, 1300)
    for begin in (0, 5 * batch_size):
        expected = list(order[begin:].split(batch_size))
        made = list(datasets.batches(data, data.train, order[begin:], batch_size, device=torch.device("cpu")))
        assert len(made) == len(expected)
        for (pixels, labels), chosen in zip(made, expected, strict=True):
            assert torch.equal(labels, chosen)
            assert torch.equal(pixels, data.normalise(images[chosen]))
            assert pixels.data_ptr() % 64 == 0
            assert pixels.is_contiguous()
        shared = len(made) - len({pixels.untyped_storage().data_ptr() for pixels, _ in made})
        assert (shared > 0) == (size == 28 and batch_size < 600), "made together"


class Shifts(models.LeNet):
    """Changes its input in place, by something that is trained."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x += self.shift
        return super().forward(x)


def test_a_model_may_change_its_input_in_place(tmp_path: Path) -> None:
    execute(small(*LIGHT, "model._target_=test_loader.Shifts"), tmp_path)
    assert weights(tmp_path)["shift"] != 0
