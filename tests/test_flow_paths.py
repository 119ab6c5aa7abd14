"""FlowEdit, RF-Inversion, ODE paths and negative-prompt inversion on flow models, each against an oracle of its own."""
import functools

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEdit, FlowEditSource
from comfyui_ledits.nodes.proximal_guidance import ProximalGuidance
from comfyui_ledits.nodes.rf_inversion import HoldToPicture, RFInversion
from comfyui_ledits.samplers import published
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods import proximal, rf_inversion
from comfyui_ledits.samplers.methods.edit_friendly import draw_noise
from support import chain_parts, runs, tiny_flow
from support.runs import EMPTY, SOURCE, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
STEPS, SKIP = 8, 2
invert = functools.partial(runs.invert, scheduler="simple", steps=STEPS)
EXACT = 1e-5
OWN = functools.partial(dict, settings="own")


def velocities(kind, conditionings, shape, on=None):
    """`(x, s, name, cfg) -> v` of a MODEL, from core's own functions: nothing of the pack runs."""
    on = on or model(kind)
    conds = {name: comfy.sampler_helpers.convert_cond(c) for name, c in conditionings.items()}
    inner, conds, _ = comfy.sampler_helpers.prepare_sampling(on, shape, conds, on.model_options)
    on.pre_run()
    conds = comfy.samplers.process_conds(inner, torch.zeros(shape), conds, torch.device("cpu"))

    def velocity(x, s, name, cfg=1.0):
        d, u = comfy.samplers.calc_cond_batch(inner, [conds[name], conds["negative"]], x, torch.full((len(x),), float(s)),
                                              on.model_options)
        return (x - (u + cfg * (d - u))) / s

    return velocity


# --- FlowEdit -----------------------------------------------------------------------------------------------------------

def flowedit_published(velocity, x0, levels, noises, n_max, n_min, source_cfg, target_cfg):
    """The loop of the released code (FlowEdit_utils.py), typed anew, with noise given instead of drawn.

    noises: for every step a list of n_avg draws.
    """
    steps, z = len(levels) - 1, x0.clone()
    for i in range(steps):
        t, t_next = levels[i], levels[i + 1]
        if steps - i > n_max:
            continue
        if steps - i > n_min:
            average = torch.zeros_like(x0)
            for noise in noises[i]:
                zt_source = (1 - t) * x0 + t * noise
                zt_target = z + zt_source - x0
                source = velocity(zt_source, t, "source", source_cfg)
                target = velocity(zt_target, t, "target", target_cfg)
                average += (target - source) / len(noises[i])
            z = z + (t_next - t) * average
        else:
            if i == steps - n_min:
                xt_source = (1 - t) * x0 + t * noises[i][0]
                xt_target = z + xt_source - x0
            xt_target = xt_target + (t_next - t) * velocity(xt_target, t, "target", target_cfg)
    return z if n_min == 0 else xt_target


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
    velocity = velocities(kind, {"source": source, "target": target, "negative": empty}, x0.shape)
    expected = flowedit_published(velocity, x0, levels, noises, STEPS - SKIP, n_min, 1.5, 4.0)
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
    velocity = velocities(kind, {"source": source, "target": target, "negative": empty}, x0.shape)
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
        velocity = velocities(kind, {"source": source, "target": target, "negative": empty}, exact.shape)
        e, s = torch.zeros_like(exact), levels.tolist()
        for i in range(steps):  # dx = (2 v + x / (1 - s)) ds for both branches under one noise; e is their difference
            q, h = path.latents[i], s[i] - s[i + 1]
            difference = velocity(q + e, s[i], "target") - velocity(q, s[i], "source")
            e = e - h * (2 * difference + e / (1 - s[i]))
        errors.append(float((e - exact).abs().max()))
    assert errors[1] < errors[0] / 3


# --- ODE paths ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("convention", ["A", "B"])
@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_euler_upwards_is_the_plain_loop(kind, convention):
    """x <- x + (s+ - s) v(x), the network told s+ (A, as diffusers' inverse schedulers) or s (B, flipped sigmas)."""
    latent, (source, empty) = tiny_flow.latent(kind, 2), prompts(kind)
    inversion = invert(DDIMInversion, kind, latent, cfg=1.0, solver="Euler", convention=convention)[0]
    x, s = runs.in_model_space(kind, latent["samples"]), inversion.sigmas.tolist()
    velocity = velocities(kind, {"source": source, "negative": empty}, x.shape)
    lowest = float(model(kind).get_model_object("model_sampling").sigma_min)
    for i in range(STEPS - 1, -1, -1):
        told = s[i] if convention == "A" else max(s[i + 1], lowest)
        x = x + (s[i] - s[i + 1]) * velocity(x, told, "source")
        # B divides by the lowest level, which enlarges rounding
        torch.testing.assert_close(inversion.latents[i], x, rtol=3e-4, atol=3e-4 if convention == "B" else 1e-5)


@pytest.mark.parametrize("solver", ["auto", "Euler", "midpoint", "FireFlow"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", *tiny_flow.SMALL])
def test_noise_maps_make_every_ode_path_exact(kind, solver):
    latent = runs.parts_of(kind).latent(kind, 2)
    inversion = invert(DDIMInversion, kind, latent, cfg=1.0, solver=solver, replay="noise maps")[0]
    assert error(kind, edit(kind, inversion, cfg=1.0), latent) < EXACT * 3
    assert error(kind, edit(kind, inversion, cfg=1.0, prompt=TARGET), latent) > 1e-3


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("solver", ["auto", "Euler", "Uni-Inv"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", *tiny_flow.SMALL])
def test_an_input_shift_makes_the_path_exact_at_no_cost(kind, solver, refinements):
    latent = runs.parts_of(kind).latent(kind, 2)
    made = invert(DDIMInversion, kind, latent, cfg=1.0, solver=solver, replay="input shift", refinements=refinements)
    plain = invert(DDIMInversion, kind, latent, cfg=1.0, solver=solver, refinements=refinements)
    assert made.ui == plain.ui and torch.equal(made[0].latents, plain[0].latents)
    assert error(kind, edit(kind, made[0], cfg=1.0), latent) < EXACT * 3
    if not refinements:
        assert error(kind, edit(kind, plain[0], cfg=1.0), latent) > EXACT * 10  # which the path alone is not


def test_directedit_is_the_published_step():
    """x + (s' - s) v(x + delta), delta from the path: the velocity was evaluated at the next latent of the path."""
    kind = "flux"
    latent, (_source, target, empty) = tiny_flow.latent(kind), prompts(kind, SOURCE, TARGET, EMPTY)
    inversion = invert(DDIMInversion, kind, latent, cfg=1.0, solver="Euler", replay="input shift")[0]
    out = edit(kind, inversion, cfg=1.0, prompt=TARGET)
    velocity = velocities(kind, {"target": target, "negative": empty}, inversion.latents.shape[1:])
    x, s = inversion.latents[0], inversion.sigmas.tolist()
    for i in range(STEPS):
        delta = inversion.latents[i + 1] - inversion.latents[i]
        x = x + (s[i + 1] - s[i]) * velocity(x + delta, s[i], "target")
    assert error(kind, out, model(kind).model.process_latent_out(x)) < EXACT * 3


def test_an_input_shift_is_refused_where_it_cannot_be():
    for settings, words in (({"solver": "midpoint"}, "Uni-Inv, or Euler with convention A"),
                            ({"solver": "Euler", "convention": "B"}, "convention A"),
                            ({"path": runs.RESIMULATED}, "as inverted")):
        with pytest.raises(ValueError, match=words):
            invert(DDIMInversion, "flux", replay="input shift", **settings)


@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_refined_ddim_inversion_is_taken_back_by_comfyuis_euler(kind):
    latent = tiny_flow.latent(kind)
    inversion, x_T, noise = invert(DDIMInversion, kind, latent, cfg=1.0, refinements=20, tolerance=0.0).result
    guider = LeditsGuider(model(kind), *prompts(kind), 1.0)
    out = runs.in_parts(guider, comfy.samplers.sampler_object("euler"), inversion.sigmas, x_T, noise)
    assert error(kind, out, latent) < 1e-4


@pytest.mark.parametrize("ablation, exact", [("none", False), ("target side", True)])
@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_direct_inversion_works_on_flow_models(kind, ablation, exact):
    latent = tiny_flow.latent(kind)
    inversion = invert(DirectInversion, kind, latent, cfg=1.0, ablation={"ablation": ablation, "edit_cfg": 3.0})[0]
    assert (error(kind, edit(kind, inversion, cfg=3.0), latent) < EXACT * 3) == exact


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_regularised_noise_is_more_like_gaussian_noise(kind):
    """What is regularised is the noise n = x + (1 - s) v, not the velocity, whose mean is the picture's."""
    latent = runs.parts_of(kind).latent(kind, height=16, width=16)
    latent["samples"] = latent["samples"] * 0.3 + 1
    chosen = {"noise_regularisation": "pix2pix-zero", "lambda_ac": 0.0, "lambda_kl": 20.0, "reg_steps": 5, "ac_rolls": 1,
              "reg_seed": 0}
    paths = [invert(DDIMInversion, kind, latent, cfg=1.0, solver="Euler", noise_regularisation=regularise)[0]
             for regularise in (None, chosen)]
    off = [abs(float(path.latents[0].var()) - 1) + abs(float(path.latents[0].mean())) for path in paths]
    assert off[1] < off[0]


# --- negative-prompt inversion ----------------------------------------------------------------------------------------------

EXTRA = {"qwen": "attention_mask", "hunyuan": "attention_mask"}


def prompt_of(kind, seed, tokens):
    extra = {}
    if EXTRA.get(kind) == "attention_mask":
        extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        extra["attention_mask"][:, -2:] = 0
    return tiny_flow.conditioning(kind, seed, tokens, **extra)


@pytest.mark.parametrize("kind", tiny_flow.KINDS)
def test_the_source_prompt_stands_for_the_negative_whatever_its_length(kind):
    """The same edit as with the source connected as negative; words of 9, 12 and 24 tokens."""
    source, target, empty = prompt_of(kind, SOURCE, 9), prompt_of(kind, TARGET, 24), prompt_of(kind, EMPTY, 12)
    pair, latent = (source, empty), tiny_flow.latent(kind)
    npi = invert(NegativePromptInversion, kind, latent, pair=pair)[0]
    plain = invert(DDIMInversion, kind, latent, pair=pair, refinements=0)[0]
    assert torch.equal(npi.latents, plain.latents)
    out = edit(kind, npi, cfg=4.0, pair=(target, empty))
    wanted = edit(kind, plain, cfg=4.0, pair=(target, source))
    assert error(kind, out, wanted) < 1e-6
    assert error(kind, out, edit(kind, plain, cfg=4.0, pair=(target, empty))) > 1e-4


def test_prompts_of_token_numbers_cannot_stand_for_the_negative():
    numbered = tiny_flow.conditioning("flux", SOURCE, t5xxl_ids=torch.ones(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match="token numbers.*Direct"):
        invert(NegativePromptInversion, "flux", pair=(numbered, prompts("flux", EMPTY)[0]))
    llama = tiny_flow.conditioning("hidream", SOURCE)
    with pytest.raises(ValueError, match="interpolation to 0 or 1"):
        invert(NegativePromptInversion, "hidream", pair=(llama, prompts("hidream", EMPTY)[0]), interpolation=0.5)


# --- RF-Inversion -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "wan"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_rf_inversion_is_the_papers_controlled_ode(kind, gamma):
    """arXiv 2410.10792, eq. 8, typed in the paper's own time t = 1 - s with its velocity v^ = -v."""
    latent, (source, empty) = tiny_flow.latent(kind), prompts(kind)
    inversion = invert(RFInversion, kind, latent, gamma=gamma, seed=5)[0]
    x0, sigmas = runs.in_model_space(kind, latent["samples"]), inversion.sigmas.tolist()
    velocity = velocities(kind, {"source": source, "negative": empty}, x0.shape)
    lowest = float(model(kind).get_model_object("model_sampling").sigma_min)
    y, y1 = x0, draw_noise(x0.shape, 1, 5)[0]
    for i in range(STEPS - 1, -1, -1):
        t, t_next = sigmas[i + 1], sigmas[i]  # the paper's forward time runs from the picture at 0 to noise at 1
        told = max(t, lowest)
        unconditional = velocity(y, told, "source")
        conditional = (y1 - y) / (1 - t)
        y = y + (t_next - t) * (unconditional + gamma * (conditional - unconditional))
        assert error(kind, model(kind).model.process_latent_out(inversion.latents[i]),
                     model(kind).model.process_latent_out(y)) < 1e-4
    if gamma == 1:
        torch.testing.assert_close(inversion.latents[0], y1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen"])
def test_its_edit_is_the_papers_controlled_sampling(kind, strength):
    latent, (target, empty) = tiny_flow.latent(kind), prompts(kind, TARGET, EMPTY)
    inversion = invert(RFInversion, kind, latent, gamma=0.5)[0]
    held = HoldToPicture.execute(model=model(kind), inversion=inversion, strength=strength, start=0.0, stop=0.25)[0]
    out = edit(kind, inversion, cfg=1.0, pair=(target, empty), on=held)
    x0, s = inversion.latents[-1], inversion.sigmas.tolist()
    velocity = velocities(kind, {"target": target, "negative": empty}, x0.shape)
    x = inversion.latents[0]
    for i in range(STEPS):
        v = velocity(x, s[i], "target")
        eta = strength if i < 2 else 0.0  # a window of a quarter of 8 steps
        towards = (x - x0) / s[i]
        x = x + (s[i + 1] - s[i]) * (v + eta * (towards - v))
    assert error(kind, out, model(kind).model.process_latent_out(x)) < EXACT * 5


def test_rf_inversion_is_of_flow_models_and_its_window_is_not_empty():
    with pytest.raises(ValueError, match="for flow models.*DDIM"):
        runs.invert(RFInversion, "sd1")
    path = invert(RFInversion, "flux")[0]
    with pytest.raises(ValueError, match="window.*empty"):
        HoldToPicture.execute(model=model("flux"), inversion=path, strength=1.0, start=0.5, stop=0.5)
    with pytest.raises(ValueError, match="another kind of model"):
        HoldToPicture.execute(model=model("sd3"), inversion=path, strength=1.0, start=0.0, stop=0.5)


def test_the_hold_is_of_the_picture_that_is_sampled():
    path = invert(RFInversion, "flux")[0]
    held = HoldToPicture.execute(model=model("flux"), inversion=path, strength=1.0, start=0.0, stop=0.5)[0]
    other = invert(RFInversion, "flux", tiny_flow.latent("flux", height=12))[0]
    with pytest.raises(ValueError, match="connect the inversion that is edited"):
        edit("flux", other, cfg=1.0, on=held)


@pytest.mark.parametrize("kind", ["sd1", "flux", "wan"])
def test_a_full_hold_gives_the_picture_whatever_the_inversion(kind):
    latent = runs.parts_of(kind).latent(kind)
    for node in (EditFriendlyInversion, DDIMInversion):
        path = invert(node, kind, latent)[0]
        held = HoldToPicture.execute(model=model(kind), inversion=path, strength=1.0, start=0.0, stop=1.0)[0]
        assert error(kind, edit(kind, path, cfg=3.0, prompt=TARGET, on=held), latent) < 1e-4


def test_a_decaying_hold_weakens():
    path = invert(RFInversion, "flux")[0]
    hold = rf_inversion.HoldPicture(path, 1.0, 0.0, 1.0, decay=2.0)
    d = torch.zeros_like(path.latents[-1])
    for i in range(STEPS):
        moved = hold({"denoised": d, "sigma": path.sigmas[i : i + 1]})
        torch.testing.assert_close(moved, (1 - i / STEPS) ** 2 * path.latents[-1])


# --- proximal guidance --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("hold", ["picture", "path"])
@pytest.mark.parametrize("node, more", [(EditFriendlyInversion, {}), (DDIMInversion, {}), (DDIMInversion, {"replay": "input shift"})],
                         ids=["noise maps", "path alone", "input shift"])
@pytest.mark.parametrize("kind", ["sd1", "flux", "qwen", "wan"])
def test_proximal_guidance_holds_on_pictures_and_videos_whatever_the_inversion(kind, node, more, hold):
    """Noise maps lead from what the model predicted to the picture: D itself drawn to the picture would lead elsewhere."""
    latent = runs.parts_of(kind).latent(kind, 2)
    inversion = invert(node, kind, latent, cfg=1.0, **more)[0]
    free = edit(kind, inversion, cfg=4.0, prompt=TARGET)
    held = ProximalGuidance.execute(model=model(kind), quantile=0.999, kind="hard", inversion=inversion, hold=hold,
                                    strength=1.0, start=0.0, radius=0)[0]
    out = edit(kind, inversion, cfg=4.0, prompt=TARGET, on=held)
    picture = runs.in_model_space(kind, latent["samples"])
    sizes = [float((runs.in_model_space(kind, x) - picture).square().mean()) for x in (out, free)]
    assert 0 < sizes[0] < sizes[1] / 10


@pytest.mark.parametrize("node, more", [(EditFriendlyInversion, {}), (DDIMInversion, {}), (DDIMInversion, {"replay": "input shift"})],
                         ids=["noise maps", "path alone", "input shift"])
def test_held_to_the_path_a_step_ends_on_it_wherever_it_started(node, more):
    """The model sees the latent with the input shift, the step starts without."""
    path = invert(node, "flux", cfg=1.0, **more)[0]
    hold = proximal.Proximal(quantile=0.0, hold="path", inversion=path, strength=1.0, start=1.0, radius=0)
    same = torch.randn(path.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    for i in range(STEPS):
        y = path.latents[i] + 0.3 * same
        seen = y if path.shifts is None else y + path.shifts[i]
        d = hold({"conds_out": [same, same], "conds": [1, 1], "cond_scale": 4.0, "sigma": path.sigmas[i : i + 1],
                  "input": seen})[0]
        c = path.step(i)
        torch.testing.assert_close(c.keep * y + c.take * d + path.residual(i), path.latents[i + 1], rtol=1e-4, atol=1e-4)
