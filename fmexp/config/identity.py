"""What makes two configurations the same run: their plain form, digest and difference."""

import copy
import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Keys that do not change what a run computes or writes, so that a run may be resumed with others; see `left_out`.
# The device is not in the digest either: a resume on another one goes on with a warning, for the bits may differ.
NOT_IN_DIGEST = (
    "resume", "tags", "note", "weights_strict", "device", "train.num_workers", "train.checkpoint_every",
    "train.keep_checkpoint",
    "logging.max_queue", "logging.flush_secs",
    "dataset.root", "dataset.download", "dataset.mirrors", "dataset.cache", "dataset.cache_dir",
    "sweep.fail_fast", "sweep.dry_run",
)  # fmt: skip
OWN = "not_in_digest"  # the key in which a dataset of one's own lists those of its keys that do not decide the data


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists, strings and numbers, every interpolation resolved."""
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def frozen(cfg: DictConfig) -> DictConfig:
    """A copy with every interpolation resolved, for another process: there ${now:} is another time."""
    copied = copy.deepcopy(cfg)
    OmegaConf.resolve(copied)
    return copied


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a dot within a name becomes \\. so that no two trees give the same."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + str(name).replace("\\", r"\\").replace(".", r"\.")
        if isinstance(value, dict) and value:
            items.update(flat(value, f"{key}."))
        else:
            items[key] = value
    return items


def left_out(tree: dict[str, Any]) -> set[str]:
    """The flat keys of a resolved configuration that are not part of its identity.

    Of a dataset of fmexp's these are in NOT_IN_DIGEST, and its root where it has mirrors: such files have checksums.
    Of one's own every key counts but those that its `not_in_digest` lists.
    """
    dataset = tree.get("dataset")
    if not isinstance(dataset, dict):  # of a damaged file
        return set(NOT_IN_DIGEST)
    if not str(dataset.get("_target_")).startswith("fmexp.datasets."):
        others = {key for key in NOT_IN_DIGEST if not key.startswith("dataset.")}
        return others | {f"dataset.{key}" for key in (OWN, *(dataset.get(OWN) or ()))}
    return {key for key in NOT_IN_DIGEST if key != "dataset.root" or "mirrors" in dataset}


def identity(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of a resolved configuration that decide what a run computes and writes."""
    out = left_out(tree)
    return {key: value for key, value in sorted(flat(tree).items()) if key not in out}


def digest(tree: dict[str, Any]) -> str:
    """SHA-256 of a resolved configuration's identity: equal for two configurations that give the same run."""
    return hashlib.sha256(json.dumps(identity(tree), sort_keys=True).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two resolved configurations are not the same run, as "key: old value, now new value"."""
    before, after = identity(old), identity(new)
    return [
        f"{key}: {before.get(key, 'not there')}, now {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if _text(before, key) != _text(after, key)
    ]


def is_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether `new` is the run of `old` with more train.epochs, and differs in nothing else."""
    before, after = identity(old), identity(new)
    epochs, more = before.pop("train.epochs", None), after.pop("train.epochs", None)
    longer = isinstance(epochs, int) and isinstance(more, int) and epochs < more
    return longer and json.dumps(before) == json.dumps(after)


def _text(items: dict[str, Any], key: str) -> str | None:
    """What the digest sees of a value: 1 is not true there, and NaN is NaN."""
    return json.dumps(items[key], sort_keys=True) if key in items else None


def hparams(tree: dict[str, Any]) -> dict[str, bool | float | str]:
    """A run's row in HPARAMS: what was chosen of each group, and the settings of what is trained and how."""
    values = {group: tree[group]["_target_"].rpartition(".")[2] for group in GROUPS if group in tree}
    for key, value in identity(tree).items():
        if key.startswith("backend.") and value == "auto":
            continue  # only what was chosen deserves a column
        unset = value is None or (value == [] and not key.startswith("model."))
        if key.startswith(_HPARAMS) and not key.endswith("_target_") and not unset:
            values[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return values


GROUPS = ("dataset", "augment", "model", "loss", "optimizer", "schedule")
_HPARAMS = (
    "seed", "weights", *(f"{group}." for group in GROUPS), "backend.", "train.epochs", "train.batch_size",
    "train.max_steps", "train.precision", "train.clip_grad", "train.accumulate", "train.ema", "train.freeze",
    "train.validation", "train.patience",
)  # fmt: skip
