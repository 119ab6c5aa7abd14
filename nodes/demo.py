"""The pack's own small model and pictures, to try everything without a download."""

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..demo import loader, pictures
from ..files import latent_formats
from .choices import known
from .drawing.pixels import to_tensor

CATEGORY = "LEDITS/demo"

latent_formats.register(loader.DemoLatent)  # so that inversions made with the demo model can be saved


NETWORKS = {"U-Net": loader.load, "flow": loader.load_flow}


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_LoadDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small text-to-image model of drawn shapes (128 x 128), shipped with this pack, to try and "
            "test editing in seconds. Swap in a Load Checkpoint node to edit your own pictures.",
            inputs=[
                io.Combo.Input("network", options=list(NETWORKS), optional=True,
                               tooltip="U-Net: a model as Stable Diffusion 1 (v-prediction). flow: a flow-matching "
                               "transformer as Flux. Text encoder and autoencoder are the same."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The demo network."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, for prompts and concepts."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder, for 128 x 128 pictures."),
            ],
        )

    @classmethod
    def execute(cls, network="U-Net"):
        known(cls, network=network)
        return io.NodeOutput(*NETWORKS[network]())


ENTRIES = {entry["file"].removesuffix(".png"): entry for entry in pictures.load()}


class LoadDemoPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_LoadDemoPicture",
            display_name="Load Demo Picture",
            category=CATEGORY,
            description="A picture that the demo model understands, shipped with this pack, with its caption and the "
            "mask of what it shows.",
            search_aliases=["example picture", "test image"],
            inputs=[
                io.Combo.Input("picture", options=list(ENTRIES),
                               tooltip="128 x 128 pixels; those whose names begin with 'wide' 192 x 128."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, for VAE Encode."),
                io.Mask.Output(display_name="mask", tooltip="Where the thing is that the caption names first."),
                io.String.Output(display_name="caption", tooltip="What the picture shows: a source prompt."),
            ],
        )

    @classmethod
    def execute(cls, picture):
        known(cls, picture=picture)
        entry, device = ENTRIES[picture], comfy.model_management.intermediate_device()
        with Image.open(pictures.FOLDER / entry["file"]) as file:
            image = to_tensor(file.convert("RGB"))[None].to(device)
        mask = torch.from_numpy(pictures.draw(entry)[1][:1]).float().to(device)
        return io.NodeOutput(image, mask, entry["caption"], ui=ui.PreviewImage(image, cls=cls))


NODES = [LoadDemoModel, LoadDemoPicture]
