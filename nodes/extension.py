"""The list of all nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension

from . import (
    attention,
    capture,
    compare,
    concept,
    ddim,
    demo,
    files,
    gradient,
    inspect,
    inversion,
    metrics,
    pack,
    pix2pix_zero,
    preview,
    prompts,
    replacements,
    sampling,
    store_files,
)

MODULES = (inversion, ddim, gradient, files, inspect, concept, prompts, attention, pix2pix_zero, capture, store_files,
           sampling, preview, pack, demo, metrics, compare)  # fmt: skip


class LeditsExtension(ComfyExtension):
    async def on_load(self):
        await replacements.register()

    async def get_node_list(self):
        return [node for module in MODULES for node in module.NODES]
