"""Checkouts of other people's code, made importable in ComfyUI's process."""

import contextlib
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Packages that the checkouts import and what is measured does not use, with the names that they take from them.
STAND_INS = {
    "matplotlib": (), "matplotlib.pyplot": (), "matplotlib.backends": (), "matplotlib.backends.backend_agg": ("FigureCanvasAgg",),
    "cv2": (), "IPython": (), "IPython.display": ("display",), "pytorch_lightning": ("seed_everything",),
}

# Of the checkouts.
PACKAGES = ("utils", "models", "masactrl", "ddm_inversion", "prompt_to_prompt", "pnp", "pnp_utils", "preprocess",
            "FlowEdit_utils")


@contextlib.contextmanager
def imported(folder):
    """The checkout first on the path, stand-ins for packages that are not installed."""
    before = set(sys.modules)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("utils", "models")}
    sys.path.insert(0, str(folder))
    for name in ("utils", "models"):  # ComfyUI has packages of these names
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(folder, name))]
    for name, attributes in STAND_INS.items():
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__spec__, sys.modules[name].is_stand_in = ModuleSpec(name, None), True
            for attribute in attributes:
                setattr(sys.modules[name], attribute, None)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "is_stand_in", False) or name.split(".")[0] in PACKAGES:
                del sys.modules[name]
        sys.modules.update(hidden)


def commit(folder):
    """The commit of a checkout, or what is known instead."""
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()[:12] or "no commit known"
