"""Beginning from weights: a run's, PyTorch's or safetensors'; what fits is taken, the rest named, the wrong refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program import call
from safetensors.torch import save_file
from tools import SMALL, assert_same_weights, interrupt, lenet, small, weights
from torch import Tensor, nn

from fmexp import execute
from fmexp.build import build
from fmexp.errors import ConfigError
from fmexp.weights import load

QUIET = ("logging=light", "stage.per_class_accuracy.enabled=false")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of LeNet."""
    folder = tmp_path_factory.mktemp("begun")
    execute(small(*QUIET, "train.max_steps=2", "seed=7"), folder)
    return folder


def test_every_form_of_a_file_gives_the_same_weights(begun: Path, tmp_path: Path) -> None:
    state = weights(begun)
    forms: dict[str, Any] = {
        "plain.pt": state,
        "checkpoint.pth": {"epoch": 3, "model": state},
        "nested.pt": {"state_dict": state},
        "parallel.pt": {f"module.{key}": value for key, value in state.items()},
        "compiled.pt": {f"_orig_mod.module.{key}": value for key, value in state.items()},
        "half.pt": {key: value.half() for key, value in state.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "safe.safetensors")
    for path in (begun, *(tmp_path / name for name in (*forms, "safe.safetensors"))):
        model = lenet(seed=1)
        file = begun / "model.pt" if path == begun else path
        assert load(model, str(path), strict=True) == f"10 of the model's 10 keys fit those of {file}"
        expected = {key: value.half().float() for key, value in state.items()} if path.name == "half.pt" else state
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items()), path


def test_names_that_begin_like_a_wrappers_are_left_as_they_are(tmp_path: Path) -> None:
    model, other = nn.ModuleDict({"module": nn.Linear(2, 3)}), nn.ModuleDict({"module": nn.Linear(2, 3)})
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load(model, str(tmp_path / "w.pt"), strict=True)
    assert torch.equal(model.state_dict()["module.weight"], other.state_dict()["module.weight"])


def test_what_does_not_fit_is_named_and_left_as_it_was(begun: Path, tmp_path: Path) -> None:
    state = {**weights(begun), "fc3.weight": torch.zeros(5, 84), "extra.weight": torch.zeros(2)}
    del state["fc3.bias"]
    torch.save(state, tmp_path / "w.pt")
    said = (
        f"8 of the model's 10 keys fit those of {tmp_path / 'w.pt'}; left as they were: fc3.weight (5x84 there, "
        "10x84 here), fc3.bias (not there, 10 here); not in the model: extra.weight"
    )
    cfg = small(*QUIET, "train.max_steps=1", "optimizer.lr=0", f"weights={tmp_path / 'w.pt'}")
    execute(cfg, tmp_path / "run")
    assert f"weights {said}" in " ".join((tmp_path / "run" / "fmexp.log").read_text().split())
    ended, fresh = weights(tmp_path / "run"), build(small(*QUIET)).model.state_dict()
    for key, value in ended.items():
        assert torch.equal(value, fresh[key] if key.startswith("fc3.") else state[key]), key
    cfg.weights_strict = True
    with pytest.raises(ConfigError) as refused:
        execute(cfg, tmp_path / "strict")
    assert str(refused.value) == f"weights={tmp_path / 'w.pt'}: {said}. weights_strict=false takes what fits."
    assert not (tmp_path / "strict").exists()


def test_a_stopped_run_goes_on_without_the_file_that_it_began_from(begun: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(weights(begun), file)
    cfg = small(*QUIET, f"weights={file}", "train.freeze=[conv1]", "train.checkpoint_every=3")
    execute(cfg, tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "whole")["conv1.weight"], weights(begun)["conv1.weight"])
    interrupt(cfg, tmp_path / "parts", 7)
    file.unlink()
    execute(cfg, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):  # a run that has no checkpoint needs it
        execute(cfg, tmp_path / "late")


class Whole(nn.Linear):
    """Not what weights_only lets through."""


def files(folder: Path) -> dict[str, str]:
    """Weights that cannot be taken, and what is said of each."""
    (folder / "empty").mkdir()
    (folder / "stopped" / ".hydra").mkdir(parents=True)
    (folder / "stopped" / ".hydra" / "config.yaml").touch()
    (folder / "torn.pt").write_bytes(b"PK\3\4 and no more")
    (folder / "torn.safetensors").write_bytes(b"\xff" * 20)
    torch.save(Whole(2, 2), folder / "module.pt")
    torch.save([Tensor([1])], folder / "list.pt")
    other = {"body.weight": torch.zeros(2, 3), "conv1.weight": torch.zeros(1)}
    torch.save(other, folder / "other.pt")
    return {
        "empty": "has no model.pt. Name that of a complete run, or a file.",
        "stopped": "has no trained weights: it was stopped.",
        "torn.pt": "cannot be read: ",
        "torn.safetensors": "cannot be read: ",
        "module.pt": "has to hold tensors alone, as of torch.save(model.state_dict(), file)",
        "list.pt": "holds no state_dict: names with their tensors",
        "other.pt": "0 of the model's 10 keys fit those of",
        "nowhere.pt": "cannot be read: No such file or directory",
    }


def test_weights_that_cannot_be_taken_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name, said in files(tmp_path).items():
        done = call(*SMALL, f"weights={tmp_path / name}", cwd=here)
        assert (done.status, "Traceback" in done.err) == (1, False), name
        assert said in done.err, name
        assert f"weights={tmp_path / name}" in done.err
    assert list(here.iterdir()) == []


def test_a_missing_safetensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match="needs safetensors: pip install safetensors"):
        load(lenet(), str(tmp_path / "w.safetensors"))
