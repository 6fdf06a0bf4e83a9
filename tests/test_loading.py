"""fmexp.load: a run's model from its folder alone, with the probabilities of the run to the bit; what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from program import environment, run
from tools import KEEP, KEPT, SMALL, interrupt, small, weights
from torch import Tensor, nn
from torchvision import transforms

import fmexp
from fmexp import datasets, execute, loading, models
from fmexp.errors import ConfigError, DataError, FmexpError
from fmexp.run import Run

LIGHT = ("logging=light", "stage.per_class_accuracy.enabled=false", KEEP)


def fail(run: Run) -> None:
    raise TypeError("this stage fails")


def as_pictures(data: datasets.Dataset) -> list[Image.Image]:
    arrays = data.test.images.permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]  # a Split
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.numpy().tobytes() == theirs.numpy().tobytes()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of LeNet on 1,100 test images, which are three batches."""
    folder = tmp_path_factory.mktemp("done") / "run"
    execute(small(*LIGHT, "dataset.test_size=1100"), folder)
    return folder


# What it says


def test_every_form_of_the_test_images_has_the_probabilities_of_the_run_to_the_bit(done: Path, tmp_path: Path) -> None:
    evaluation, data = KEPT[str(done)]
    split = data.test
    assert isinstance(split, datasets.Split)
    pictures, paths = as_pictures(data), [tmp_path / f"{index}.png" for index in range(len(split))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    classifier = fmexp.load(done)
    assert (classifier.classes, classifier.model.training) == (list(datasets.GARMENTS), False)
    assert_same_bits(classifier.preprocess(pictures[7]), data.normalise(split.images[7:8])[0])
    for images in (pictures, paths, map(str, paths), split.images, data.normalise(split.images)):
        assert_same_bits(classifier.predict(images), evaluation.probabilities)
    mixed: list[Any] = [pictures[0], str(paths[1]), paths[2]]
    assert torch.equal(classifier.predict(mixed).argmax(1), evaluation.guesses[:3])
    for one in (pictures[0], paths[0], str(paths[0])):
        assert torch.equal(classifier.predict(one), classifier.predict(pictures[:1]))
    for nothing in ([], split.images[:0]):
        assert classifier.predict(nothing).shape == (0, 10)


class Unsure(nn.Module):
    """Draws in eval mode, too, as dropout of Monte Carlo does; and its layer has no shape before it sees an image."""

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(input_shape[0]), nn.LazyLinear(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        shown = self.norm(images)
        return self.linear((shown + 0.1 * torch.randn_like(shown)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=resnet18", "dataset.image_size=32", "train.max_steps=4", "backend.threads=2"),
        ("model=mlp", "model.dropout=0.5", "train.ema=0.9"),
        ("model._target_=test_loading.Unsure",),
        ("model._target_=test_loading.Unsure", "train.ema=0.9", "backend.kernels=native", "train.precision=bf16"),
    ],
    ids=" ".join,
)
def test_other_models_have_the_probabilities_of_the_run_to_the_bit(overrides: tuple[str, ...], tmp_path: Path) -> None:
    execute(small(*LIGHT, "dataset.test_size=510", *overrides), tmp_path / "run")
    evaluation, data = KEPT[str(tmp_path / "run")]
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    classifier = fmexp.load(tmp_path / "run")
    probabilities = classifier.predict(as_pictures(data))
    assert_same_bits(probabilities, evaluation.probabilities)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not any(module.training for module in classifier.model.modules())


def test_arithmetic_is_that_of_the_run_whatever_this_process_has(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    file = tmp_path / "run" / "result.json"
    result = json.loads(file.read_text())
    ours = loading.load(done).backend
    recorded = result["evaluation_backend"]
    assert recorded == {**recorded, "device": ours.device, "threads": ours.threads, "onednn": ours.onednn}
    for change, expected in (
        ({"onednn": not ours.onednn, "channels_last": True}, {"onednn": not ours.onednn, "channels_last": True}),
        ({"threads": 10**6}, {}),
        ({"threads": "many"}, {}),
        ({"device": "NVIDIA A100", "onednn": not ours.onednn}, {}),
    ):
        result["evaluation_backend"] = {**recorded, **change}
        file.write_text(json.dumps(result))
        theirs = loading.load(tmp_path / "run").backend
        assert vars(theirs) == {**vars(ours), **expected}, change


# Pictures


def draw(path: Path, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(array).save(path)
    return array


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of several sizes in two classes, 8 + 6."""
    root = tmp_path / "photos"
    for split, count in (("train", 8), ("test", 6)):
        for number in range(count):
            size = (30 + 7 * number, 40 - number)
            draw(root / split / ("cat", "dog")[number % 2] / f"{number}.png", *size, number + len(split))
    return root


CHAINS = {
    "image_size=16": [transforms.Resize(16), transforms.CenterCrop(16)],
    "image_size=16 dataset.resize=20": [transforms.Resize(20), transforms.CenterCrop(16)],
    "image_size=16 dataset.crop=false dataset.channels=1": [transforms.Grayscale(), transforms.Resize((16, 16))],
}


@pytest.mark.parametrize("keys", CHAINS)
def test_pictures_in_folders_go_their_own_way_when_folder_and_dataset_are_elsewhere(
    keys: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"dataset.root={photos}"
    cfg = fmexp.compose(["dataset=image_folder", root, *f"dataset.{keys}".split(), "model=mlp", "device=cpu",
                         "dataset.cache=memory", "dataset.mean=[0.4]", "dataset.std=[0.2]", "train.epochs=1",
                         *LIGHT])  # fmt: skip
    execute(cfg, tmp_path / "run")
    evaluation, _ = KEPT[str(tmp_path / "run")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "run", elsewhere / "moved")
    shutil.move(photos, elsewhere / "others")
    monkeypatch.chdir(elsewhere)
    classifier = fmexp.load("moved")
    paths = sorted(Path("others", "test").rglob("*.png"))
    assert_same_bits(classifier.predict(paths), evaluation.probabilities)
    assert classifier.classes == ["cat", "dog"]
    chain = transforms.Compose([*CHAINS[keys], transforms.ToTensor(), transforms.Normalize([0.4], [0.2])])
    for path in paths:
        assert torch.equal(classifier.preprocess(Image.open(path)), chain(Image.open(path)))


def test_pictures_of_one_size_are_squeezed_to_it(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png", 20, 24, number)
    cfg = fmexp.compose(["dataset=image_folder", f"dataset.root={tmp_path / 'photos'}", "model=mlp", "device=cpu",
                         "dataset.cache=memory", "train.epochs=1", "logging=light"])  # fmt: skip
    execute(cfg, tmp_path / "run")
    classifier = fmexp.load(tmp_path / "run")
    draw(tmp_path / "large.png", 90, 50, 0)
    chain = transforms.Compose([transforms.Resize((20, 24)), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    assert torch.equal(classifier.open(tmp_path / "large.png"), chain(Image.open(tmp_path / "large.png")))


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L")


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8))
ALPHA = Image.fromarray(np.random.default_rng(1).integers(0, 256, (28, 28), np.uint8))
SIXTEEN = np.random.default_rng(2).integers(0, 2**16, (28, 28), np.uint16)


def transparent() -> Image.Image:
    picture = RGB.copy()
    picture.putalpha(ALPHA)
    return picture


MODES: dict[str, tuple[Image.Image, Image.Image]] = {  # and what each is as RGB
    "L": (grey(RGB), grey(RGB).convert("RGB")),
    "RGB": (RGB, RGB),
    "RGBA": (transparent(), Image.alpha_composite(Image.new("RGBA", (28, 28), "white"), transparent()).convert("RGB")),
    "CMYK": (RGB.convert("CMYK"), RGB.convert("CMYK").convert("RGB")),
    "P": (RGB.quantize(16), RGB.quantize(16).convert("RGB")),
    "1": (RGB.convert("1"), RGB.convert("1").convert("RGB")),
    "I;16": (Image.fromarray(SIXTEEN), Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("RGB")),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_a_picture_becomes_grey(mode: str, done: Path) -> None:
    given, expected = MODES[mode]
    assert given.mode == mode
    image = fmexp.load(done).preprocess(given)
    bytes_of_it = np.array(expected.convert("L"))
    assert torch.equal(image, datasets.Dataset.normalise(KEPT[str(done)][1], torch.from_numpy(bytes_of_it)[None]))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_a_picture_becomes_rgb(mode: str) -> None:
    given, expected = MODES[mode]
    data = datasets.blank({"classes": ["a", "b"], "input_shape": [3, 28, 28], "mean": [0.5], "std": [0.5],
                           "fit": {"crop": False, "resize": None}})  # fmt: skip
    pixels = datasets.pictures.pixels(given, 3, data.input_shape[1:], data.fit)
    assert np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


def test_a_picture_is_turned_as_its_camera_was_held_and_an_animation_is_its_first_frame(
    done: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    grey(RGB).rotate(90).save(tmp_path / "turned.png", exif=exif)
    frames = [grey(RGB), ALPHA]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    classifier = fmexp.load(done)
    for name in ("turned.png", "moving.gif"):
        assert torch.equal(classifier.open(tmp_path / name), classifier.preprocess(grey(RGB))), name


def test_what_is_no_picture_or_has_another_shape_is_refused(done: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    classifier = fmexp.load(done)
    for name, said in (
        ("text.png", "is no picture (JPEG, PNG, WEBP, BMP, GIF)"),
        ("nowhere.png", "No such file or directory"),
        ("pipe.png", "is a folder, a named pipe or a device where a file is needed"),
    ):
        with pytest.raises(DataError) as refused:
            classifier.predict([RGB, tmp_path / name])
        assert str(refused.value).startswith(f"{tmp_path / name} {said}")
    for tensor in (torch.zeros(2, 1, 27, 28), torch.zeros(1, 28, 28), torch.zeros(2, 1, 28, 28, dtype=torch.float64)):
        with pytest.raises(ConfigError, match=r"it takes uint8, or float32 that is normalised, \['N', 1, 28, 28\]"):
            classifier.predict(tensor)


def spectra(**keys: Any) -> datasets.Dataset:
    """A dataset whose images have five channels."""
    images = torch.randint(0, 256, (12, 5, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = datasets.Split(images, torch.arange(12) % 2)
    return datasets.Dataset(split, split, ["low", "high"])


def test_images_that_are_no_pictures_are_given_as_a_tensor(tmp_path: Path) -> None:
    cfg = small(*LIGHT, "dataset._target_=test_loading.spectra", "model=mlp")
    execute(cfg, tmp_path / "run")
    evaluation, data = KEPT[str(tmp_path / "run")]
    assert isinstance(data.test, datasets.Split)
    classifier = fmexp.load(tmp_path / "run")
    assert_same_bits(classifier.predict(data.test.images), evaluation.probabilities)
    for picture in (RGB, tmp_path / "nowhere.png"):
        with pytest.raises(ConfigError, match="have 5 channels, and a picture has 1 or 3"):
            classifier.predict([picture])


# What cannot be loaded


def test_a_run_without_trained_weights_is_refused_with_the_way_out(tmp_path: Path) -> None:
    cfg = small("logging=light", "train.max_steps=4")
    interrupt(cfg, tmp_path / "stopped", 2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "running")
    execute(small("logging=light", "optimizer.lr=1e30"), tmp_path / "diverged")
    execute(cfg, tmp_path / "gone")
    (tmp_path / "gone" / "model.pt").rename(tmp_path / "stopped" / "model.pt")  # as of a shorter run of that folder
    failing = small(*LIGHT, "stage.keep._target_=test_loading.fail", "train.max_steps=4")
    with pytest.raises(TypeError):
        execute(failing, tmp_path / "failed")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("stopped", "it was stopped. The command that began it goes on with hydra.run.dir=<this folder>."),
        ("diverged", "it diverged. Train again in another folder; a smaller optimizer.lr is the usual cure."),
        ("failed", "it failed: TypeError: this stage fails\nIts fmexp.log has more."),
        ("gone", "model.pt is gone. Copy it back, or train again in another folder."),
    ):
        with pytest.raises(FmexpError) as refused:
            fmexp.load(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name} has no trained weights: {said}"), name
    with filelock.FileLock(tmp_path / "running" / ".lock"), pytest.raises(FmexpError, match="is training it"):
        fmexp.load(tmp_path / "running")
    for name in ("empty", "nowhere"):
        with pytest.raises(FmexpError, match=f"{tmp_path / name} holds no run: it "):
            fmexp.load(tmp_path / name)


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / "copy")


class Opens:
    """What a pickle may call when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["TOUCHED"]),)


def harmed(content: bytes) -> Iterator[bytes]:
    middle = len(content) // 2
    yield content[:middle]
    yield b""
    yield b"something else"


def test_damaged_weights_are_refused_and_a_pickle_calls_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy / "model.pt"
    for content in harmed(file.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(FmexpError, match=f"^{file} cannot be read: .*\nIt is damaged, or no file of a run"):
            fmexp.load(copy)
    monkeypatch.setenv("TOUCHED", str(copy / "touched"))
    torch.save(Opens(), file)
    with pytest.raises(FmexpError, match=f"^{file} cannot be read: "):
        fmexp.load(copy)
    assert not (copy / "touched").exists()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FmexpError, match=f"^{file} is no file"):
        fmexp.load(copy)


def test_files_that_do_not_fit_each_other_are_refused(copy: Path) -> None:
    state, said = weights(copy), f"^{copy / 'model.pt'} does not fit the model of .hydra/config.yaml and the classes of"
    for other in ({**state, "fc3.bias": torch.zeros(3)}, {"fc3.bias": torch.zeros(10)}, [1]):
        torch.save(other, copy / "model.pt")
        with pytest.raises(FmexpError, match=said):
            fmexp.load(copy)
    torch.save(state, copy / "model.pt")
    result = json.loads((copy / "result.json").read_text())
    result["dataset"]["classes"].append("Hat")
    (copy / "result.json").write_text(json.dumps(result))
    with pytest.raises(FmexpError, match=rf"{said}(.|\n)*fc3.weight"):
        fmexp.load(copy)


@pytest.mark.parametrize(
    "change",
    [{"classes": "ab"}, {"classes": ["a"]}, {"classes": [1, 2]}, {"input_shape": [28, 28]}, {"input_shape": [1, 0, 28]},
     {"input_shape": [1, 10**6, 10**6]}, {"input_shape": ["1", "28", "28"]}, {"mean": ["a"]}, {"mean": None},
     {"std": [0.0]}, {"std": [0.5, 0.5]}, {"fit": {}}, {"fit": {"crop": 1, "resize": None}},
     {"fit": {"crop": True, "resize": 3}}, {"fit": {"crop": True, "resize": "a"}}, []],
    ids=str,
)  # fmt: skip
def test_a_damaged_result_is_refused(change: Any, copy: Path) -> None:
    file = copy / "result.json"
    result = json.loads(file.read_text())
    result["dataset"] = {**result["dataset"], **change} if change else change
    file.write_text(json.dumps(result))
    with pytest.raises(FmexpError, match=f"^{file} is damaged: its dataset: "):
        fmexp.load(copy)
    del result["dataset"]
    file.write_text(json.dumps(result))
    with pytest.raises(FmexpError, match=f"^{file} does not say what the images were"):
        fmexp.load(copy)


@pytest.mark.parametrize(
    "change",
    [{"seed": "${oc.env:HOME}"}, {"seed": "a"}, {"model": {"_target_": "fmexp.models.MLP", "hidden": "${oc.env:HOME}"}},
     {"model": {}}, {"model": 3}, {"dataset": None}, {"backend": 3}, {"backend": {"threads": 10**6}},
     {"backend": {"kernels": "none"}}, {"backend": {"more": 1}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_configuration_is_refused_and_nothing_in_it_is_resolved(change: dict[str, Any], copy: Path) -> None:
    file = copy / ".hydra" / "config.yaml"
    tree = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(tree, dict)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create({**tree, **change})))
    with pytest.raises(FmexpError, match=f"^{file} is damaged: ") as refused:
        fmexp.load(copy)
    assert os.environ["HOME"] not in str(refused.value).replace(str(file), "")


def test_a_module_of_ones_own_that_is_missing_is_named(copy: Path, tmp_path: Path) -> None:
    file = copy / ".hydra" / "config.yaml"
    file.write_text(file.read_text().replace("fmexp.models.LeNet", "garden.nets.Small"))
    with pytest.raises(ConfigError) as refused:
        fmexp.load(copy)
    said = str(refused.value)
    assert said.startswith("model._target_=garden.nets.Small cannot be imported: ")
    assert "No module named 'garden'" in said
    assert said.endswith("Code of your own must be installed or on PYTHONPATH.")
    (tmp_path / "garden").mkdir()
    (tmp_path / "garden" / "nets.py").write_text("from fmexp.models import LeNet as Small")
    code = f"import fmexp; print(type(fmexp.load({str(copy)!r}).model).__name__)"
    env = environment(*map(Path, environment()["PYTHONPATH"].split(os.pathsep)), tmp_path)
    found = run("-c", code, cwd=tmp_path, command=(sys.executable,), env=env)
    assert (found.status, found.out, found.err) == (0, "LeNet\n", "")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:0", ""])
def test_a_device_that_is_not_there_is_refused(device: str, done: Path) -> None:
    with pytest.raises(ConfigError, match=f"^device={device}"):
        fmexp.load(done, device)


# Pretrained weights


def no_network(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something was downloaded")


@pytest.mark.parametrize("zoo", ["torchvision model.name=squeezenet1_1", "timm model.name=resnet10t"])
def test_pretrained_weights_are_not_downloaded_again(zoo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = small("logging=light", "dataset.image_size=32", *f"model={zoo}".split(), "train.max_steps=1")
    execute(cfg, tmp_path / "run")
    file = tmp_path / "run" / ".hydra" / "config.yaml"
    text = file.read_text()
    assert "pretrained: false" in text
    file.write_text(text.replace("pretrained: false", "pretrained: true"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    classifier = fmexp.load(tmp_path / "run")
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    with pytest.raises((AssertionError, ConfigError), match=r"download|cannot be had"):  # a run itself needs them
        execute(fmexp.compose([*SMALL, f"model={zoo.split()[0]}", zoo.split()[1], "model.pretrained=true",
                               "dataset.image_size=32", "logging=light"]), tmp_path / "another")  # fmt: skip


def test_what_pretraining_means_for_the_architecture_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """GoogLeNet with pretrained weights changes the images' normalisation within itself."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **how: tensor)  # takes seconds
    with models.weights_come_later():
        model: Any = models.torchvision(input_shape=(3, 64, 64), num_classes=3, name="googlenet", pretrained=True)
    assert model.transform_input is True


def test_the_public_face_imports_no_torch_before_it_is_asked(done: Path) -> None:
    code = "import sys, fmexp; print(fmexp.load.__name__ if 'torch' in sys.modules else 'none yet')"
    found = run("-c", code, cwd=done, command=(sys.executable,))
    assert (found.out, found.err) == ("none yet\n", "")
