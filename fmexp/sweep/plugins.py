"""Makes Hydra know the launcher and the sweepers of fmexp."""

import sys
import types

from hydra.core.plugins import Plugins

from fmexp.config.plugin_options import PACKAGE
from fmexp.sweep.grid import Grid
from fmexp.sweep.halving import Halving
from fmexp.sweep.launcher import Launcher
from fmexp.sweep.search import Search


def register() -> None:
    """Register the classes that the options of hydra/launcher and hydra/sweeper name.

    Hydra 1.3 takes plugins from the package hydra_plugins alone, and looks them up there by name: so this module goes
    by a name in it.
    """
    sys.modules.setdefault("hydra_plugins", types.ModuleType("hydra_plugins"))
    sys.modules[PACKAGE] = sys.modules[__name__]
    for plugin in (Launcher, Grid, Search, Halving):
        plugin.__module__ = PACKAGE
        Plugins.instance().register(plugin)
