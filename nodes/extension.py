"""The list of all nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension

from . import attention, capture, concept, ddim, demo, files, gradient, inspect, inversion, pack, prompts, sampling

MODULES = (inversion, ddim, gradient, files, inspect, concept, prompts, attention, capture, sampling, pack, demo)


class LeditsExtension(ComfyExtension):
    async def get_node_list(self):
        return [node for module in MODULES for node in module.NODES]
