"""DDIM inversion and the inversions that are made of it."""

import logging
from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..samplers import models
from ..samplers.guider import LeditsGuider
from ..samplers.methods import ddim
from ..samplers.methods.negative_prompt import with_source_as_negative
from ..samplers.ode_inverters import DDIMInverter, SourceBranch, TargetOffset
from ..samplers.phased import PhasedSampler
from .choices import HIDDEN, chosen, known
from .inversion_inputs import (
    CATEGORY,
    guidance_input,
    level_inputs,
    noise_levels,
    output,
    outputs,
    picture,
    regularisation,
    regularisation_input,
    run,
    sigmas_input,
    source_inputs,
)

REPLAYS = ("as inverted", "noise maps", "input shift")


def _cfg():
    return guidance_input("cfg", 1.0, "Guidance while inverting. 1 is right nearly always: more makes the steps hard "
                          "to take back, and above 2 the path soon fails.")


def _edit_cfg():
    return guidance_input("edit_cfg", 7.5, "Guidance of the edit to come. Set the sampler's cfg to the same.")


def _precision(refinements):
    """How exactly each step of the path is the inverse of a sampling step."""
    return [
        io.Int.Input("refinements", default=refinements, min=0, max=20,
                     tooltip="Times that each step is improved so that sampling takes it back, one more evaluation "
                     "each. The papers use 0; 1 makes sampling miss the picture by several times less."),
        io.Float.Input("tolerance", default=1e-5, min=0.0, max=1.0, step=1e-6, round=False, advanced=True,
                       tooltip="A step is good enough when a refinement changes it by less. 0 always makes all."),
        io.Combo.Input("convention", options=list(ddim.CONVENTIONS), advanced=True,
                       tooltip="Which timestep the network is told at a step up to a noisier level: A that level's (as "
                       "diffusers and the papers), B the one it comes from (as Euler over flipped sigmas)."),
    ]


def _solver():
    return io.Combo.Input("solver", options=["auto", *ddim.SOLVERS], optional=True, advanced=True,
                          tooltip="How the path is followed. Euler is the papers' of Stable Diffusion, Uni-Inv looks "
                          "ahead at no cost; midpoint (RF-Solver) asks the model twice a step, FireFlow once, and both "
                          "without refinements. auto: Uni-Inv for flow models, Euler for others.")


def _path():
    return io.DynamicCombo.Input(
        "path",
        options=[io.DynamicCombo.Option("inverted", []), io.DynamicCombo.Option("re-simulated", [_edit_cfg()])],
        tooltip="What stands for the source during the edit: the inverted path itself, or one sampled from x_T with "
        "the source prompt at the edit's guidance (the papers' baseline, which drifts away from the picture).",
    )


class DdimPath:
    """A DDIM path while a node makes it; `then` runs a further SAMPLER over it.

    Attributes:
        inversion: the record so far.
        rows: U-Net rows evaluated so far.
        note: what is to be known of the record, or "".

    Args:
        prompts: (positive, negative) CONDITIONING.
        latent: LATENT.
        levels: (steps, scheduler, sigmas), the values of `level_inputs` and `sigmas_input`.
        precision: (refinements, tolerance, convention), the values of `_precision`.
        method, regularise, solver, shift: see `DDIMInverter`.
        settings: further ones for the record.
    """

    def __init__(self, *, model: ModelPatcher, prompts, latent, cfg, levels, precision, method, regularise=None,
                 settings=None, solver="auto", shift=False):
        models.family(model)
        steps, scheduler, sigmas = levels
        refinements, tolerance, convention = precision
        if cfg > 2:
            logging.warning(
                f"LEDITS: DDIM inversion at cfg {cfg:g} does not lead back to the picture, and refinements may "
                "diverge. Invert at 1; the edit's own cfg is set in the sampler."
            )
        self.model, self.prompts, self.latent = model, prompts, latent
        self.sigmas, self.samples = noise_levels(model, scheduler, steps, sigmas), picture(model, latent)
        self.rows, self.inversion, self.note = 0, None, ""
        noted = {"cfg": cfg, "scheduler": scheduler, "convention": convention, "refinements": refinements,
                 "tolerance": tolerance, **({} if solver == "auto" else {"solver": solver}), **(settings or {})}
        inverter = DDIMInverter(
            convention=convention,
            refinements=refinements,
            tolerance=tolerance,
            method=method,
            settings=noted,
            regularise=regularise,
            solver=solver,
            shift=shift,
        )
        self.then(inverter, cfg)

    def then(self, sampler: PhasedSampler, cfg):
        guider = LeditsGuider(self.model, *self.prompts, cfg)
        self.x_T = run(guider, sampler, self.samples, self.sigmas, latent=self.latent)
        self.rows, self.inversion, self.note = self.rows + guider.rows, sampler.inversion, sampler.note

    def simulate(self, path):
        """Take the choice of `_path`."""
        if path["path"] == "re-simulated":
            self.inversion = replace(self.inversion, settings={**self.inversion.settings, "edit_cfg": path["edit_cfg"]})
            self.then(SourceBranch(self.inversion, method=f"{self.inversion.method}, re-simulated"), path["edit_cfg"])

    def output(self):
        return output(self.inversion, self.x_T, self.rows, self.latent, note=self.note)


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_DDIMInversion",
            display_name="DDIM Inversion",
            category=CATEGORY,
            description="Turns a picture into the path that DDIM sampling would have taken to it (arXiv 2010.02502), "
            "without noise maps: the baseline of editing papers.",
            search_aliases=["unsampler", "invert image", "ddim inverse", "fixed point inversion", "renoise"],
            hidden=HIDDEN,
            inputs=[
                *source_inputs(), _cfg(), *level_inputs(), *_precision(1), _path(), sigmas_input(),
                regularisation_input(),
                _solver(),
                io.Combo.Input("replay", options=list(REPLAYS), optional=True, advanced=True,
                               tooltip="What brings an edit with the source's prompt and guidance back to the picture. "
                               "as inverted: nothing (the papers' DDIM). noise maps: what each step lacks is added, one "
                               "evaluation a step more. input shift: the model is shown the latent that the inversion "
                               "showed it (DirectEdit), at no cost; not with midpoint and FireFlow."),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, refinements, tolerance, convention,
                path=None, sigmas=None, noise_regularisation=None, solver="auto", replay=REPLAYS[0]):
        known(cls, scheduler=scheduler, convention=convention, solver=solver, replay=replay)
        path = chosen(cls, "path", path)
        regularise, noted = regularisation(chosen(cls, "noise_regularisation", noise_regularisation))
        if replay != REPLAYS[0]:
            if path["path"] == "re-simulated":
                raise ValueError("A re-simulated path is a baseline that drifts: set replay to 'as inverted' with it.")
            noted = {**noted, "replay": replay}
        made = DdimPath(
            model=model,
            prompts=(positive, negative),
            latent=latent,
            cfg=cfg,
            levels=(steps, scheduler, sigmas),
            precision=(refinements, tolerance, convention),
            method="DDIM",
            regularise=regularise,
            settings=noted,
            solver=solver,
            shift=replay == "input shift",
        )
        made.simulate(path)
        if replay == "noise maps":
            made.then(TargetOffset(made.inversion), cfg)
        return made.output()


class DirectInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        cfg = _edit_cfg()
        scale = io.Float.Input("scale", default=0.8, min=0.0, max=1.0, step=0.05, round=0.01,
                               tooltip="Share of the correction. 1 is Direct Inversion, 0 the re-simulated baseline.")
        every = io.Int.Input("every", default=2, min=1, max=1000,
                             tooltip="Correct at the first step and every so many after it.")
        return io.Schema(
            node_id="LEDITS_DirectInversion",
            display_name="Direct Inversion",
            category=CATEGORY,
            description="DDIM inversion whose path itself is the source during the edit, so the source never drifts: "
            "Direct Inversion (PnP Inversion, arXiv 2310.01506). Made for attention control.",
            search_aliases=["pnp inversion", "direct inversion", "invert image"],
            hidden=HIDDEN,
            inputs=[
                *source_inputs(), _cfg(), *level_inputs(), *_precision(0),
                io.DynamicCombo.Input(
                    "ablation",
                    options=[
                        io.DynamicCombo.Option("none", []),
                        io.DynamicCombo.Option("scaled offset", [cfg, scale]),
                        io.DynamicCombo.Option("every n-th step", [cfg, every]),
                        io.DynamicCombo.Option("target side", [cfg]),
                    ],
                    tooltip="Weaker variants that the paper compares with: the source corrected in part, or only now "
                    "and then; or its correction added to the edit too. Leave at none to edit.",
                    extra_dict={"advanced": True},
                ),
                sigmas_input(), _solver(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, refinements, tolerance, convention,
                ablation=None, sigmas=None, solver="auto"):
        known(cls, scheduler=scheduler, convention=convention, solver=solver)
        ablation = chosen(cls, "ablation", ablation)
        variant = ablation["ablation"]
        made = DdimPath(
            model=model,
            prompts=(positive, negative),
            latent=latent,
            cfg=cfg,
            levels=(steps, scheduler, sigmas),
            precision=(refinements, tolerance, convention),
            method="Direct",
            settings=ablation,
            solver=solver,
        )
        if variant == "target side":
            made.then(TargetOffset(made.inversion, method="Direct, target side"), ablation["edit_cfg"])
        elif variant != "none":
            scale, every = ablation.get("scale", 1.0), ablation.get("every", 1)
            branch = SourceBranch(made.inversion, scale=scale, every=every, method=f"Direct, {variant}")
            made.then(branch, ablation["edit_cfg"])
        return made.output()


class NegativePromptInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_NegativePromptInversion",
            display_name="Negative-Prompt Inversion",
            category=CATEGORY,
            description="DDIM inversion that puts the source prompt in the place of the edit's negative "
            "(arXiv 2305.16807): nearly Null-Text Inversion, at no cost. Goes well with Proximal Guidance.",
            search_aliases=["npi", "negative prompt inversion", "invert image", "proximal"],
            hidden=HIDDEN,
            inputs=[
                *source_inputs(), _cfg(), *level_inputs(), *_precision(1), _path(),
                io.Float.Input("interpolation", default=0.0, min=0.0, max=1.0, step=0.05, round=0.01, advanced=True,
                               tooltip="Share of the negative given here in what replaces the edit's negative: 0 is "
                               "the source prompt alone. More gives stronger edits that keep less."),
                sigmas_input(), _solver(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, scheduler, refinements, tolerance, convention,
                interpolation, path=None, sigmas=None, solver="auto"):
        known(cls, scheduler=scheduler, convention=convention, solver=solver)
        path = chosen(cls, "path", path)
        made = DdimPath(
            model=model,
            prompts=(positive, negative),
            latent=latent,
            cfg=cfg,
            levels=(steps, scheduler, sigmas),
            precision=(refinements, tolerance, convention),
            method="negative-prompt",
            settings={"interpolation": interpolation},
            solver=solver,
        )
        made.inversion = with_source_as_negative(made.inversion, positive, negative, interpolation)
        made.simulate(path)
        return made.output()


NODES = [DDIMInversion, DirectInversion, NegativePromptInversion]
