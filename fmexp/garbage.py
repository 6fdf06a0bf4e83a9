"""Python's search for garbage, kept away from what imports leave behind.

Hydra, torch and matplotlib leave a million objects that stay to the end. To look for garbage among them, while they are
imported and once more when the process ends, takes about a second.
"""

import atexit
import gc


def wait() -> None:
    """Look for none until `watch` is called, and for none at the end of the process."""
    gc.disable()
    atexit.register(gc.freeze)


def watch() -> None:
    """After `wait`: look for what becomes garbage from now on. Without it, leave all as it is."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
