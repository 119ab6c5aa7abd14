"""Makes ComfyUI's modules importable in this process, as its main.py does, without leaving anything in its folders."""

import os
import sys
import tempfile
from pathlib import Path

# ComfyUI makes its user folders when it is imported: here, and not inside the ComfyUI.
USER_DATA = tempfile.TemporaryDirectory(prefix="ledits-user-", ignore_cleanup_errors=True)


def folder_of(path=None):
    """ComfyUI's folder: `path`, or where COMFYUI_PATH says.

    Raises:
        SystemExit: there is none.
    """
    folder = Path(path or os.environ.get("COMFYUI_PATH", "")).resolve()
    if not (folder / "main.py").is_file():
        raise SystemExit(f"There is no ComfyUI in {folder}: run this with dev.py, or give its folder in COMFYUI_PATH.")
    return folder


def prepare(folder=None, cpu=None):
    """ComfyUI can be imported from here on.

    Args:
        folder: ComfyUI's; else see `folder_of`.
        cpu: whether to leave a GPU alone; None where there is none.
    """
    folder = str(folder_of(folder))
    if folder not in sys.path:
        sys.path.insert(0, folder)  # first in line: ComfyUI's nodes.py and the pack's nodes/ have one name
    from comfy.cli_args import args  # before comfy.model_management and folder_paths, which read it when imported

    args.cpu = not _has_gpu() if cpu is None else cpu
    args.base_directory = USER_DATA.name
    import folder_paths

    # As main.py does: older nodes.py puts comfy/ in front, which has a utils.py.
    import utils.extra_config  # noqa: F401

    assert Path(folder_paths.get_output_directory()).is_relative_to(USER_DATA.name)


def _has_gpu():
    import torch

    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available() or xpu
