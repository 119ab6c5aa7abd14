"""One strength for an edit, which chooses skip and guidance."""

from comfy_api.latest import io

from ..samplers import models, published
from . import feedback, sockets
from .sampling import CATEGORY


class EditStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_EditStrength",
            display_name="Edit Strength",
            category=CATEGORY,
            description="One number for how much an edit may change: it chooses skip and cfg together, along the diagonal of "
            "figure 5 of LEDITS (arXiv 2307.00522).",
            search_aliases=["denoise", "edit strength", "skip and cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the edit: each kind has its own range of guidance."),
                sockets.Inversion.Input("inversion", tooltip="The picture's path, whose steps are skipped."),
                io.Float.Input("strength", default=0.5, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="0 stays close to the picture, 1 follows the prompt. 0.5 is what LEDITS begins with: "
                               "36 % of the steps skipped and cfg 7.5; on flow models 14 % and cfg 3.5."),
            ],
            outputs=[
                io.Int.Output(display_name="skip", tooltip="For the skip of a LEDITS sampler."),
                io.Float.Output(display_name="cfg", tooltip="For the cfg of a LEDITS sampler. 1 for guidance-distilled models "
                                "(Flux.1-dev), whose guidance is in the prompt."),
            ],
        )

    @classmethod
    def execute(cls, model, inversion, strength):
        models.check(model, inversion)
        skip, cfg = published.strength(model, inversion.family, inversion.steps, strength)
        return io.NodeOutput(skip, cfg, ui=feedback.words(f"skip {skip} of {inversion.steps} steps, cfg {cfg:g}"))


NODES = [EditStrength]
