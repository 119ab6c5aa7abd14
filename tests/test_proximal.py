"""Proximal guidance and the SDEdit path; the eta ramp of edit-friendly inversion."""
import functools

import numpy as np
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, RandomNoise
from comfyui_ledits.nodes.ddim_inversions import DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.proximal_guidance import ProximalGuidance
from comfyui_ledits.nodes.sdedit import SDEditPath
from comfyui_ledits.samplers.methods import proximal
from oracles import diffusion
from support import runs, tiny
from support.runs import EMPTY, SOURCE, TARGET, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
KINDS = ["sd1", "sd2", "sdxl", "sdxl_v"]
close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


def direct(kind, latent, **inputs):
    return runs.invert(DirectInversion, kind, latent, **inputs)[0]


def edit(kind, inversion, cfg=7.5, prompt=TARGET, **inputs):
    return runs.edit(kind, inversion, cfg=cfg, prompt=prompt, **inputs)


def proximal_model(kind, quantile=0.5, shape="soft", **more):
    return ProximalGuidance.execute(model=model(kind), quantile=quantile, kind=shape, **more)[0]


# --- proximal guidance ----------------------------------------------------------------------------------------------

def threshold(delta, quantile, kind):
    """Picture by picture, in numpy; the reference code's `delta -= delta.clamp(-t, t)` for soft."""
    out = delta.double().numpy().copy()
    for picture in out:
        t = np.quantile(abs(picture), quantile) if quantile else 0.0
        picture[...] = picture - picture.clip(-t, t) if kind == "soft" else np.where(abs(picture) > t, picture, 0)
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", proximal.KINDS)
@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.75, 0.95])
def test_weak_guidance_is_left_out_for_each_picture(kind, quantile):
    delta = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 0.1]).view(3, 1, 1, 1)
    result, level = proximal.shrink(delta, quantile, kind)
    close(result.double(), threshold(delta, quantile, kind), rtol=0, atol=1e-5)
    assert level.shape == (3, 1, 1, 1)
    share = (result == 0).double().flatten(1).mean(1)
    assert ((share - quantile).abs() < 0.02).all()


@pytest.mark.parametrize("shape", proximal.KINDS)
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_edit_is_a_plain_loop_with_thresholded_guidance(kind, shape):
    latent, timesteps = tiny.latent(kind), diffusion.ddim_uniform(10)
    inversion, (target, empty) = direct(kind, latent), prompts(kind, TARGET, EMPTY)
    x = inversion.latents[0].double() * diffusion.abar(timesteps[0]).sqrt()
    for t, p in zip(timesteps, timesteps[1:]):
        e_u = diffusion.eps(model(kind), empty, x, t)
        e = e_u + 7.5 * threshold(diffusion.eps(model(kind), target, x, t) - e_u, 0.5, shape)
        x = diffusion.step(x, e, t, p, eta=0.0)[0]
    edited = edit(kind, inversion, on=proximal_model(kind, 0.5, shape))
    close(edited, tiny.KINDS[kind][0].latent_format().process_out(x).float())
    assert not torch.allclose(edited, edit(kind, inversion), atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_with_core_samplers_and_the_model_stays_as_it_was(kind):
    (target, empty), latent = prompts(kind, TARGET, EMPTY), tiny.latent(kind, 2)
    sigmas, sampler = torch.tensor([10.0, 3.0, 1.0, 0.0]), KSamplerSelect.execute("euler")[0]

    def sample(own, cfg):
        guider = CFGGuider.execute(model=own, positive=target, negative=empty, cfg=cfg)[0]
        return runs.in_parts(guider, sampler, sigmas, latent, RandomNoise.execute(1)[0])

    before = sample(model(kind), 7.5)
    patched = proximal_model(kind)
    assert not torch.allclose(sample(patched, 7.5), before, atol=1e-3)
    close(sample(proximal_model(kind, 0.0), 7.5), before)  # nothing is left out
    assert torch.equal(sample(patched, 1.0), sample(model(kind), 1.0))  # no guidance
    assert torch.equal(sample(model(kind), 7.5), before)


@pytest.mark.parametrize(("hold", "eta"), [("picture", None), ("path", None), ("path", 1.0), ("path", 0.5),
                                           (proximal.RELEASED, None)])
@pytest.mark.parametrize("kind", ["sd1", "sdxl_v"])
def test_what_is_not_edited_is_held_to_the_source(kind, hold, eta):
    latent = tiny.latent(kind, 2)
    inversion = direct(kind, latent) if eta is None else runs.invert(EditFriendlyInversion, kind, latent, eta=eta)[0]
    free, held = (
        edit(kind, inversion, on=proximal_model(kind, 0.99, "hard", inversion=inversion, hold=h, strength=1.0,
                                                    start=0.0, radius=0)) - latent["samples"]
        for h in ("nothing", hold)
    )
    # of the last step's guidance 1 % exceeds the threshold: only there the picture may differ
    assert (held.abs() > 1e-4).float().mean() <= 0.02
    assert (free.abs() > 1e-4).float().mean() > 0.9


def released(kind, inversion, cfg, timesteps, strength, radius):
    """DDIMSchedulerDev.step and the l0 branch of the released code (recon_t 400), on its variance-preserving latents."""
    target, empty = prompts(kind, TARGET, EMPTY)
    x = inversion.latents[0].double() * diffusion.abar(timesteps[0]).sqrt()
    reference = inversion.latents[-1].double()
    for t, p in zip(timesteps, timesteps[1:]):
        a, b = diffusion.abar(t), diffusion.abar(p)
        e_u = diffusion.eps(model(kind), empty, x, t)
        delta = diffusion.eps(model(kind), target, x, t) - e_u
        level = delta.abs().flatten(1).quantile(0.5, 1).view(-1, 1, 1, 1)
        delta = delta - torch.minimum(torch.maximum(delta, -level), level)
        e = e_u + cfg * delta
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        if t < 400:
            mask = (delta.abs() > level).double()
            mask = torch.nn.functional.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius) if radius else mask
            x0 = x0 - strength * (x0 - reference) * (1 - mask)
        x = b.sqrt() * x0 + (1 - b).sqrt() * e
    return tiny.KINDS[kind][0].latent_format().process_out(x / diffusion.abar(timesteps[-1]).sqrt()).float()


@pytest.mark.parametrize("strength, radius", [(0.1, 0), (0.1, 1), (0.7, 1)])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_holding_to_the_picture_as_released(kind, strength, radius):
    """By the LEDITS sampler and by core's, at the same strength as the released code."""
    latent, timesteps = tiny.latent(kind, 2), diffusion.ddim_uniform(10)
    inversion = direct(kind, latent)
    expected = released(kind, inversion, 7.5, timesteps, strength, radius)
    own = {hold: proximal_model(kind, inversion=inversion, hold=hold, strength=strength, radius=radius)
           for hold in (proximal.RELEASED, "picture")}
    close(edit(kind, inversion, on=own[proximal.RELEASED]), expected, rtol=1e-3, atol=2e-3)
    guider = CFGGuider.execute(model=own[proximal.RELEASED], positive=prompts(kind, TARGET)[0],
                               negative=prompts(kind, EMPTY)[0], cfg=7.5)[0]
    start = {"samples": inversion.latent_format.process_out(inversion.latents[0])}
    close(runs.in_parts(guider, KSamplerSelect.execute("euler")[0], inversion.sigmas, start), expected, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(edit(kind, inversion, on=own["picture"]), expected, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_released_hold_moves_the_latent_by_its_strength_whatever_the_noise(eta):
    """One step of the path, everything held: the next latent moves by strength * (goal - D), in any kind of step."""
    inversion = runs.invert(EditFriendlyInversion, "sd1", tiny.latent(), eta=eta)[0]
    i, strength = 6, 0.3
    sigma, step = float(inversion.sigmas[i]), inversion.step(i)
    pair = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    guidance = proximal.Proximal(0.999, "hard", proximal.RELEASED, inversion, strength, start=1e9, radius=0)
    out = guidance({"conds": [1, 1], "conds_out": pair, "cond_scale": 3.0, "sigma": torch.tensor([sigma]),
                    "input": inversion.latents[i], "model_options": {}})
    delta, level = proximal.shrink(pair[0] - pair[1], 0.999, "hard")
    d, moved = pair[1] + 3.0 * delta, out[1] + 3.0 * (out[0] - out[1])
    outside = proximal.edited(delta, level, 0) == 0
    expected = strength * (inversion.goal(sigma) - d)
    close((step.take * (moved - d))[outside], expected[outside], rtol=1e-3, atol=1e-4)


def test_holding_begins_at_start_and_dilation_frees_the_surroundings():
    delta = torch.zeros(1, 1, 7, 7)
    delta[0, 0, 3, 3] = -2.0
    for radius, count in ((0, 1), (1, 9), (2, 25)):
        assert proximal.edited(delta, torch.ones(1, 1, 1, 1), radius).sum() == count
    latent = tiny.latent()
    inversion = direct("sd1", latent)
    late = edit("sd1", inversion, on=proximal_model("sd1", inversion=inversion, hold="path", strength=1.0, start=1.0))
    never = edit("sd1", inversion, on=proximal_model("sd1"))
    assert torch.equal(late, never)
    half = edit("sd1", inversion, on=proximal_model("sd1", inversion=inversion, hold="path", strength=0.5, start=0.5))
    assert not torch.allclose(half, never, atol=1e-3)
    assert (half - latent["samples"]).pow(2).mean() < (never - latent["samples"]).pow(2).mean()


def test_holding_without_a_source_or_to_another_is_refused():
    with pytest.raises(ValueError, match="inversion is needed"):
        proximal_model("sd1", hold="path")
    inversion = direct("sd1", tiny.latent())
    patched = proximal_model("sd1", inversion=direct("sd1", tiny.latent(height=16)), hold="picture", start=0.0)
    with pytest.raises(ValueError, match="connect the inversion that is edited"):
        edit("sd1", inversion, on=patched)
    patched = proximal_model("sd1", inversion=direct("sd1", tiny.latent(), steps=7), hold="path", start=0.0)
    with pytest.raises(ValueError, match="other noise levels"):
        edit("sd1", inversion, on=patched)


# --- SDEdit ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("skip", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_the_sdedit_path_is_image_to_image(kind, skip):
    latent, (target, empty) = tiny.latent(kind), prompts(kind, TARGET, EMPTY)
    inversion, x_T, _ = SDEditPath.execute(model=model(kind), latent=latent, steps=10, scheduler="ddim_uniform",
        seed=3).result
    guider = CFGGuider.execute(model=model(kind), positive=target, negative=empty, cfg=5.0)[0]
    sampler = KSamplerSelect.execute("euler")[0]
    expected = runs.in_parts(guider, sampler, inversion.sigmas[skip:], latent, RandomNoise.execute(3)[0])
    close(edit(kind, inversion, cfg=5.0, skip=skip), expected)
    y_0 = tiny.KINDS[kind][0].latent_format().process_in(latent["samples"])
    noise = torch.randn(y_0.shape, generator=torch.Generator("cpu").manual_seed(3))
    for sigma, y in zip(inversion.sigmas, inversion.latents):
        close(y, y_0 + sigma * noise, rtol=0, atol=1e-5)
    close(x_T["samples"], tiny.KINDS[kind][0].latent_format().process_out(inversion.latents[0]))


def test_a_picture_of_a_batch_has_its_own_noise():
    latent = tiny.latent(batch=3)
    together = SDEditPath.execute(model=model("sd1"), latent=latent, steps=10, scheduler="ddim_uniform", seed=3)[0]
    alone = SDEditPath.execute(model=model("sd1"), latent={"samples": latent["samples"][2:]}, steps=10,
        scheduler="ddim_uniform", seed=5)[0]
    assert torch.equal(together.latents[:, 2:], alone.latents)
    assert not torch.allclose(together.latents[0, 0], together.latents[0, 1], atol=1.0)


# --- edit-friendly inversion with another eta at every step ---------------------------------------------------------

@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.2, 0.9), (0.5, -1.0)])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_eta_may_change_along_the_path(kind, start, end):
    latent, timesteps = tiny.latent(kind), diffusion.ddim_uniform(10)
    pair = prompts(kind, SOURCE, EMPTY)
    inversion = runs.invert(EditFriendlyInversion, kind, latent, cfg=3.5, eta=start, eta_end=end)[0]
    last = start if end < 0 else end
    etas = [start + (last - start) * i / 9 for i in range(10)]
    close(inversion.etas.double(), torch.tensor(etas, dtype=torch.float64), rtol=0, atol=1e-6)
    predict = diffusion.guided(model(kind), *pair, 3.5)
    for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
        x = inversion.latents[i].double() * diffusion.abar(t).sqrt()
        mean = diffusion.step(x, predict(x, t), t, p, etas[i])[0] / diffusion.abar(p).sqrt()
        close(inversion.residuals[i].double(), inversion.latents[i + 1].double() - mean, rtol=0, atol=2e-4)
    close(edit(kind, inversion, cfg=3.5, prompt=SOURCE), latent["samples"], rtol=0, atol=1e-4)
