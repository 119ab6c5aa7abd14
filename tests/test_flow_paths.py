"""ODE paths and negative-prompt inversion on flow models, each against an oracle of its own."""
import functools

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion, NegativePromptInversion
from comfyui_ledits.samplers.guider import LeditsGuider
from oracles import flow as oracles
from support import runs, tiny_flow
from support.runs import EMPTY, SOURCE, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
STEPS = 8
invert = functools.partial(runs.invert, scheduler="simple", steps=STEPS)
EXACT = 1e-5


# --- ODE paths ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("convention", ["A", "B"])
@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_euler_upwards_is_the_plain_loop(kind, convention):
    """x <- x + (s+ - s) v(x), the network told s+ (A, as diffusers' inverse schedulers) or s (B, flipped sigmas)."""
    latent, (source, empty) = tiny_flow.latent(kind, 2), prompts(kind)
    inversion = invert(DDIMInversion, kind, latent, cfg=1.0, solver="Euler", convention=convention)[0]
    x, s = runs.in_model_space(kind, latent["samples"]), inversion.sigmas.tolist()
    velocity = oracles.velocities(model(kind), {"source": source, "negative": empty}, x.shape)
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
    velocity = oracles.velocities(model(kind), {"target": target, "negative": empty}, inversion.latents.shape[1:])
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
