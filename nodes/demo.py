"""The pack's own small model, to try everything without a download."""

from comfy_api.latest import io

from ..demo import loader


class LoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_LoadDemoModel",
            display_name="Load Demo Model",
            category="LEDITS/demo",
            description="A small text-to-image model of drawn shapes (128 x 128), shipped with this pack, to try and "
            "test editing in seconds. Swap in a Load Checkpoint node to edit your own pictures.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The demo U-Net (v-prediction)."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, for prompts and concepts."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder, for 128 x 128 pictures."),
            ],
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(*loader.load())


NODES = [LoadDemoModel]
