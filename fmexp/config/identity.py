"""What makes two configurations the same run: their plain form, digest and difference."""

import hashlib
import json
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

# Keys that do not change what a run computes or writes, so that a run may be resumed with others.
# The device is not in the digest either: a resume on another one goes on with a warning, for the bits may differ.
NOT_IN_DIGEST = ("resume", "device", "train.num_workers", "train.checkpoint_every", "logging.max_queue",
                 "logging.flush_secs", "dataset.root", "dataset.download", "dataset.mirrors",
    "dataset.cache", "dataset.cache_dir",
    "sweep.fail_fast",
    "sweep.dry_run",
)  # fmt: skip


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists, strings and numbers, every interpolation resolved."""
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            items.update(flat(value, f"{prefix}{name}."))
        else:
            items[f"{prefix}{name}"] = value
    return items


def identity(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of a resolved configuration that decide what a run computes and writes."""
    items = flat(tree)
    # Files that have mirrors have checksums, and are the same wherever they are; a folder of one's own is the data.
    own = {"dataset.root"} if "dataset.mirrors" not in items else set()
    return {key: value for key, value in sorted(items.items()) if key not in NOT_IN_DIGEST or key in own}


def digest(tree: dict[str, Any]) -> str:
    """SHA-256 of a resolved configuration's identity: equal for two configurations that give the same run."""
    return hashlib.sha256(json.dumps(identity(tree), sort_keys=True).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two resolved configurations are not the same run, as "key: old value, now new value"."""
    before, after = identity(old), identity(new)
    return [
        f"{key}: {before.get(key, 'not there')}, now {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, MISSING) != after.get(key, MISSING)
    ]


def hparams(tree: dict[str, Any]) -> dict[str, bool | float | str]:
    """A run's row in HPARAMS: what was chosen of each group, and the settings of what is trained and how."""
    values = {group: tree[group]["_target_"].rpartition(".")[2] for group in ("dataset", "model", "optimizer")}
    for key, value in flat(tree).items():
        if key.startswith("backend.") and value == "auto":
            continue  # only what was chosen deserves a column
        if key.startswith(_HPARAMS) and not key.endswith("_target_") and key not in NOT_IN_DIGEST and value is not None:
            values[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return values


_HPARAMS = (
    "seed",
    "dataset.",
    "model.",
    "optimizer.",
    "backend.",
    "train.epochs",
    "train.batch_size",
    "train.max_steps",
)
