"""Edit-friendly inversion: it gives every picture back, and it is the papers' path, noise maps and edit."""
import functools

import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from comfyui_ledits.nodes.unpack_pack import PackInversion, UnpackInversion
from comfyui_ledits.samplers.methods import edit_friendly
from comfyui_ledits.samplers.methods.families import FAMILIES
from comfyui_ledits.samplers.methods.record import Inversion
from oracles import diffusion
from support import runs, tiny
from support.runs import EMPTY, SOURCE, TARGET, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode", "unsettled")


def invert(kind, latent, cfg=3.5, **inputs):
    return runs.invert(EditFriendlyInversion, kind, latent, cfg=cfg, **inputs)


def edit(kind, inversion, cfg=3.5, **inputs):
    return runs.edit(kind, inversion, cfg=cfg, **inputs)


def error(samples, latent):
    assert samples.dtype == torch.float32
    return float((samples - latent["samples"]).abs().max())


# --- the picture comes back -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl_v"])
def test_the_same_prompt_and_cfg_give_the_picture_back(kind, batch, cfg):
    latent = tiny.latent(kind, batch)
    inversion, x_T, _ = invert(kind, latent, cfg=cfg, steps=20).result
    assert inversion.steps == 20
    samples = edit(kind, inversion, cfg=cfg)
    assert error(samples, latent) < 1e-4
    # and the test can tell: another prompt, another start
    assert error(edit(kind, inversion, cfg=cfg, prompt=TARGET), latent) > 0.1
    assert error(x_T["samples"], latent) > 10


@pytest.mark.parametrize("end", ["to 0", "above 0"])
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_every_skip_solver_eta_and_end_gives_the_picture_back(kind, solver, eta, end):
    latent = tiny.latent(kind)
    sigmas = torch.tensor([14.6, 6.0, 2.5, 1.2, 0.6, 0.2, 0.03] + [0.0] * (end == "to 0"))
    inversion = invert(kind, latent, eta=eta, sigmas=sigmas)[0]
    for skip in range(len(sigmas) - 1):
        assert error(edit(kind, inversion, skip=skip, solver=solver), latent) < 1e-4, f"skip {skip}"


@pytest.mark.parametrize("size", [(8, 16), (9, 7), (5, 12), (3, 5)])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_other_sizes_than_the_square_give_the_picture_back(kind, size):
    latent = tiny.latent(kind, 2, *size)
    assert error(edit(kind, invert(kind, latent)[0]), latent) < 1e-4


@pytest.mark.parametrize("scheduler", ["normal", "karras", "exponential", "sgm_uniform", "simple", "beta"])
def test_every_scheduler_gives_the_picture_back(scheduler):
    latent = tiny.latent()
    inversion = invert("sd1", latent, scheduler=scheduler)[0]
    assert error(edit("sd1", inversion), latent) < 1e-4


# --- batching over steps changes nothing ----------------------------------------------------------------------------

@pytest.mark.parametrize("at_once", [0, 3, 1000])
@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize(("kind", "batch"), [("sd1", 1), ("sd1", 3), ("sd2", 2), ("sdxl", 2)])
def test_batched_inversion_is_one_by_one_inversion(kind, batch, cfg, at_once):
    latent, results = tiny.latent(kind, batch), []
    for n in (1, at_once):
        with tiny.Calls(model(kind)) as calls:
            output = invert(kind, latent, cfg=cfg, steps_at_once=n)
        results.append((output[0], calls, output.ui["ledits"][0]["unet_rows"]))
    (one, one_calls, one_rows), (many, many_calls, many_rows) = results
    assert len(many_calls.calls) < len(one_calls.calls) == 10
    assert one_rows == one_calls.rows == many_rows == many_calls.rows == 10 * batch * (1 if cfg == 1 else 2)
    assert torch.equal(one.latents, many.latents)
    torch.testing.assert_close(many.residuals, one.residuals, rtol=0, atol=1e-4)
    assert error(edit(kind, many, cfg=cfg), latent) < 1e-4


@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (4, 2), (20, 8)])
def test_at_most_sixteen_pictures_share_a_call(batch, calls):
    with tiny.Calls(model("sd1")) as seen:
        invert("sd1", tiny.latent("sd1", batch), cfg=1.0, steps=8)
    assert [len(levels) for levels, _ in seen.calls] == [8 * batch // calls] * calls


@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_a_picture_of_a_batch_is_inverted_as_alone_with_its_own_seed(seed):
    latent = tiny.latent(batch=3)
    together = invert("sd1", latent, seed=seed)[0]
    for b in range(3):
        alone = invert("sd1", {"samples": latent["samples"][b : b + 1]}, seed=(seed + b) % 2**64)[0]
        assert torch.equal(together.latents[:, b : b + 1], alone.latents)
        torch.testing.assert_close(together.residuals[:, b : b + 1], alone.residuals, rtol=0, atol=1e-4)
    assert not torch.equal(together.latents[0, 0], together.latents[0, 1])


# --- it is the papers' algorithm ------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_path_noise_maps_and_edit_are_those_of_the_papers(kind, cfg, eta):
    latent, timesteps = tiny.latent(kind, height=6), diffusion.ddim_uniform(10)
    inversion = invert(kind, latent, cfg=cfg, eta=eta, seed=7)[0]
    x_0 = latent["samples"].double() * tiny.scale(kind)
    source, empty, target = prompts(kind, SOURCE, EMPTY, TARGET)
    x, rest = diffusion.invert(
        diffusion.guided(model(kind), source, empty, cfg), x_0, timesteps, diffusion.noise(7, 10, x_0.shape), eta
    )
    maps = inversion.noise_maps()
    for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
        close(inversion.sigmas[i], diffusion.sigma(t))
        close(inversion.latents[i], x[i] / diffusion.abar(t).sqrt())
        std = diffusion.step(x_0, x_0, t, p, eta)[1]
        close(inversion.residuals[i], rest[i] / diffusion.abar(p).sqrt())
        close(maps[i], rest[i] / std if std > 0 else rest[i] / diffusion.abar(p).sqrt())

    predict = diffusion.guided(model(kind), target, empty, 5.0)
    expected = diffusion.edit(predict, x[4], rest[4:], timesteps[4:], eta) / tiny.scale(kind)
    edited = edit(kind, inversion, cfg=5.0, skip=4, prompt=TARGET)
    torch.testing.assert_close(edited, expected.float(), rtol=1e-3, atol=1e-3)
    assert error(edited, latent) > 0.1


def test_noise_maps_of_a_perfect_denoiser_have_the_variance_and_correlation_of_the_paper():
    """z_i = (n_p - r * n_t) / sqrt(1 - r^2) where D is the picture: Var z = (1 + r^2) / (1 - r^2), and neighbours share
    one noise (arXiv 2304.06140, section 3.2)."""
    sigmas = torch.tensor([10.0, 7.0, 5.5, 3.0, 2.7, 0.5])
    picture = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    latents = edit_friendly.noisy_path(picture, sigmas, edit_friendly.draw_noise(picture.shape, 5, seed=1),
                                       family=FAMILIES["ve"])
    latents[-1] += sigmas[-1] * torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
    rest = edit_friendly.residuals(latents, sigmas, torch.ones(5), lambda y, sigma, i: picture.expand_as(y), chunk=2,
                                   family=FAMILIES["ve"])
    z = Inversion(sigmas=sigmas, latents=latents, residuals=rest, etas=torch.ones(5), family="ve", model="none",
                  method="test").noise_maps().flatten(1)
    r = sigmas[1:] / sigmas[:-1]
    torch.testing.assert_close(z.var(1), (1 + r**2) / (1 - r**2), rtol=0.03, atol=0)
    neighbours = torch.stack([torch.corrcoef(z[i : i + 2])[0, 1] for i in range(4)])
    expected = -r[1:] / ((1 + r[:-1] ** 2) * (1 + r[1:] ** 2)).sqrt()
    torch.testing.assert_close(neighbours, expected, rtol=0, atol=0.02)


# --- other ways to the same result ----------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde"])
@pytest.mark.parametrize(("kind", "batch", "skip"), [("sd1", 1, 0), ("sd2", 2, 3), ("sdxl", 2, 9)])
def test_guider_and_sampler_are_the_all_in_one_node_bit_for_bit(kind, batch, skip, solver):
    inversion, x_T, _ = invert(kind, tiny.latent(kind, batch)).result
    target, empty = prompts(kind, TARGET, EMPTY)
    guider = LeditsGuiderNode.execute(model=model(kind), positive=target, negative=empty, cfg=6.0)[0]
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=skip, solver=solver).result
    samples = runs.in_parts(guider, sampler, sigmas, x_T)
    assert torch.equal(samples, edit(kind, inversion, cfg=6.0, skip=skip, prompt=TARGET, solver=solver))


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_unpack_and_pack_are_a_round_trip(kind, eta):
    latent = tiny.latent(kind, 2, 6, 9)
    inversion = invert(kind, latent, eta=eta)[0]
    path, maps, sigmas = UnpackInversion.execute(inversion=inversion).result
    assert path["samples"].shape == (22, 4, 6, 9)
    assert maps["samples"].shape == (20, 4, 6, 9)
    torch.testing.assert_close(path["samples"][-2:], latent["samples"])
    packed = PackInversion.execute(inversion=inversion, path=path, noise_maps=maps, sigmas=sigmas)[0]
    for name in ("latents", "residuals", "sigmas", "etas"):
        torch.testing.assert_close(getattr(packed, name), getattr(inversion, name), rtol=1e-6, atol=1e-6)
    assert error(edit(kind, packed), latent) < 1e-4


def test_what_is_changed_between_unpack_and_pack_is_what_the_edit_uses():
    latent = tiny.latent(batch=2)
    inversion = invert("sd1", latent)[0]
    path, maps, _ = UnpackInversion.execute(inversion=inversion).result
    swapped = [{"samples": part["samples"].view(-1, 2, 4, 8, 8).flip(1).flatten(0, 1)} for part in (path, maps)]
    samples = edit("sd1", PackInversion.execute(inversion=inversion, path=swapped[0], noise_maps=swapped[1])[0])
    assert error(samples.flip(0), latent) < 1e-4
    assert error(edit("sd1", PackInversion.execute(inversion=inversion, noise_maps=swapped[1])[0]), latent) > 0.1
    assert error(edit("sd1", PackInversion.execute(inversion=inversion)[0]), latent) < 1e-4
