"""The configuration: schemas, composition, checks, identity. Imports no torch."""

from fmexp.config.composition import compose
from fmexp.config.identity import NOT_IN_DIGEST, difference, digest, flat, frozen, hparams, identity, left_out, resolved
from fmexp.config.location import conf_dir
from fmexp.config.objective import is_shown, maximised
from fmexp.config.schema import SCHEMAS, Config, Moment
from fmexp.config.validate import check, closed, no_key, no_text, output_folder, without_hydra, wrong_value

__all__ = [
    "NOT_IN_DIGEST", "SCHEMAS", "Config", "Moment", "check", "closed", "compose", "conf_dir", "difference", "digest",
    "flat", "frozen", "hparams", "identity", "is_shown", "left_out", "maximised", "no_key", "no_text", "output_folder",
    "resolved", "without_hydra", "wrong_value",
]  # fmt: skip
