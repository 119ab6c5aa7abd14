"""DDIM inversion and Direct Inversion: diffusers' path, the paper's offsets, and what fixed-point refinement is worth."""
import functools
import logging

import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion
from comfyui_ledits.samplers.methods import ddim
from comfyui_ledits.samplers.methods.families import FAMILIES
from oracles import diffusion
from support import runs, tiny
from support.runs import EMPTY, RESIMULATED, SOURCE, TARGET, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
KINDS = ["sd1", "sd2", "sdxl", "sdxl_v"]
invert = functools.partial(runs.invert, DDIMInversion)


def direct(kind, latent, **ablation):
    return runs.invert(DirectInversion, kind, latent, ablation={"ablation": "none", **ablation})


def edit(kind, inversion, cfg=1.0, **inputs):
    return runs.edit(kind, inversion, cfg=cfg, **inputs)


def picture_of(kind, latent):
    """As the model sees it, float64."""
    return tiny.KINDS[kind][0].latent_format().process_in(latent["samples"]).double()


def in_vp(inversion, timesteps):
    """The latents of a path in variance-preserving units, float64."""
    return [y.double() * diffusion.abar(t).sqrt() for y, t in zip(inversion.latents, timesteps)]


close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)


# --- the paper's algorithm, variance-preserving, in float64 ---------------------------------------------------------

def climb(network, words, x, timesteps, v_prediction):
    """DDIM inversion, noisiest latent first: the latent of s with the timestep of t (Direct Inversion's code, whose
    scheduler reads v at the latent's own level)."""
    path = [x]
    for t, s in list(zip(timesteps, timesteps[1:]))[::-1]:
        high, low = diffusion.abar(t), diffusion.abar(s)
        e = network(x.float(), torch.tensor([float(t)]), context=words).double()
        e = low.sqrt() * e + (1 - low).sqrt() * x if v_prediction else e
        x = high.sqrt() * (x - (1 - low).sqrt() * e) / low.sqrt() + (1 - high).sqrt() * e
        path.insert(0, x)
    return path


def ddim_step(predict, x, t, p):
    return diffusion.step(x, predict(x, t), t, p, eta=0.0)[0]


def paper(kind, latent, steps=10, cfg=7.5):
    """Timesteps, the path at guidance 1, and the predictions of an edit with the source's and the target's words."""
    source, empty, target = prompts(kind, SOURCE, EMPTY, TARGET)
    timesteps = diffusion.ddim_uniform(steps)
    network, words = model(kind).model.diffusion_model, source[0][0]
    path = climb(network, words, picture_of(kind, latent), timesteps, kind == "sd2")
    return timesteps, path, *(diffusion.guided(model(kind), words, empty, cfg) for words in (source, target))


# --- the path -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_path_is_that_of_diffusers(kind, cfg):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMInverseScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, prediction_type="epsilon" if kind == "sd1" else "v_prediction")
    scheduler.set_timesteps(20)
    latent = tiny.latent(kind, 2)
    inversion, x_T, _ = invert(kind, latent, cfg=cfg, steps=20).result
    x, network = picture_of(kind, latent).float(), model(kind).model.diffusion_model
    source, empty = (c[0][0].expand(2, -1, -1) for c in prompts(kind, SOURCE, EMPTY))
    for i, t in enumerate(scheduler.timesteps):
        outputs = [network(x, t.float().expand(2), context=words) for words in (source, empty)]
        x = scheduler.step(outputs[1] + cfg * (outputs[0] - outputs[1]), t, x).prev_sample
        close(inversion.latents[19 - i] * (1 + inversion.sigmas[19 - i] ** 2) ** -0.5, x)
    close(x_T["samples"], tiny.KINDS[kind][0].latent_format().process_out(inversion.latents[0]))
    assert not torch.allclose(x, picture_of(kind, latent).float(), atol=0.1)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_convention_b_tells_the_network_the_level_it_comes_from(kind):
    latent, timesteps = tiny.latent(kind), diffusion.ddim_uniform(10)
    inversion = invert(kind, latent, convention="B")[0]
    x, words = picture_of(kind, latent), prompts(kind, SOURCE)[0]
    for i, (t, s) in reversed(list(enumerate(zip(timesteps, timesteps[1:])))):
        if s >= 0:
            e = diffusion.eps(model(kind), words, x, s)
        else:  # the picture itself has no timestep: 0 is the nearest. It holds no noise, so v is eps.
            e = model(kind).model.diffusion_model(x.float(), torch.zeros(1), context=words[0][0]).double()
        high, low = diffusion.abar(t), diffusion.abar(s)
        x = high.sqrt() * (x - (1 - low).sqrt() * e) / low.sqrt() + (1 - high).sqrt() * e
        close(in_vp(inversion, timesteps)[i], x)
    other = invert(kind, latent)[0]
    assert (other.latents[0] - inversion.latents[0]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "convention"), [*((kind, "A") for kind in KINDS), ("sd1", "B"), ("sd2", "B")])
def test_enough_refinements_give_the_picture_back(kind, convention):
    latent, errors = tiny.latent(kind, 2), []
    for n in (0, 20):
        inversion = invert(kind, latent, refinements=n, tolerance=1e-7, convention=convention)[0]
        errors.append(float((edit(kind, inversion) - latent["samples"]).pow(2).mean().sqrt()))
    assert errors[1] < 1e-4 < errors[0]


def test_a_path_may_end_above_zero():
    latent, sigmas = tiny.latent(), torch.tensor([14.6, 6.0, 2.5, 1.2, 0.6, 0.2, 0.03])
    for convention in ("A", "B"):
        inversion = invert("sd1", latent, refinements=20, convention=convention, sigmas=sigmas)[0]
        assert torch.equal(inversion.sigmas, sigmas)
        close(edit("sd1", inversion), latent["samples"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_a_batch_is_inverted_as_alone(kind):
    latent = tiny.latent(kind, 3)
    together = invert(kind, latent, refinements=4, tolerance=1e-3)[0]
    for b in range(3):
        alone = invert(kind, {"samples": latent["samples"][b : b + 1]}, refinements=4, tolerance=1e-3)[0]
        close(together.latents[:, b : b + 1], alone.latents)


def test_a_tolerance_ends_refinement_early():
    latent, rows = tiny.latent(), {}
    for tolerance in (0.0, 1e-4, 1.0):
        with tiny.Calls(model("sd1")) as calls:
            output = invert("sd1", latent, refinements=9, tolerance=tolerance)
        rows[tolerance] = calls.rows
        assert output.ui["ledits"][0]["unet_rows"] == calls.rows
    assert rows[0.0] == 100
    assert rows[1.0] == 20
    assert 20 < rows[1e-4] < 100


def test_strong_guidance_while_inverting_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        invert("sd1", tiny.latent(), cfg=2.0, steps=2)
        assert "LEDITS" not in caplog.text
        invert("sd1", tiny.latent(), cfg=2.5, steps=2)
        assert "cfg 2.5" in caplog.text


# --- the source branch during an edit -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_re_simulated_source_is_sampled_from_x_T_at_the_edits_guidance(kind):
    latent = tiny.latent(kind)
    timesteps, path, source, _ = paper(kind, latent)
    inversion = invert(kind, latent, path=RESIMULATED)[0]
    x = path[0]
    for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
        x = ddim_step(source, x, t, p)
        close(in_vp(inversion, timesteps)[i + 1], x, atol=1e-3)
    assert (x - path[-1]).abs().max() > 0.1
    close(inversion.latents[0].double() * diffusion.abar(timesteps[0]).sqrt(), path[0])


def offsets(timesteps, path, predict, scale=1.0, every=1):
    """Direct Inversion's first pass with one row (arXiv 2310.01506, algorithm 1; the ablations from its code)."""
    x, found = path[0], []
    for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
        sampled = ddim_step(predict, x, t, p)
        found.append(scale * (path[i + 1] - sampled) if i % every == 0 else torch.zeros_like(x))
        x = sampled + found[-1]
    return found


@pytest.mark.parametrize(("ablation", "weaker"), [
    ({}, {}),
    ({"ablation": "scaled offset", "edit_cfg": 7.5, "scale": 0.4}, {"scale": 0.4}),
    ({"ablation": "every n-th step", "edit_cfg": 7.5, "every": 3}, {"every": 3}),
])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_direct_path_is_the_source_branch_with_the_papers_offsets(kind, ablation, weaker):
    latent = tiny.latent(kind)
    timesteps, path, source, _ = paper(kind, latent)
    inversion = direct(kind, latent, **ablation)[0]
    x, stored, found = path[0], in_vp(inversion, timesteps), offsets(timesteps, path, source, **weaker)
    for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
        x = ddim_step(source, x, t, p) + found[i]  # the second pass, source row
        close(stored[i + 1], x, atol=1e-3 if weaker else 1e-4)
    drift = max(float((a - b).abs().max()) for a, b in zip(stored, path))
    assert drift > 0.05 if weaker else drift < 1e-4


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_offsets_on_the_target_side_are_added_to_the_edit(kind):
    latent = tiny.latent(kind)
    timesteps, path, source, target = paper(kind, latent)
    inversion = direct(kind, latent, ablation="target side", edit_cfg=7.5)[0]
    x = path[0]
    for t, p, o in zip(timesteps, timesteps[1:], offsets(timesteps, path, source)):
        x = ddim_step(target, x, t, p) + o
    expected = tiny.KINDS[kind][0].latent_format().process_out(x).float()
    edited = edit(kind, inversion, cfg=7.5, prompt=TARGET)
    close(edited, expected, rtol=1e-3, atol=1e-3)
    close(edit(kind, inversion, cfg=7.5), latent["samples"])
    assert (edited - latent["samples"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_batch_goes_through_every_variant(kind):
    latent = tiny.latent(kind, 2, 6, 9)
    plain = direct(kind, latent)[0]
    close(plain.latents, invert(kind, latent)[0].latents, rtol=0, atol=0)
    assert plain.residuals is None
    assert not plain.etas.any()
    options = [{"ablation": "scaled offset", "scale": 0.5}, {"ablation": "every n-th step", "every": 2},
               {"ablation": "target side"}]
    others = [direct(kind, latent, edit_cfg=3.0, **o)[0] for o in options] + [invert(kind, latent, path=RESIMULATED)[0]]
    assert len({other.method for other in [plain, *others]}) == 5
    for other in others:
        assert torch.equal(other.latents[0], plain.latents[0])
        assert other.settings["edit_cfg"] in (3.0, 7.5)
        samples = edit(kind, other, cfg=3.0, prompt=TARGET)
        assert samples.shape == latent["samples"].shape
        assert torch.isfinite(samples).all()
    close(edit(kind, others[2], cfg=3.0), latent["samples"])


# --- fixed points, on a model whose denoiser is known ---------------------------------------------------------------

class Mixture:
    """The exact denoiser of a mixture of Gaussians, by Bayes' rule; a picture drawn from it."""

    def __init__(self, parts=6, std=0.3):
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(parts, 4, 8, 8, generator=generator, dtype=torch.float64)
        self.variance = std**2
        noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        self.pictures = self.means[:2] + std * noise

    def __call__(self, y, sigma, i=None):
        total = self.variance + sigma.view(-1, 1) ** 2
        apart = y[:, None] - self.means
        weights = (-apart.pow(2).flatten(2).sum(2) / (2 * total)).softmax(1)[..., None, None, None]
        return (weights * (self.means + apart * (self.variance / total)[..., None, None, None])).sum(1)


def round_trip(steps, **how):
    mixture = Mixture()
    sigmas = torch.tensor([float(diffusion.sigma(t)) for t in diffusion.ddim_uniform(steps)], dtype=torch.float64)
    path = ddim.invert(mixture.pictures, sigmas, mixture, family=FAMILIES["ve"], scaling=ddim.eps_scaling, lowest=0.0292, **how)
    y = path[0]
    for s, p in zip(sigmas, sigmas[1:]):  # plain Euler
        y = y + (p - s) / s * (y - mixture(y, s.expand(len(y))))
    return float((y - mixture.pictures).pow(2).mean().sqrt())


def test_one_refinement_lowers_the_round_trip_error_at_least_five_times():
    errors = [round_trip(50, refinements=n) for n in (0, 1, 2, 20)]
    assert errors[0] > 1e-3
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1]
    assert errors[3] < 1e-9


def test_convention_a_misses_by_less_than_b_and_more_steps_by_less():
    assert round_trip(50) < round_trip(50, convention="B")
    assert round_trip(200) < round_trip(50) / 2
