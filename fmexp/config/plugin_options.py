"""What hydra/launcher and hydra/sweeper can be, as data: `fmexp.sweep.plugins` has the classes.

It is stored here and not in conf/, for Hydra would check YAML files against its own entries of the same names.
"""

from typing import Any

from hydra.core.plugins import Plugins

from fmexp.config.hydra_versions import store

# Hydra 1.3 instantiates plugins only under the name of this package. 1.4 drops the rule.
PACKAGE = "hydra_plugins.fmexp"

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "launcher": {
        "basic": {"_target_": f"{PACKAGE}.Launcher", "n_jobs": 1},
        "joblib": {"_target_": f"{PACKAGE}.Launcher", "n_jobs": -1},
        "slurm": {
            "_target_": f"{PACKAGE}.Launcher",
            "slurm": {
                "timeout_min": 60,  # of one job; a member that needs longer takes several
                "cpus_per_task": 1,
                "slurm_partition": None,
                "slurm_array_parallelism": 256,
                "slurm_signal_delay_s": 90,  # how long before the end of its time a job is told to save itself
                "slurm_max_num_timeout": 100,  # how often a member may run out of time
            },
        },
    },
    "sweeper": {
        "basic": {"_target_": f"{PACKAGE}.Grid", "max_batch_size": None, "params": {}},
        "optuna": {
            "_target_": f"{PACKAGE}.Search",
            "_recursive_": False,  # a new sampler is made for each trial
            "n_trials": 20,
            "n_jobs": None,
            "seed": 0,
            "sampler": {"_target_": "optuna.samplers.TPESampler"},
            "params": {},
        },
    },
}


def register() -> None:
    """Put the options where Hydra looks for them."""
    Plugins.instance()  # stores Hydra's own of the same names first, so that these replace them
    for group, options in OPTIONS.items():
        for name, node in options.items():
            store(f"hydra/{group}", name, node)


register()
