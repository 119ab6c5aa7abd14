"""ComfyUI-LEDITS: training-free editing of real images."""

import importlib.util
import logging
import re

WEB_DIRECTORY = "./web"
OLDEST_COMFYUI = (0, 18, 2)


def too_old():
    """A sentence that names the ComfyUI needed, where the one that loads the pack is older; else None."""
    needs = "ComfyUI-LEDITS needs ComfyUI {}.{}.{} or newer".format(*OLDEST_COMFYUI)
    try:
        known = importlib.util.find_spec("comfy_api.latest")
    except ImportError:
        known = None
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = ""
    number = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if known and not (number and tuple(map(int, number.groups())) < OLDEST_COMFYUI):
        return None
    return f"{needs}{f'; this is {version}' if number else ''}. Update ComfyUI, and the nodes will be there."


if sentence := too_old():
    logging.error(sentence)
    NODE_CLASS_MAPPINGS = {}  # a pack without nodes: every ComfyUI loads that without a complaint of its own
else:

    async def comfy_entrypoint():
        from .nodes.extension import LeditsExtension

        return LeditsExtension()
