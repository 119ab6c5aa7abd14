"""FlowEdit and Brownian paths, against the published loops."""
import functools

import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEdit, FlowEditSource
from comfyui_ledits.samplers import published
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods.edit_friendly import draw_noise
from oracles import flow as oracles
from support import chain_parts, runs, tiny_flow
from support.runs import EMPTY, SOURCE, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
STEPS, SKIP = 8, 2
invert = functools.partial(runs.invert, scheduler="simple", steps=STEPS)
EXACT = 1e-5
OWN = functools.partial(dict, settings="own")


# --- FlowEdit -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_min", [0, 2])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "wan"])
def test_flowedit_is_the_published_loop(kind, draws, n_min):
    latent = tiny_flow.latent(kind, 2)
    x0, (source, target, empty) = runs.in_model_space(kind, latent["samples"]), prompts(kind, SOURCE, TARGET, EMPTY)
    inversion = FlowEditSource.execute(model=model(kind), positive=source, negative=empty, latent=latent, scheduler="simple",
                                       settings=OWN(steps=STEPS, cfg=1.5), seed=3, draws=draws)[0]
    assert inversion.method == "FlowEdit" and not inversion.etas.any()
    out = FlowEdit.execute(model=model(kind), positive=target, negative=empty, inversion=inversion,
                           settings=OWN(cfg=4.0, skip=SKIP), free_steps=n_min)[0]
    levels = inversion.sigmas.tolist()
    drawn = draw_noise((draws * 2, *x0.shape[1:]), STEPS, 3)
    noises = [drawn[i].unflatten(0, (draws, 2)).unbind() for i in range(STEPS)]
    velocity = oracles.velocities(model(kind), {"source": source, "target": target, "negative": empty}, x0.shape)
    expected = oracles.flowedit_published(velocity, x0, levels, noises, STEPS - SKIP, n_min, 1.5, 4.0)
    assert error(kind, out, model(kind).model.process_latent_out(expected)) < EXACT * 3
    assert error(kind, out, latent) > 1e-2


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_flowedit_on_diffusion_models_moves_the_picture_by_the_difference_of_two_predictions(kind):
    """`e <- e + (1 - s'/s) (D_t(q + e) - D_s(q))` with the noisy picture q, written out."""
    latent = runs.parts_of(kind).latent(kind)
    x0, (source, target, empty) = runs.in_model_space(kind, latent["samples"]), prompts(kind, SOURCE, TARGET, EMPTY)
    inversion = FlowEditSource.execute(model=model(kind), positive=source, negative=empty, latent=latent, scheduler="simple",
                                       settings=OWN(steps=STEPS, cfg=2.0), seed=3)[0]
    out = FlowEdit.execute(model=model(kind), positive=target, negative=empty, inversion=inversion,
                           settings=OWN(cfg=4.0, skip=SKIP))[0]
    velocity = oracles.velocities(model(kind), {"source": source, "target": target, "negative": empty}, x0.shape)
    e, noise, levels = torch.zeros_like(x0), draw_noise(x0.shape, STEPS, 3), inversion.sigmas.tolist()
    for i in range(SKIP, STEPS):
        s, lower, q = levels[i], levels[i + 1], x0 + levels[i] * noise[i]
        target_d = q + e - s * velocity(q + e, s, "target", 4.0)
        source_d = q - s * velocity(q, s, "source", 2.0)
        e = lower / s * e + (1 - lower / s) * (target_d - source_d)
    assert error(kind, out, model(kind).model.process_latent_out(x0 + e)) < 3e-5


def test_an_edit_after_the_first_costs_the_target_alone():
    latent, (source, target, empty) = tiny_flow.latent("flux"), prompts("flux", SOURCE, TARGET, EMPTY)
    made = FlowEditSource.execute(model=model("flux"), positive=source, negative=empty, latent=latent, scheduler="simple",
                                  settings={"settings": "authors'"}, seed=3)
    assert made.ui["ledits"][0] == {"steps": 28, "unet_rows": 28}
    for _ in range(2):
        out = FlowEdit.execute(model=model("flux"), positive=target, negative=empty, inversion=made[0],
                               settings={"settings": "authors'"})
        assert out.ui["ledits"][0] == {"steps": 24, "unet_rows": 24}


@pytest.mark.parametrize("kind, steps, ran, cfg, guidance", [
    ("flux", 28, 24, 1.0, (1.5, 5.5)), ("sd3", 50, 33, (3.5, 13.5), None), ("qwen", 50, 33, (3.5, 13.5), None)])
def test_the_authors_settings_are_by_kind_of_model(kind, steps, ran, cfg, guidance):
    """The same as the settings given by hand, guidance in the prompt where it is embedded."""
    latent, auto = tiny_flow.latent(kind), {"settings": "authors'"}
    source, target, empty = prompts(kind, SOURCE, TARGET, EMPTY)
    cfgs = cfg if isinstance(cfg, tuple) else (cfg, cfg)
    guided = [[[words, {**more, "guidance": g}] for words, more in c] if guidance else c
              for c, g in zip((source, target), guidance or (None, None))]
    common = {"model": model(kind), "negative": empty}
    made = FlowEditSource.execute(**common, positive=source, latent=latent, scheduler="simple", settings=auto, seed=3)[0]
    by_hand = FlowEditSource.execute(**common, positive=guided[0], latent=latent, scheduler="simple", seed=3,
                                     settings=OWN(steps=steps, cfg=cfgs[0]))[0]
    assert made.steps == steps and torch.equal(made.residuals, by_hand.residuals)
    out = FlowEdit.execute(**common, positive=target, inversion=made, settings=auto)[0]["samples"]
    wanted = FlowEdit.execute(**common, positive=guided[1], inversion=made,
                              settings=OWN(cfg=cfgs[1], skip=steps - ran))[0]["samples"]
    assert torch.equal(out, wanted)


def test_a_guidance_that_the_prompt_carries_is_kept():
    latent, (source, empty) = tiny_flow.latent("flux"), prompts("flux", SOURCE, EMPTY)
    own = [[words, {**more, "guidance": 2.0}] for words, more in source]
    made, by_hand = (FlowEditSource.execute(model=model("flux"), positive=own, negative=empty, latent=latent, seed=3,
                                            scheduler="simple", settings=settings)[0]
                     for settings in ({"settings": "authors'"}, OWN(steps=28, cfg=1.0)))
    assert torch.equal(made.residuals, by_hand.residuals)


def test_several_draws_are_refused_by_attention_control():
    scene = chain_parts.scene()
    path = FlowEditSource.execute(model=scene.model, positive=scene.positive, negative=scene.negative, draws=2, seed=0,
                                  latent={"samples": torch.randn(1, 4, 16, 16)}, scheduler="simple",
                                  settings=OWN(steps=4, cfg=1.0))[0]
    with pytest.raises(ValueError, match="several draws"):
        edit("sd1", path, on=scene.model, pair=(scene.positive, scene.negative), cfg=2.0, skip=1,
             attention=tuple(chain_parts.attention("p2p")))


def test_free_steps_of_a_path_without_noise_maps_are_refused():
    for more in ({}, {"replay": "input shift"}):
        path = invert(DDIMInversion, "flux", **more)[0]
        sampler = LeditsSampler(path, free_steps=2)
        guider = LeditsGuider(model("flux"), *prompts("flux"), 1.0)
        with pytest.raises(ValueError, match="free_steps leave out noise maps"):
            runs.in_parts(guider, sampler, path.sigmas, {"samples": path.latent_format.process_out(path.latents[0])})


def test_only_what_was_published_for_a_model_is_said_to_be():
    """Flux.2 is a subclass of Flux in ComfyUI."""
    assert [published.flowedit(model(kind))[1] for kind in ("flux", "sd3", "flux2", "qwen", "hunyuan")] == [True, True] + 3 * [False]


def test_free_steps_beyond_the_path_are_refused():
    inversion = invert(EditFriendlyInversion, "flux")[0]
    with pytest.raises(ValueError, match="free_steps is 9, but the inversion has 8 steps"):
        FlowEdit.execute(model=model("flux"), positive=prompts("flux", TARGET)[0], negative=prompts("flux", EMPTY)[0],
                         inversion=inversion, settings=OWN(cfg=1.0, skip=0), free_steps=9)


# --- Brownian paths -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sd1", *tiny_flow.SMALL])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_brownian_path_brings_the_picture_back(kind, eta):
    latent = runs.parts_of(kind).latent(kind, 2)
    inversion = invert(EditFriendlyInversion, kind, latent, cfg=2.0, noise="Brownian", eta=eta)[0]
    assert inversion.settings["noise"] == "Brownian"
    assert error(kind, edit(kind, inversion, cfg=2.0), latent) < EXACT * 3
    independent = invert(EditFriendlyInversion, kind, latent, cfg=2.0, eta=eta)[0]
    assert not torch.allclose(independent.latents[1], inversion.latents[1])  # all noise is new at the first


def test_a_brownian_edit_approaches_sync_sde():
    """sync-SDE's Euler-Maruyama step (arXiv 2509.24223), typed from the paper, is the first order of eta 1."""
    kind = "flux"
    source, target, empty = prompts(kind, SOURCE, TARGET, EMPTY)
    latent, errors = tiny_flow.latent(kind), []
    for steps in (40, 160):
        levels = torch.linspace(0.9, 0.1, steps + 1)
        path = invert(EditFriendlyInversion, kind, latent, sigmas=levels, noise="Brownian")[0]
        exact = runs.in_model_space(kind, edit(kind, path, cfg=1.0, prompt=TARGET)) - path.latents[-1]
        velocity = oracles.velocities(model(kind), {"source": source, "target": target, "negative": empty}, exact.shape)
        e, s = torch.zeros_like(exact), levels.tolist()
        for i in range(steps):  # dx = (2 v + x / (1 - s)) ds for both branches under one noise; e is their difference
            q, h = path.latents[i], s[i] - s[i + 1]
            difference = velocity(q + e, s[i], "target") - velocity(q, s[i], "source")
            e = e - h * (2 * difference + e / (1 - s[i]))
        errors.append(float((e - exact).abs().max()))
    assert errors[1] < errors[0] / 3
