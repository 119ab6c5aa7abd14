"""Models that take picture and mask as a part of their input: an edit gives them what the inversion gave, or is refused."""
import functools

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEditSource
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from support import runs, tiny, tiny_flow
from support.runs import TARGET, edit, error, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
invert = functools.partial(runs.invert, EditFriendlyInversion, scheduler="simple", steps=6, cfg=2.0)


@pytest.fixture(scope="module")
def inpainting():
    """A U-Net of nine channels, as inpainting checkpoints have: the latent, a mask, the masked picture."""
    with torch.inference_mode():
        made = tiny.model("sd2", in_channels=9)
        made.model.set_inpaint()
        return made


def half(first=1.0, second=0.0):
    mask = torch.full((1, 1, 64, 64), first)
    mask[..., 32:] = second
    return mask


def test_an_inpainting_model_is_given_the_mask_of_the_inversion(inpainting):
    latent, mask = tiny.latent("sd2"), half()
    masked = {**latent, "noise_mask": mask}
    inversion = invert("sd2", masked, on=inpainting)[0]
    plain = invert("sd2", latent, on=inpainting)[0]
    assert not torch.allclose(inversion.residuals, plain.residuals, atol=1e-4)  # it is an input
    assert error("sd2", edit("sd2", inversion, cfg=2.0, on=inpainting), latent) < 1e-4
    moved = (edit("sd2", inversion, cfg=4.0, prompt=TARGET, on=inpainting) - latent["samples"]).abs()
    assert float(moved[..., 4:].max()) < 1e-4 < float(moved[..., :4].max())


@pytest.mark.parametrize("made_with, edited_with", [(None, half()), (half(), half(0.0, 1.0))], ids=["none", "another"])
def test_another_mask_than_the_inversions_is_refused(inpainting, made_with, edited_with):
    latent = tiny.latent("sd2")
    given = latent if made_with is None else {**latent, "noise_mask": made_with}
    inversion = invert("sd2", given, on=inpainting)[0]
    with tiny.Calls(inpainting) as calls, pytest.raises(ValueError, match="not the inversion's.*Set Latent Noise Mask"):
        edit("sd2", inversion, cfg=2.0, on=inpainting, mask=edited_with[0])
    assert not calls.calls


def test_in_parts_the_picture_is_given_too(inpainting):
    masked = {**tiny.latent("sd2"), "noise_mask": half()}
    inversion, x_T, _ = invert("sd2", masked, on=inpainting).result
    source, empty = prompts("sd2")
    guider = LeditsGuiderNode.execute(model=inpainting, positive=source, negative=empty, cfg=2.0)[0]
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=0).result
    assert error("sd2", runs.in_parts(guider, sampler, sigmas, masked), masked) < 1e-4
    with tiny.Calls(inpainting) as calls, pytest.raises(ValueError, match="not the inversion's.*LEDITS KSampler"):
        runs.in_parts(guider, sampler, sigmas, x_T)
    assert not calls.calls


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_other_models_do_not_look_at_it(kind):
    latent = runs.parts_of(kind).latent(kind)
    plain, masked = (invert(kind, given)[0] for given in (latent, {**latent, "noise_mask": half()}))
    assert torch.equal(plain.residuals, masked.residuals)
    edit(kind, plain, cfg=2.0, mask=half()[0])


def wan22():
    """A tiny Wan 2.2 5B, to which the mask says which frames are clean."""
    family, _, _, own = tiny_flow.KINDS["wan"]
    config = comfy.supported_models.WAN22_T2V({**own, "in_dim": 48, "out_dim": 48, "dtype": torch.float32})
    inner = comfy.model_base.WAN22(config)
    tiny_flow.fill(inner.diffusion_model, 0)
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize("node", [EditFriendlyInversion, DirectInversion])
def test_a_mask_of_clean_frames_is_refused(node):
    model, channels = wan22(), comfy.latent_formats.Wan22.latent_channels
    latent = {"samples": torch.randn(1, channels, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    pair = [tiny_flow.conditioning("wan", seed) for seed in (1, 2)]
    common = {"latent": latent, "pair": pair, "on": model, "scheduler": "simple", "steps": 3, "cfg": 1.0}
    inversion = runs.invert(node, "wan", **common)[0]
    ran = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="frames that are given clean"):
        edit("wan", inversion, cfg=1.0, pair=pair, on=model, mask=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="frames that are given clean"):
        runs.invert(node, "wan", **common | {"latent": {**latent, "noise_mask": torch.ones(1, 1, 64, 64)}})
    handle.remove()
    assert not ran


def test_masks_of_frames_stay_frames_with_several_draws():
    latent, masks = tiny_flow.latent("wan", 1, frames=3), torch.zeros(3, 64, 64)
    masks[1] = 1
    positive, negative = prompts("wan")
    for given in (None, masks[:, None]):
        picture = latent if given is None else {**latent, "noise_mask": given}
        made = FlowEditSource.execute(model=runs.model("wan"), positive=positive, negative=negative, latent=picture, draws=2,
                                      scheduler="simple", settings={"settings": "own", "steps": 6, "cfg": 2.0}, seed=0)[0]
        out = edit("wan", made, cfg=3.0, prompt=TARGET, mask=masks if given is None else None)
        moved = (out - latent["samples"]).abs().amax((0, 1, 3, 4))
        assert float(moved[1]) > 1e-3 and float(moved[[0, 2]].max()) < 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (1, 1, 64, 64)])
def test_masks_of_a_latent_may_have_any_of_cores_shapes(shape):
    latent = {**tiny.latent("sd1"), "noise_mask": torch.ones(shape)}
    assert invert("sd1", latent)[0].mask.shape == (1, 64, 64)
