"""The configuration: schemas, composition, checks, identity. Imports no torch."""

from fmexp.config.composition import compose
from fmexp.config.identity import (
    NOT_IN_DIGEST,
    difference,
    digest,
    flat,
    frozen,
    hparams,
    identity,
    is_longer,
    left_out,
    resolved,
)
from fmexp.config.location import conf_dir
from fmexp.config.objective import is_shown, maximised, rung_metric
from fmexp.config.options import SCHEMAS
from fmexp.config.schema import Config, Moment
from fmexp.config.validate import check, closed, no_key, no_text, output_folder, without_hydra, wrong_value

__all__ = [
    "NOT_IN_DIGEST", "SCHEMAS", "Config", "Moment", "check", "closed", "compose", "conf_dir", "difference", "digest",
    "flat", "frozen", "hparams", "identity", "is_longer", "is_shown", "left_out", "maximised", "no_key", "no_text",
    "output_folder", "resolved", "rung_metric", "without_hydra", "wrong_value",
]  # fmt: skip
