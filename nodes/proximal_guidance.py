"""Proximal guidance, as a patch of a MODEL."""

from comfy_api.latest import io

from ..samplers import models
from ..samplers.methods import proximal
from . import sockets
from .choices import known


class ProximalGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_ProximalGuidance",
            display_name="Proximal Guidance",
            category="LEDITS/guidance",
            description="Lets guidance act only where it is strong, so that an edit leaves the rest of the picture "
            "alone (arXiv 2306.05414). Made for Negative-Prompt Inversion; works with every sampler at a cfg above 1.",
            search_aliases=["proximal", "npi", "threshold guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the edit."),
                io.Float.Input("quantile", default=0.5, min=0.0, max=0.999, step=0.01, round=0.001,
                               tooltip="Share of the guidance that is left out, the weakest. More keeps more of the "
                               "picture. The paper's 0.75 counts the source beside the edit and is 0.5 here."),
                io.Combo.Input("kind", options=list(proximal.KINDS),
                               tooltip="soft weakens all guidance by the threshold (the paper's), hard leaves what "
                               "exceeds it as it is, for a stronger edit with harder borders."),
                sockets.Inversion.Input("inversion", optional=True,
                                        tooltip="The source, to hold what is not edited to. Needed for hold only."),
                io.Combo.Input("hold", options=list(proximal.HOLDS), optional=True, advanced=True,
                               tooltip="Where nothing is edited: draw the prediction to the picture (reconstruction "
                               "guidance), or each step to the path (inversion guidance). 'released' holds to the picture "
                               "as the authors' code, 3 to 17 times as strongly."),
                io.Float.Input("strength", default=0.1, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="How strongly to hold. 1 puts the source in the place of what is not edited."),
                io.Float.Input("start", default=0.6, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="Share of the noise schedule after which to hold. 0 holds from the beginning."),
                io.Int.Input("radius", default=1, min=0, max=64, optional=True, advanced=True,
                             tooltip="How far around the edit nothing is held, in latent pixels (8 of the picture's)."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with proximal guidance.")],
        )

    @classmethod
    def execute(cls, model, quantile, kind, inversion=None, hold="nothing", strength=0.1, start=0.6, radius=1):
        known(cls, kind=kind, hold=hold)
        level = float(model.get_model_object("model_sampling").percent_to_sigma(start))
        guidance = proximal.Proximal(
            quantile=quantile, kind=kind, hold=hold, inversion=inversion, strength=strength, start=level, radius=radius
        )
        if hold != "nothing":
            models.check(model, inversion)
        patched = model.clone()
        patched.set_model_sampler_pre_cfg_function(guidance)
        return io.NodeOutput(patched)


NODES = [ProximalGuidance]
