"""Edit-friendly inversion and the edit on flow models: exact on networks of ComfyUI's own classes, and refused in words."""
import functools

import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.unpack_pack import PackInversion, UnpackInversion
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods import inversion_statistics
from comfyui_ledits.samplers.methods.sega import Concept
from support import runs, tiny, tiny_flow
from support.runs import EMPTY, SOURCE, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
KINDS = list(tiny_flow.KINDS)
invert = functools.partial(runs.invert, EditFriendlyInversion, scheduler="simple", steps=8)
EXACT = 1e-5  # of the picture's standard deviation, in float32


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_comes_back(kind, eta, guidance):
    latent = tiny_flow.latent(kind, 2)
    inversion, x_T, _ = invert(kind, latent, cfg=guidance, eta=eta).result
    assert inversion.family == "flow" and float(inversion.sigmas[0]) == 1
    assert error(kind, edit(kind, inversion, cfg=guidance), latent) < EXACT
    other = edit(kind, inversion, cfg=guidance, prompt=TARGET)
    assert error(kind, other, latent) > 1e-3  # the prompt does something


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_evaluated_together_as_one_by_one(kind):
    latent = tiny_flow.latent(kind, 2)
    one, some, all_at_once = (invert(kind, latent, cfg=3.5, steps_at_once=n)[0] for n in (1, 3, 0))
    for other in (some, all_at_once):
        torch.testing.assert_close(other.residuals, one.residuals, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "hunyuan"])  # whose own forward wants even sides
def test_odd_sides_come_back(kind):
    latent = tiny_flow.latent(kind, 1, 7, 9)
    inversion = invert(kind, latent)[0]
    assert error(kind, edit(kind, inversion, cfg=1.0), latent) < EXACT


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_every_scheduler_of_comfyui_comes_back(kind, scheduler):
    latent = tiny_flow.latent(kind)
    inversion = invert(kind, latent, steps=7, scheduler=scheduler)[0]
    assert error(kind, edit(kind, inversion, cfg=1.0), latent) < EXACT


@pytest.mark.parametrize("steps", [1, 2, 28, 100])
@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_one_to_a_hundred_steps_come_back(kind, steps):
    latent = tiny_flow.latent(kind)
    inversion = invert(kind, latent, steps=steps)[0]
    assert inversion.steps == steps
    assert error(kind, edit(kind, inversion, cfg=1.0), latent) < EXACT


@pytest.mark.parametrize("skip", [1, 4, 7])
@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_every_skip_and_the_second_order_come_back(kind, skip):
    latent = tiny_flow.latent(kind)
    inversion = invert(kind, latent, cfg=3.5)[0]
    for solver in ("ddpm", "dpmpp_2m_sde"):
        assert error(kind, edit(kind, inversion, cfg=3.5, skip=skip, solver=solver), latent) < 5 * EXACT


@pytest.mark.parametrize("kind", ["sd1", "flux", "wan"])
def test_a_path_that_ends_above_no_noise_comes_back(kind):
    latent = runs.parts_of(kind).latent(kind)
    inversion = invert(kind, latent, sigmas=torch.tensor([0.9, 0.6, 0.3, 0.1]), cfg=2.0)[0]
    assert error(kind, edit(kind, inversion, cfg=2.0), latent) < EXACT


def test_a_path_is_the_noise_that_comfyui_adds():
    kind, latent = "sd3", tiny_flow.latent("sd3")
    inversion = invert(kind, latent, seed=4)[0]
    noise = torch.randn(latent["samples"].shape[1:], generator=torch.Generator().manual_seed(4 + 0))
    sampling = model(kind).get_model_object("model_sampling")
    # the first draw is for the lowest level
    picture = runs.in_model_space(kind, latent["samples"])
    lowest = sampling.noise_scaling(inversion.sigmas[-2:-1], noise[None].clone(), picture)
    torch.testing.assert_close(inversion.latents[-2], lowest)
    for i in range(inversion.steps):  # each level is of unit noise
        found = (inversion.latents[i] - (1 - inversion.sigmas[i]) * picture) / inversion.sigmas[i]
        assert float(found.std()) == pytest.approx(1, abs=0.1)


def test_noise_of_another_size_is_the_models():
    """HiDream-O1 starts from noise of standard deviation 8."""
    other = model("sd3").clone()
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    sampling.noise_scale = 8.0
    other.add_object_patch("model_sampling", sampling)
    latent = tiny_flow.latent("sd3", height=32, width=32)
    inversion, x_T, noise = invert("sd3", latent, on=other, seed=4).result
    assert float(inversion.latents[0].std()) == pytest.approx(8, rel=0.05)
    assert error("sd3", edit("sd3", inversion, cfg=1.0, on=other), latent) < 1e-4
    found = inversion_statistics.noise(inversion.with_parts(inversion.latents))  # the noise in the path itself
    assert float((found.variances[:, 0] / found.expected).mean()) == pytest.approx(1, rel=0.05)
    if hasattr(comfy.model_sampling.ModelSamplingDiscreteFlow, "set_noise_scale"):  # core multiplies by it
        made = sampling.noise_scaling(inversion.sigmas[:1], noise.generate_noise(x_T), torch.zeros_like(latent["samples"]))
        torch.testing.assert_close(made, inversion.latents[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_noise_maps_are_those_of_theory(kind):
    inversion = invert(kind, tiny_flow.latent(kind, 1, 16, 16), steps=10)[0]
    found = inversion_statistics.noise(inversion)
    assert found.what == "noise maps"
    assert float((found.variances[1:, 0] / found.expected[1:]).median()) == pytest.approx(1, rel=0.25)
    path = inversion.with_parts(inversion.latents)
    found = inversion_statistics.noise(path)
    assert float(found.variances.mean()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", *tiny_flow.SMALL])
def test_eta_is_a_knob_of_the_edit(kind):
    """A record made anew for another eta is the record of an inversion at that eta, and asks no model."""
    latent = runs.parts_of(kind).latent(kind)
    made = {eta: invert(kind, latent, cfg=2.0, eta=eta)[0] for eta in (0.0, 0.5, 1.0)}
    with tiny.Calls(model(kind)) if kind in tiny.KINDS else _Counted(kind) as calls:
        for before in made.values():
            for eta, wanted in made.items():
                size = wanted.residuals.std()
                torch.testing.assert_close(before.with_eta(eta).residuals / size, wanted.residuals / size, rtol=0, atol=2e-4)
    assert not calls.calls
    edits = {eta: edit(kind, inversion, cfg=2.0, prompt=TARGET) for eta, inversion in made.items()}
    for eta, wanted in edits.items():
        assert error(kind, edit(kind, made[1.0], cfg=2.0, prompt=TARGET, eta=eta), wanted) < 5e-4
    assert error(kind, edits[0.0], edits[1.0]) > 1e-3
    assert made[0.5].with_eta(0.5) is made[0.5]


class _Counted:
    """Calls of a transformer, as tiny.Calls counts them of a U-Net."""

    def __init__(self, kind):
        self.network, self.calls = model(kind).model.diffusion_model, []

    def __enter__(self):
        self.handle = self.network.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_eta_of_a_path_without_noise_maps_is_refused():
    path = runs.invert(DDIMInversion, "flux", steps=3, scheduler="simple")[0]
    with _Counted("flux") as calls, pytest.raises(ValueError, match="no noise maps.*Edit-Friendly"):
        edit("flux", path, cfg=1.0, eta=0.5)
    assert not calls.calls


def test_cosmos_in_its_own_space_is_the_same_edit():
    """COSMOS_RFLOW samples a flow model in y = x / (1 - s): the same network gives the same edit."""
    ours = model("flux").clone()
    ours.add_object_patch("model_sampling", type("Flow", (
        comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST), {})())
    theirs = model("flux").clone()
    theirs.add_object_patch("model_sampling", type("Cosmos", (
        comfy.model_sampling.ModelSamplingCosmosRFlow, comfy.model_sampling.COSMOS_RFLOW), {})())
    levels, latent = torch.tensor([0.95, 0.8, 0.5, 0.2, 0.0]), tiny_flow.latent("flux")
    results = []
    for of, sigmas in ((ours, levels), (theirs, levels / (1 - levels))):
        inversion = invert("flux", latent, on=of, sigmas=sigmas, cfg=2.0)[0]
        results.append((inversion.family, edit("flux", inversion, cfg=2.0, prompt=TARGET, on=of)))
    assert [family for family, _ in results] == ["flow", "ve"]
    assert error("flux", results[0][1], results[1][1]) < 1e-4


def test_another_network_or_another_kind_is_refused():
    flux, schnell = (invert(kind, steps=3)[0] for kind in ("flux", "schnell"))
    assert flux.model != schnell.model
    deeper = tiny_flow.made("flux", depth=1)
    for inversion, on, kind in ((flux, model("schnell"), "flux"), (schnell, model("flux"), "flux"), (flux, deeper, "flux"),
                                (flux, model("sd3"), "sd3"), (flux, model("qwen"), "qwen")):
        with pytest.raises(ValueError, match="another kind of model.*Invert the picture again"):
            edit(kind, inversion, cfg=1.0, on=on)


def test_a_picture_of_another_vae_and_a_skip_beyond_the_steps_are_refused():
    with _Counted("flux") as calls:
        with pytest.raises(ValueError, match="16 channels of 2 dimensions.*VAE that belongs"):
            invert("flux", {"samples": torch.ones(1, 4, 8, 8)})
        with pytest.raises(ValueError, match="16 channels of 2 dimensions"):
            invert("flux", {"samples": torch.ones(1, 16, 1, 8, 8)})
    assert not calls.calls
    with pytest.raises(ValueError, match="skip is 18, but the inversion has 4 steps"):
        edit("flux", invert("flux", steps=4)[0], cfg=1.0, skip=18)


@pytest.mark.parametrize("latent_format, words", [
    ("StableAudio1", "sound"), ("ACEAudio", "sound"), ("Hunyuan3Dv2", "shapes"), ("HunyuanImage21Refiner", "refines"),
    ("LTXAV", "sound in one latent")])
def test_latents_that_are_no_pictures_are_refused(latent_format, words):
    other = model("sd3").clone()
    other.model = tiny_flow.made("sd3").model
    other.model.latent_format = getattr(comfy.latent_formats, latent_format)()
    with pytest.raises(ValueError, match=words):
        models.family(other)


def test_a_4d_latent_becomes_a_video_of_one_frame():
    latent = tiny_flow.latent("qwen")
    flat = {"samples": latent["samples"][:, :, 0]}
    inversion = invert("qwen", flat)[0]
    assert inversion.latents.ndim == 6
    assert error("qwen", edit("qwen", inversion, cfg=1.0), latent) < EXACT


def test_unpacked_and_packed_again_it_is_the_same():
    for kind in ("flux", "wan"):
        inversion = invert(kind)[0]
        path, maps, sigmas = UnpackInversion.execute(inversion=inversion).result
        again = PackInversion.execute(inversion=inversion, path=path, noise_maps=maps, sigmas=sigmas)[0]
        torch.testing.assert_close(again.latents, inversion.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.residuals, inversion.residuals, rtol=1e-5, atol=1e-5)


# --- guidance ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", tiny_flow.SMALL)
def test_concepts_act_in_units_of_the_velocity(kind):
    """One prediction against the formula, written out on the model's own predictions."""
    latent, s = tiny_flow.latent(kind, 2), 0.8
    x = runs.in_model_space(kind, latent["samples"])
    concept = Concept(conditioning=tiny_flow.conditioning(kind, 7), scale=4.0, threshold=0.6, warmup=0, momentum_scale=0.0)
    source, empty = prompts(kind)
    seen = {}

    class Once(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            seen["D"] = wrap(x, sigmas[:1].repeat(len(x)), **extra_args)
            conds = [wrap.conds[name] for name in ("positive", "negative", "concept_0")]
            seen["parts"] = comfy.samplers.calc_cond_batch(
                wrap.inner_model, conds, x, sigmas[:1].repeat(len(x)), extra_args["model_options"])
            return x

    guider = LeditsGuider(model(kind), source, empty, 3.0, concepts=(concept,))
    guider.sample(torch.zeros_like(latent["samples"]), latent["samples"], Once(), torch.tensor([s, 0.0]), disable_pbar=True)
    p, u, c = seen["parts"]
    v_u, v_c = (x - u) / s, (x - c) / s
    push = 4.0 * (v_c - v_u)
    gamma = torch.zeros_like(push)
    for b in range(len(push)):
        for channel in range(push.shape[1]):
            size = push[b, channel].abs()
            least = torch.quantile(size.flatten(), 0.6)
            gamma[b, channel] = torch.where(size >= least, push[b, channel], 0.0)
    torch.testing.assert_close(seen["D"], u + 3.0 * (p - u) - s * gamma, rtol=1e-4, atol=1e-5)


def test_a_guidance_distilled_model_costs_one_row_more_for_concepts():
    concept = (Concept(conditioning=tiny_flow.conditioning("flux", 7), warmup=0),)
    inversion, rows = invert("flux")[0], []
    for concepts in (None, concept):
        with _Counted("flux") as calls:
            edit("flux", inversion, cfg=1.0, concepts=concepts)
        rows.append(sum(calls.calls))
    assert rows == [8, 8 * 3]  # the prompt; with a concept also the negative it is measured from, and itself


def test_guidance_in_the_prompt_is_the_prompts_own():
    """Source and target guidance are two conditionings; equal ones give the picture back, others do not."""
    latent, kind = tiny_flow.latent("flux"), "flux"
    source = tiny_flow.conditioning(kind, SOURCE, guidance=1.5)
    other = tiny_flow.conditioning(kind, SOURCE, guidance=5.5)
    empty = prompts(kind, EMPTY)[0]
    inversion = invert(kind, latent, pair=(source, empty))[0]
    assert error(kind, edit(kind, inversion, cfg=1.0, pair=(source, empty)), latent) < EXACT
    assert error(kind, edit(kind, inversion, cfg=1.0, pair=(other, empty)), latent) > 1e-3
