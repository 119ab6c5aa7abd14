"""Edits on flow models and on U-Nets alike: masks, prompts beside pictures, stages, and the mask of a LATENT."""
import functools
import os

import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEditSource
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from comfyui_ledits.samplers import models
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.inverters import levels_at_once
from support import runs, tiny, tiny_flow
from support.runs import EMPTY, SOURCE, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
invert = functools.partial(runs.invert, EditFriendlyInversion, scheduler="simple", steps=8)
EXACT = 1e-5  # of the picture's standard deviation, in float32


# --- masks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sd3", "qwen", "wan"])
def test_masks_are_of_their_pictures(kind):
    latent = tiny_flow.latent(kind, 2)
    inversion, masks = invert(kind, latent)[0], torch.zeros(2, 64, 64)
    masks[0, :, :32], masks[1, :, 32:] = 1, 1
    out = edit(kind, inversion, cfg=3.0, prompt=TARGET, mask=masks)
    moved = (out - latent["samples"]).abs().amax(tuple(range(1, out.ndim - 1)))  # by picture and column
    assert float(moved[0, 4:].max()) < 1e-5 < float(moved[0, :4].min())
    assert float(moved[1, :4].max()) < 1e-5 < float(moved[1, 4:].min())


def test_masks_of_a_video_are_of_its_frames():
    latent = tiny_flow.latent("wan", 1, frames=3)
    masks = torch.zeros(3, 64, 64)
    masks[1] = 1
    out = edit("wan", invert("wan", latent)[0], cfg=3.0, prompt=TARGET, mask=masks)
    moved = (out - latent["samples"]).abs().amax((0, 1, 3, 4))
    assert float(moved[1]) > 1e-3 and float(moved[[0, 2]].max()) < 1e-5


# --- prompts and pictures ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["positive", "negative"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux", "qwen"])
def test_two_prompts_for_three_pictures_are_the_same_however_many_steps_are_evaluated_at_once(kind, where):
    two, one = (runs.parts_of(kind).conditioning(kind, SOURCE, batch=b) for b in (2, 1))
    pair = (two, one) if where == "positive" else (one, two)
    latent = runs.parts_of(kind).latent(kind, 3)
    inversions = [invert(kind, latent, cfg=3.0, pair=pair, steps_at_once=n)[0] for n in (1, 0, 4)]
    for other in inversions[1:]:
        torch.testing.assert_close(other.residuals, inversions[0].residuals, rtol=1e-4, atol=1e-5)
    assert error(kind, edit(kind, inversions[1], cfg=3.0, pair=pair), latent) < 1e-4


def chosen(shape, prompts_given=1):
    """Steps that are evaluated at once, for latents of this shape."""
    found = []

    class Asks(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, *_, **__):
            found.append(levels_at_once(wrap, shape, extra_args["model_options"]))
            return torch.zeros(shape)

    words = tiny.conditioning("sd1", SOURCE, batch=prompts_given)
    guider = LeditsGuider(model("sd1"), words, prompts("sd1", EMPTY)[0], 3.0)
    guider.sample(torch.zeros(shape), torch.zeros(shape), Asks(), torch.tensor([1.0, 0.0]))
    return found[0]


def test_one_prompt_or_one_for_each_picture_is_still_evaluated_many_steps_at_once():
    assert chosen((3, 4, 8, 8)) > 1 and chosen((3, 4, 8, 8), 2) == 1 and chosen((3, 4, 8, 8), 3) > 1


@pytest.mark.skipif(os.environ.get("LEDITS_TEST_DEVICE") == "cuda", reason="a limit of CPUs")
@pytest.mark.parametrize(("shape", "expected"), [
    ((1, 4, 16, 16), 16), ((4, 4, 16, 16), 4), ((1, 4, 32, 32), 4), ((1, 4, 64, 64), 1), ((2, 4, 32, 32), 2), ((1, 4, 96, 96), 1)])
def test_a_cpu_is_given_no_more_places_at_once_than_fill_it(shape, expected):
    assert chosen(shape) == expected


def test_a_hunyuan_video_prompt_with_a_mask_is_evaluated_a_step_at_a_time():
    """Its network takes a mask of one row only (a core RuntimeError else)."""
    masked = tiny_flow.conditioning("hunyuan", SOURCE, attention_mask=torch.ones(1, 12, dtype=torch.long))
    latent = tiny_flow.latent("hunyuan")
    inversion = invert("hunyuan", latent, pair=(masked, masked))[0]
    assert error("hunyuan", edit("hunyuan", inversion, cfg=1.0, pair=(masked, masked)), latent) < EXACT


# --- in parts ---------------------------------------------------------------------------------------------------------

def guider(kind, prompt=TARGET, cfg=3.0):
    positive, negative = prompts(kind, prompt, EMPTY)
    return LeditsGuiderNode.execute(model=model(kind), positive=positive, negative=negative, cfg=cfg)[0]


@pytest.mark.parametrize("kind", ["sd1", "sdxl_v", *tiny_flow.SMALL])
def test_two_stages_are_one(kind):
    """SplitSigmas between two samplers: the second goes on from the first's latent."""
    latent = runs.parts_of(kind).latent(kind, 2)
    inversion, x_T, _ = invert(kind, latent, cfg=3.0).result
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=1).result
    at_once = runs.in_parts(guider(kind), sampler, sigmas, x_T)
    first = runs.in_parts(guider(kind), sampler, sigmas[:5], x_T)
    second = runs.in_parts(guider(kind), sampler, sigmas[4:], {"samples": first})
    assert error(kind, second, at_once) < 1e-5
    assert error(kind, second, latent) > 1e-3
    # from the picture itself the second part is an edit of its own
    alone = runs.in_parts(guider(kind), sampler, sigmas[4:], latent)
    torch.testing.assert_close(alone, edit(kind, inversion, cfg=3.0, prompt=TARGET, skip=5))


@pytest.mark.parametrize("kind", ["sd1", "flux", "wan"])
def test_a_latent_that_is_not_of_the_path_is_refused(kind):
    latent, other = (runs.parts_of(kind).latent(kind, seed=seed) for seed in (100, 300))
    inversion = invert(kind, latent)[0]
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=2).result
    with pytest.raises(ValueError, match="not of this inversion.*x_T.*SplitSigmas"):
        runs.in_parts(guider(kind), sampler, sigmas, other)
    empty = {"samples": torch.zeros_like(latent["samples"])}
    torch.testing.assert_close(runs.in_parts(guider(kind), sampler, sigmas, empty),
                               runs.in_parts(guider(kind), sampler, sigmas, latent))


@pytest.mark.parametrize("kind", ["sd1", *tiny_flow.SMALL])
def test_a_stock_sampler_goes_on_where_the_edit_leaves(kind):
    """Euler is the LEDITS step of a path without noise maps, so that the two can be exchanged at any level."""
    inversion, x_T, noise = runs.invert(DDIMInversion, kind, scheduler="simple", steps=8).result
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=0).result
    euler = comfy.samplers.sampler_object("euler")
    at_once = runs.in_parts(guider(kind), sampler, sigmas, x_T)
    first = runs.in_parts(guider(kind), sampler, sigmas[:4], x_T)
    assert error(kind, runs.in_parts(guider(kind), euler, sigmas[3:], {"samples": first}), at_once) < 1e-5
    # and from the beginning, by the NOISE that the inversion gives
    assert error(kind, runs.in_parts(guider(kind), euler, sigmas, x_T, noise), at_once) < 1e-5


def test_the_noise_of_a_path_wants_its_own_latent():
    for kind in ("sd1", "flux"):
        _, x_T, noise = invert(kind).result
        with pytest.raises(ValueError, match="shape"):
            noise.generate_noise({"samples": torch.zeros(2, 3, 4, 4)})
    noise = invert("sd1")[2]
    with pytest.raises(ValueError, match="x_T"):
        noise.generate_noise(tiny.latent("sd1", seed=5))


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_the_edit_through_parts_is_that_of_the_node(kind):
    latent = tiny_flow.latent(kind, 2)
    inversion, x_T, _ = invert(kind, latent).result
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=2, eta=0.3).result
    torch.testing.assert_close(runs.in_parts(guider(kind), sampler, sigmas, x_T),
                               edit(kind, inversion, cfg=3.0, prompt=TARGET, skip=2, eta=0.3))


def test_the_latent_left_at_a_level_is_what_core_takes_up_again():
    sampling = model("flux").get_model_object("model_sampling")
    y, s = torch.randn(1, 16, 8, 8), torch.tensor(0.4)
    left = models.leave(model("flux"), s, y)
    torch.testing.assert_close(sampling.noise_scaling(s, torch.zeros_like(y), left), y)
    assert models.leave(model("flux"), torch.tensor(0.0), y) is y


# --- the mask of the picture's LATENT -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux", "qwen"])
def test_the_mask_of_the_latent_goes_on_with_the_path(kind, tmp_path):
    """As of core's samplers (Set Latent Noise Mask); a mask at the edit takes its place."""
    latent, mask = runs.parts_of(kind).latent(kind), torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    inversion, x_T, _ = invert(kind, {**latent, "noise_mask": mask}, cfg=2.0).result
    plain = invert(kind, latent, cfg=2.0)[0]
    assert torch.equal(plain.latents, inversion.latents) and plain.mask is None
    masked = edit(kind, plain, cfg=3.0, prompt=TARGET, mask=mask[0])
    assert torch.equal(edit(kind, inversion, cfg=3.0, prompt=TARGET), masked)
    assert torch.equal(edit(kind, inversion, cfg=3.0, prompt=TARGET, mask=torch.ones(1, 64, 64)),
                       edit(kind, plain, cfg=3.0, prompt=TARGET, mask=torch.ones(1, 64, 64)))
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=0).result
    assert error(kind, runs.in_parts(guider(kind), sampler, sigmas, x_T), masked) < 1e-5
    inversion_file.save(tmp_path / "x.safetensors", inversion, latent_formats.describe(inversion.latent_format))
    again = inversion_file.load(tmp_path / "x.safetensors", latent_formats.make)
    assert torch.equal(edit(kind, again, cfg=3.0, prompt=TARGET), masked)


def test_masks_of_several_pictures_go_with_their_draws():
    latent, masks = tiny_flow.latent("sd3", 2), torch.zeros(2, 1, 64, 64)
    masks[0, ..., :32], masks[1, ..., 32:] = 1, 1
    positive, negative = prompts("sd3")
    made = FlowEditSource.execute(model=model("sd3"), positive=positive, negative=negative, latent={**latent, "noise_mask": masks},
                                  scheduler="simple", settings={"settings": "own", "steps": 6, "cfg": 2.0}, seed=0, draws=3)[0]
    out = edit("sd3", made, cfg=3.0, prompt=TARGET)
    moved = (out - latent["samples"]).abs().amax((1, 2))
    assert float(moved[0, 4:].max()) < 1e-5 < float(moved[0, :4].min())
    assert float(moved[1, :4].max()) < 1e-5 < float(moved[1, 4:].min())
