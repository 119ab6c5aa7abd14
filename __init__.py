"""ComfyUI-LEDITS: training-free editing of real images."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes.extension import LeditsExtension

    return LeditsExtension()
