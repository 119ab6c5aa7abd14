"""The list of all nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension

from . import concept, demo, inversion, pack, sampling


class LeditsExtension(ComfyExtension):
    async def get_node_list(self):
        return [node for module in (inversion, concept, sampling, pack, demo) for node in module.NODES]
