"""Where the shipped conf/ is."""

from pathlib import Path

from fmexp.errors import ConfigError


def conf_dir() -> Path:
    """The shipped conf/: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"fmexp's conf/ is neither in {package} nor beside it; install fmexp again")
