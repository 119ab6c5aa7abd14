"""FlowEdit (arXiv 2412.08629): an edit without inversion, its source half made once and its target half at every edit."""

import node_helpers
import torch
from comfy_api.latest import io

from ..samplers import models, published
from ..samplers.guider import LeditsGuider
from ..samplers.inverters import EditFriendlyInverter
from ..samplers.ledits import LeditsSampler
from . import feedback, sockets
from .choices import HIDDEN, chosen, known
from .edit_inputs import edit, edit_inputs, free_steps_input, path_inputs, sigmas_after
from .inversion_inputs import (
    CATEGORY,
    guidance_input,
    noise_levels,
    output,
    outputs,
    picture,
    run,
    scheduler_input,
    seed_input,
    sigmas_input,
    source_inputs,
)

AUTHORS, OWN = "authors'", "own"


def _settings_input(own):
    return io.DynamicCombo.Input(
        "settings",
        options=[io.DynamicCombo.Option(AUTHORS, []), io.DynamicCombo.Option(OWN, own)],
        tooltip="authors': what was published for SD3 (50 steps, 33 of them run, cfg 3.5 and 13.5) or Flux.1-dev (28 "
        "steps, 24 of them run, guidance 1.5 and 5.5), for other models the nearer of the two. A guidance that the "
        "prompt carries (FluxGuidance) is kept.",
    )


def _guided(conditioning, settings: published.FlowEditSettings, guidance: float):
    """The prompt at a guidance, and the cfg that goes with it."""
    if not settings.embedded:
        return conditioning, guidance
    if any("guidance" in entry[1] for entry in conditioning):
        return conditioning, 1.0
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance}), 1.0


def _note(model, conditioning, choice, settings, exact):
    """What is to be known of settings that were chosen for the user."""
    if choice == AUTHORS and not exact:
        return f"No settings are published for {type(model.model).__name__}: those for {settings.model} were taken"
    return feedback.guidance_note(model, conditioning)


class FlowEditSource(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        own = [
            io.Int.Input("steps", default=28, min=1, max=1000, tooltip="Steps of the whole path."),
            guidance_input("cfg", 3.5, "Guidance towards the source prompt. 1 for guidance-distilled models (Flux.1-dev), "
                           "whose guidance is in the prompt (FluxGuidance)."),
        ]
        return io.Schema(
            node_id="LEDITS_FlowEditSource",
            display_name="FlowEdit Source",
            category=CATEGORY,
            description="The source half of FlowEdit (arXiv 2412.08629): noisy latents of the picture and what the model "
            "predicts from them, made once for all edits of a picture. It is edit-friendly inversion at eta 0.",
            search_aliases=["flowedit", "inversion-free", "flow edit", "unsampler"],
            hidden=HIDDEN,
            inputs=[
                *source_inputs(), _settings_input(own), scheduler_input(), seed_input(),
                io.Int.Input("draws", default=1, min=1, max=64, optional=True, advanced=True,
                             tooltip="Noises of every picture, whose edits are averaged (the paper's n_avg). Each costs "
                             "as much as the first, here and in the edit."),
                sigmas_input(),
            ],
            outputs=outputs("The path, for FlowEdit or any LEDITS sampler."),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, scheduler, seed, settings=None, draws=1, sigmas=None):
        known(cls, scheduler=scheduler)
        settings = chosen(cls, "settings", settings)
        models.family(model)
        published_for, exact = published.flowedit(model)
        steps, cfg = published_for.steps, settings.get("cfg")
        if settings["settings"] == OWN:
            steps = settings["steps"]
        else:
            positive, cfg = _guided(positive, published_for, published_for.source)
        sigmas, samples = noise_levels(model, scheduler, steps, sigmas), picture(model, latent)
        noted = {"cfg": cfg, "seed": seed, "eta": 0.0, "scheduler": scheduler}
        if draws > 1:
            noted["draws"], samples = draws, samples.repeat(draws, *[1] * (samples.ndim - 1))
        inverter = EditFriendlyInverter(
            seed=seed, etas=torch.zeros(len(sigmas) - 1), method="FlowEdit", settings=noted
        )
        guider = LeditsGuider(model, positive, negative, cfg)
        x_T = run(guider, inverter, samples, sigmas, latent=latent, seed=seed, draws=draws)
        note = feedback.notes(_note(model, positive, settings["settings"], published_for, exact), inverter.note)
        return output(inverter.inversion, x_T, guider.rows, latent, note=note)


class FlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        own = [
            guidance_input("cfg", 13.5, "Guidance towards the target prompt. 1 for guidance-distilled models "
                           "(Flux.1-dev), whose guidance is in the prompt (FluxGuidance)."),
            io.Int.Input("skip", default=4, min=0, max=999,
                         tooltip="Steps to leave out at the noisy end: all steps less the paper's n_max. More stays "
                         "closer to the picture."),
        ]
        return io.Schema(
            node_id="LEDITS_FlowEdit",
            display_name="FlowEdit",
            category="LEDITS/sampling",
            description="The target half of FlowEdit (arXiv 2412.08629): the picture moves by the difference between "
            "what the model predicts for the target prompt and for the source. On flow models and Stable Diffusion.",
            search_aliases=["flow edit", "inversion-free", "edit image"],
            hidden=HIDDEN,
            inputs=[
                *edit_inputs(), *path_inputs(), _settings_input(own), free_steps_input(),
                sockets.Concepts.Input("concepts", optional=True, tooltip="Semantic concepts to add or remove."),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change. Outside it, it stays as it "
                              "was."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited picture, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, inversion, settings=None, free_steps=0, concepts=None, mask=None):
        settings = chosen(cls, "settings", settings)
        models.check(model, inversion)
        published_for, exact = published.flowedit(model)
        cfg, skip = settings.get("cfg"), settings.get("skip")
        if settings["settings"] == AUTHORS:
            positive, cfg = _guided(positive, published_for, published_for.target)
            skip = published_for.skip(inversion.steps)
        sigmas = sigmas_after(inversion, skip)
        guider = LeditsGuider(model, positive, negative, cfg, concepts=concepts or ())
        sampler = LeditsSampler(inversion, eta=0.0, free_steps=free_steps)
        samples = edit(guider, sampler, sigmas, mask=mask)
        note = _note(model, positive, settings["settings"], published_for, exact)
        costs = feedback.costs(guider.rows, len(sigmas) - 1, level=float(sigmas[0]), note=note)
        return io.NodeOutput({"samples": samples}, ui=costs)


NODES = [FlowEditSource, FlowEdit]
