"""RF-Inversion, Hold to Picture and proximal guidance on flow models, against the papers' formulas."""
import functools

import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.proximal_guidance import ProximalGuidance
from comfyui_ledits.nodes.rf_inversion import HoldToPicture, RFInversion
from comfyui_ledits.samplers.methods import proximal, rf_inversion
from comfyui_ledits.samplers.methods.edit_friendly import draw_noise
from oracles import flow as oracles
from support import runs, tiny_flow
from support.runs import EMPTY, TARGET, edit, error, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")
STEPS = 8
invert = functools.partial(runs.invert, scheduler="simple", steps=STEPS)
EXACT = 1e-5


# --- RF-Inversion -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "wan"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_rf_inversion_is_the_papers_controlled_ode(kind, gamma):
    """arXiv 2410.10792, eq. 8, typed in the paper's own time t = 1 - s with its velocity v^ = -v."""
    latent, (source, empty) = tiny_flow.latent(kind), prompts(kind)
    inversion = invert(RFInversion, kind, latent, gamma=gamma, seed=5)[0]
    x0, sigmas = runs.in_model_space(kind, latent["samples"]), inversion.sigmas.tolist()
    velocity = oracles.velocities(model(kind), {"source": source, "negative": empty}, x0.shape)
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
    velocity = oracles.velocities(model(kind), {"target": target, "negative": empty}, x0.shape)
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
