"""The list of all nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension

from . import (
    attention,
    capture_attention,
    compare,
    copy_attention,
    ddim_inversions,
    demo,
    edit_friendly_inversion,
    edit_metrics,
    edit_prompts,
    edit_strength,
    flowedit,
    inspect_inversion,
    inversion_files,
    learned_inversions,
    pix2pix_zero_edit,
    preview,
    proximal_guidance,
    replacements,
    rf_inversion,
    sampling,
    sdedit,
    semantic_concept,
    store_files,
    unpack_pack,
)

MODULES = (
    edit_friendly_inversion,
    flowedit,
    ddim_inversions,
    rf_inversion,
    sdedit,
    proximal_guidance,
    learned_inversions,
    inversion_files,
    inspect_inversion,
    semantic_concept,
    edit_prompts,
    edit_strength,
    attention,
    copy_attention,
    pix2pix_zero_edit,
    capture_attention,
    store_files,
    sampling,
    preview,
    unpack_pack,
    demo,
    edit_metrics,
    compare,
)


class LeditsExtension(ComfyExtension):
    async def on_load(self):
        await replacements.register()

    async def get_node_list(self):
        return [node for module in MODULES for node in module.NODES]
