"""Inversion nodes that learn: null-text and StyleDiffusion."""

from dataclasses import replace

from comfy_api.latest import io

from ..samplers import gradients
from ..samplers.gradient_inverters import NullTextInverter, StyleDiffusionInverter
from ..samplers.guider import LeditsGuider
from ..samplers.ode_inverters import SourceBranch
from .choices import known
from .inversion_inputs import (
    CATEGORY,
    guidance_input,
    level_inputs,
    noise_levels,
    output,
    outputs,
    picture,
    run,
    sigmas_input,
    source_inputs,
)

ON_INTERRUPT = ["discard", "keep the result so far"]
PATHS = ["inverted", "re-simulated"]


def _inputs():
    return [
        *source_inputs(model="The model that will also make the edit. U-Nets only: SD 1.x, SD 2.x, SDXL.",
                       positive="Source prompt: what the picture shows, in plain words."),
        guidance_input("cfg", 7.5, "Guidance of the edit to come. What is learned holds for this value; edit with the "
                       "same."),
        *level_inputs(),
    ]


def _fine_inputs():
    return [
        io.Float.Input("learning_rate", default=0.01, min=0.0001, max=1.0, step=0.001, round=0.0001, advanced=True,
                       tooltip="Of Adam, at the first step; it falls along the path."),
        io.Float.Input("early_stop", default=1e-5, min=0.0, max=1.0, step=1e-6, round=False, advanced=True,
                       tooltip="A step is left as soon as its loss is below this; the value rises along the path as "
                       "in the paper. Smaller is more exact and slower."),
        io.Combo.Input("on_interrupt", options=ON_INTERRUPT,
                       tooltip="What Cancel does while it learns: end the run, or give the remaining steps what was "
                       "learned last and go on with the workflow."),
        sigmas_input(),
    ]


def _path_input():
    return io.Combo.Input("path", options=PATHS, optional=True, advanced=True,
                          tooltip="What stands for the source during the edit: the inverted path itself, or one sampled "
                          "from x_T with what was learned (as the papers' code does), for two predictions a step more.")


def _outputs():
    return outputs("The path and what was learned, for a LEDITS sampler.")


def _inverted(inverter, *, model, positive, negative, latent, cfg, steps, scheduler, sigmas, path):
    """The node's outputs, made with a SAMPLER of `gradient_inverters`."""
    gradients.check(model)
    gradients.check_prompt(positive, "positive")
    gradients.check_prompt(negative, "negative")
    sigmas = noise_levels(model, scheduler, steps, sigmas)
    samples = picture(model, latent)
    with gradients.differentiable(model) as differentiable:
        guider = LeditsGuider(differentiable, positive, negative, cfg)
        x_T = run(guider, inverter, samples, sigmas, latent=latent)
    inversion, rows = inverter.inversion, guider.rows
    if path == PATHS[1]:
        # the source has the learned values at every step, the edit in the share of tau_v
        whole = replace(inversion, settings={**inversion.settings, "tau_v": 1.0})
        branch = SourceBranch(whole, method=f"{inversion.method}, {path}")
        guider = LeditsGuider(model, positive, negative, cfg)
        x_T, rows = run(guider, branch, samples, sigmas, latent=latent), rows + guider.rows
        inversion = replace(branch.inversion, settings=inversion.settings)
    return output(inversion, x_T, rows, latent, loss=inversion.settings.get("loss"), note=gradients.left_out(model))


class NullTextInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_NullTextInversion",
            display_name="Null-Text Inversion",
            category=CATEGORY,
            description="Inverts a picture by DDIM and learns, for every step, the negative embedding with which "
            "guidance gives the picture back (arXiv 2211.09794). Takes minutes where Direct Inversion takes seconds.",
            search_aliases=["nti", "null text optimization", "invert image"],
            inputs=[
                *_inputs(),
                io.Int.Input("inner_steps", default=10, min=0, max=500,
                             tooltip="Most learning steps for one step of the path. 0 is the plain DDIM path with the "
                             "negative as it is."),
                *_fine_inputs(),
                _path_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, inner_steps, learning_rate, early_stop,
                on_interrupt, sigmas=None, path=PATHS[0]):
        known(cls, scheduler=scheduler, on_interrupt=on_interrupt, path=path)
        settings = {"scheduler": scheduler, "inner_steps": inner_steps, "learning_rate": learning_rate,
                    "early_stop": early_stop}
        inverter = NullTextInverter(
            inner_steps=inner_steps,
            rate=learning_rate,
            enough=early_stop,
            keep=on_interrupt == ON_INTERRUPT[1],
            settings=settings,
        )
        return _inverted(inverter, model=model, positive=positive, negative=negative, latent=latent, cfg=cfg,
                         steps=steps, scheduler=scheduler, sigmas=sigmas, path=path)


class StyleDiffusionInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_StyleDiffusionInversion",
            display_name="StyleDiffusion Inversion",
            category=CATEGORY,
            description="Inverts a picture by DDIM and learns, for every step, what the values of cross-attention see "
            "in place of the prompt, so that guidance gives the picture back; keys keep the prompt (arXiv 2303.15649).",
            search_aliases=["style diffusion", "value embedding", "invert image"],
            inputs=[
                *_inputs(),
                io.Int.Input("first_steps", default=100, min=0, max=1000,
                             tooltip="Most learning steps for the first step of the path; 10 % fewer for each that "
                             "follows. 0 is the plain DDIM path."),
                io.Float.Input("attention_loss", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Weight of keeping the attention maps of the inversion. 0 leaves them out."),
                io.Float.Input("tau_v", default=0.5, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="Share of the edit's steps, from the noisy end, in which the learned values are "
                               "used. More keeps the picture, less leaves the edit free."),
                *_fine_inputs(),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="Image encoder for the paper's mapping network. Without it, scale and "
                                    "shift of the prompt are learned directly, which works with every model."),
                io.Image.Input("image", optional=True, tooltip="The picture itself, for clip_vision."),
                _path_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, first_steps, attention_loss, tau_v,
                learning_rate, early_stop, on_interrupt, sigmas=None, clip_vision=None, image=None, path=PATHS[0]):
        known(cls, scheduler=scheduler, on_interrupt=on_interrupt, path=path)
        gradients.check(model)
        settings = {"scheduler": scheduler, "first_steps": first_steps, "attention_loss": attention_loss,
                    "tau_v": tau_v, "learning_rate": learning_rate, "early_stop": early_stop,
                    "mapping_network": clip_vision is not None}
        inverter = StyleDiffusionInverter(
            features=_features(clip_vision, image, len(latent["samples"])),
            attention=attention_loss,
            most_steps=first_steps,
            rate=learning_rate,
            enough=early_stop,
            keep=on_interrupt == ON_INTERRUPT[1],
            settings=settings,
        )
        return _inverted(inverter, model=model, positive=positive, negative=negative, latent=latent, cfg=cfg,
                         steps=steps, scheduler=scheduler, sigmas=sigmas, path=path)


def _features(clip_vision, image, pictures):
    """Tokens of the image encoder, [1 or pictures, T, F], or None."""
    if (clip_vision is None) != (image is None):
        raise ValueError("clip_vision and image belong together: connect both, or neither.")
    if clip_vision is None:
        return None
    if len(image) not in (1, pictures):
        raise ValueError(
            f"image holds {len(image)} pictures, latent {pictures}: connect the pictures that were encoded."
        )
    return clip_vision.encode_image(image)["last_hidden_state"].float()


NODES = [NullTextInversion, StyleDiffusionInversion]
