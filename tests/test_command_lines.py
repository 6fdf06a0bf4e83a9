"""Command lines that nobody would think of, drawn by a seed: none ends in a traceback, changes what was there or
leaves anything when it is refused.

What would train is replaced, no path that is drawn leads out of a temporary folder, and nothing is ever deleted: a line
that has made something is followed by the next one in a fresh folder.
"""

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from program import call

from fmexp import config, execution
from fmexp.config import conf_dir
from fmexp.config.hydra_versions import VERSION_BASE
from fmexp.rundir import layout

CHUNKS, LINES = (
    20,
    105,
)  # 2,100 lines; the first three chunks are drawn in each run of the tests, the others where slow ones are

NUMBERS = (
    "0", "-1", "1", "2.5", "1e308", "-1e308", "1e-320", str(2**31), str(2**63 - 1), str(2**63), str(10**30), "nan",
    "inf", "-inf", "0x10", "1_000", "007", "1e400",
)  # fmt: skip
WORDS = (
    "a", "auto", "true", "false", "null", "", "???", "None", "'a b'", '"a b"', "''", "it's", "größe", "日本", "a\\,b",
    "\\", "\\\\", "a=b", "a:b", "@", "$", "%", "&x", "*", "!!python/object:os.system", "- a", "{", "}", "[", "]",
    "x" * 3000, "\t", "a\nb", "\x1b[31m", "#", "cpu", "cuda:99", "test/loss", "end", "sgd", "lenet",
    "torch.optim.Nothing", "builtins.len", "\udcff", "$HOME",
)  # fmt: skip
NESTED = (
    "[]", "[1]", "[1,2,3]", "[[1]]", "[null]", "[a,b]", "{}", "{a:1}", "{a:{b:[1]}}", "{1:2}", "{_target_:a}", "[1",
    "{a:1", "[a]{b}", "{a:${seed}}",
)  # fmt: skip
INTERPOLATIONS = (
    "${nothere}", "${seed}", "${optimizer}", "${train.epochs}", "${.lr}", "${..seed}", "${....seed}", "${seed", "${",
    "${}", "$${seed}", "\\${seed}", "'\\${seed}'", "${oc.env:NOT_THERE}", "${oc.env:HOME}", "${oc.env:NOT_THERE,1}",
    "${oc.decode:'[1'}", "${now:%Y}", "${now:%}", "${now:}", "${now}", "${hydra:}", "${hydra:runtime.cwd}",
    "${hydra:nothere}", "${hydra.run.dir}", "${oc.create:{a:1}}", "${fmexp.options:}", "${nothere:1}", "${${seed}}",
    "a${seed}b", "${oc.select:nothere}", "${oc.dict.keys:train}",
)  # fmt: skip
SWEEPS = (
    "1,2", "a,b", "1,", ",", "choice(1,2)", "choice()", "range(1,3)", "range(0,0)", "range(1,1000000,0)", "glob(*)",
    "glob(zzz*)", "interval(0,1)", "interval(1,0)", "tag(a,1,2)", "sort(2,1)", "shuffle(1,2)", "int(1.5)", "int(a)",
    "float(a)", "json_str({a:1})", "extend_list(1)", "nothere(1)", "cast(1)", "choice(1,2", "1,2,[3]",
)  # fmt: skip
PATHS = (
    "mine", "mine/new", "held", "note", "note/below", "new/new", ".", "n" * 300, "'a\\${b}'", "a\0b",
)  # fmt: skip
FLAGS = (
    "--cfg=job", "--cfg=all", "--cfg=hydra", "--cfg=nothere", "--help", "--hydra-help", "--resolve", "--run", "--info",
    "--info=config", "--info=defaults", "--info=defaults-tree", "--info=plugins", "--info=searchpath",
    "--info=nothere", "-c=job", "--package=train", "--package=nothere", "--config-name=nothere",
    "--config-name=config", "--config-dir=nothere", "--config-dir=note", "--config-dir=.", "--config-path=nothere",
    "--experimental-rerun=note", "--experimental-rerun=nothere", "--shell-completion=install=bash", "-x", "--", "-",
    "--lr=1", "--nothere",
)  # fmt: skip
GROUPS = (
    "dataset", "model", "optimizer", "logging", "stage", "experiment", "hydra/launcher", "hydra/sweeper",
    "hydra/job_logging", "hydra/hydra_logging", "hydra/help", "hydra/output", "hydra/env", "schema", "nothere",
)  # fmt: skip
OPTIONS = (
    "lenet", "adam", "synthetic", "light", "predictions", "fast", "optuna", "joblib", "slurm", "basic", "default",
    "none", "disabled", "lenett", "[lenet]", "[1]", "null", "lenet,mlp", "../config", "a/b", "", "*",
)  # fmt: skip


def keys() -> list[str]:
    """All keys of the configuration and of Hydra's own part, and the mappings that hold them."""
    with initialize_config_dir(**VERSION_BASE, config_dir=str(conf_dir()), job_name="fmexp"):
        tree: Any = OmegaConf.to_container(compose("config", return_hydra_config=True))

    def below(node: dict[Any, Any], prefix: str) -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from below(value, f"{prefix}{name}.")

    return sorted(below(tree, ""))


class Lines:
    """Draws command lines by a seed."""

    def __init__(self, seed: int, known: list[str]) -> None:
        self.random = random.Random(seed)
        # With hydra.mode=MULTIRUN a line without --multirun would be a sweep, and not a dry run.
        self.keys = [key for key in known if key != "hydra.mode"]

    def value(self) -> str:
        kinds = (NUMBERS, WORDS, NESTED, INTERPOLATIONS, SWEEPS, PATHS)
        return self.random.choice(self.random.choice(kinds))

    def word(self) -> str:
        draw, kind = self.random, self.random.random()
        if kind < 0.2:
            at = draw.choice(("", "", "", "@", "@_here_", "@a.b", "@_global_", "@a:b"))
            return f"{self._sign()}{draw.choice(GROUPS)}{at}={draw.choice((draw.choice(OPTIONS), self.value()))}"
        if kind < 0.28:
            return f"~{draw.choice((*self.keys, *GROUPS))}" + draw.choice(("", f"={self.value()}"))
        key = draw.choice(self.keys)
        if kind < 0.4:  # misspelt, or one that is not there
            at = draw.randrange(len(key))
            key = draw.choice(
                (key[:at] + key[at + 1 :], f"{key}.new", f"{key}x", key + draw.choice(WORDS), f"{key}[0]")
            )
        elif kind < 0.5:
            key = draw.choice(("hydra.run.dir", "hydra.sweep.dir", "dataset.root", "train.tag", "hydra.output_subdir"))
            return f"{key}={draw.choice(PATHS)}"
        return f"{self._sign()}{key}={self.value()}"

    def _sign(self) -> str:
        return self.random.choice(("", "", "", "", "+", "++"))

    def line(self) -> list[str]:
        draw = self.random
        words = [self.word() for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        kind = draw.random()
        if kind < 0.25:
            return ["--multirun", *words, "sweep.dry_run=true"]
        return [draw.choice(FLAGS), *words] if kind < 0.35 else words


def executed(cfg: DictConfig, output_dir: Path, **others: Any) -> float:
    """What replaces `execute`: all that it does before it needs torch."""
    config.check(cfg)
    tree = config.resolved(cfg)
    layout.check_identity(output_dir, tree, resume=cfg.resume)
    OmegaConf.to_yaml(OmegaConf.create(tree)).encode()
    for node in others["hydra_files"].values():
        OmegaConf.to_yaml(node).encode()
    config.digest(tree)
    config.hparams(tree)
    return 0.5


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with what a file holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a person's own folders and files, and with another run."""
    folder = tmp_path / "template"
    (folder / "mine").mkdir(parents=True)
    (folder / "note").write_text("mine")
    (folder / "held" / ".hydra").mkdir(parents=True)
    (folder / "held" / ".hydra" / "config.yaml").write_text("seed: 7\n")
    monkeypatch.setattr(execution, "execute", executed)
    monkeypatch.delenv("NOT_THERE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture(scope="module")
def known() -> list[str]:
    return keys()


@pytest.mark.parametrize(
    "chunk", [chunk if chunk < 3 else pytest.param(chunk, marks=pytest.mark.nightly) for chunk in range(CHUNKS)]
)
def test_no_command_line_ends_in_a_traceback_or_leaves_a_file(chunk: int, known: list[str], template: Path) -> None:
    own, environment, faults = contents(template), dict(os.environ), []
    here = template
    for number, words in enumerate(itertools.islice(iter(Lines(chunk, known).line, None), LINES)):
        if contents(here) != own or here is template:
            here = shutil.copytree(template, template.parent / str(number))
        try:
            done = call(*words, cwd=here)
        except Exception as error:  # what the program would have shown as a traceback
            faults.append((words, repr(error)))
            continue
        said, now = done.out + done.err, contents(here)
        if "Traceback" in said or done.status not in (0, 1, 2) or (done.status and not said.strip()):
            faults.append((words, f"status {done.status}: {said[-500:]}"))
        if done.status and now.keys() != own.keys():
            faults.append((words, f"status {done.status}, and it left {sorted(now.keys() - own.keys())}"))
        if {path: content for path, content in now.items() if path in own} != own:
            faults.append((words, "a file that was there is another, or gone"))
        if dict(os.environ) != environment:
            faults.append((words, "the environment is another"))
    assert not faults, "\n".join(f"{' '.join(map(repr, words))}\n  {what}" for words, what in faults)
