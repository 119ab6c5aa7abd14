"""StyleDiffusion: only `to_v` sees what is learned, and that is what the paper's loop learns."""
import functools
import json

import comfy.clip_vision
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfyui_ledits.attention_hooks.blocks import Layer, Layout, at_quarter_resolution
from comfyui_ledits.nodes.learned_inversions import StyleDiffusionInversion
from comfyui_ledits.samplers import attention_taps
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.methods import style_diffusion
from oracles import diffusion, learning
from support import runs, tiny
from support.runs import model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
CFG = 7.5
invert = functools.partial(runs.invert, StyleDiffusionInversion, cfg=CFG, steps=3)
edit = functools.partial(runs.edit, "sd1", cfg=CFG)


# --- what is learned ------------------------------------------------------------------------------------------------

def coarse(network, x, words, vector):
    """Cross-attention at the coarser of a tiny model's two levels, down and up; of several layers in a row the last."""
    with network.watching(network.cross) as maps:
        network.eps(x, 500, words, vector)
    names = [name for name, m in zip(network.cross, maps) if m.shape[1] == 16 and not name.startswith("middle")]
    return list({name.split(".transformer_blocks")[0]: name for name in names}.values())


@pytest.mark.parametrize("kind, batch, attention", [("sd1", 2, 1.0), ("sd2", 1, 0.0), ("sdxl", 1, 1.0)])
def test_it_learns_what_the_papers_loop_learns(kind, batch, attention):
    inversion = invert(kind, batch=batch, attention_loss=attention)[0]
    learned = inversion.overrides["value"].double()
    assert learned.shape == (3, batch, 2, 77, tiny.CONTEXT)
    latent = tiny.latent(kind, batch)["samples"]
    with torch.inference_mode(False):
        network = learning.Network(kind)
        pictures = tiny.KINDS[kind][0].latent_format().process_in(latent.clone()).double()
        (words, null), vectors = ((c[0][0].double() for c in prompts(kind)), [network.vector(c, latent) for c in prompts(kind)])
        layers = coarse(network, pictures[:1], words, vectors[0]) if attention else []
        plain = torch.stack([torch.ones_like(words[0]), torch.zeros_like(words[0])])
        for b in range(batch):
            expected, losses = learning.style_diffusion(
                network, pictures[b : b + 1], diffusion.ddim_uniform(3), words, null, CFG, [3, 3, 3], layers, vectors
            )
            change = (expected - plain).abs().mean()
            assert change > 0.005
            assert (learned[:, b] - expected).abs().mean() < 0.02 * change
        if batch == 1:
            assert inversion.settings["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_source_may_be_sampled_anew_with_what_was_learned(kind):
    """As the papers' code does: with the learned values at every step, whatever tau_v says of the edit."""
    held, resampled = (invert(kind, tau_v=0.4, path=path)[0] for path in ("inverted", "re-simulated"))
    assert resampled.settings["tau_v"] == 0.4 and held.settings == resampled.settings
    value, timesteps = held.overrides["value"].double(), diffusion.ddim_uniform(3)
    assert torch.equal(value, resampled.overrides["value"].double())
    with torch.inference_mode(False):
        network, pair = learning.Network(kind), prompts(kind)
        vectors = [network.vector(c, tiny.latent(kind)["samples"]) for c in pair]
        words, null = (c[0][0].double() for c in pair)
        x = held.latents[0].double() * diffusion.abar(timesteps[0]).sqrt()
        for i, (t, p) in enumerate(zip(timesteps, timesteps[1:])):
            own = words * value[i, :, 0] + value[i, :, 1]
            e_c = network.as_eps(network.eps(x, t, words, vectors[0], own), x, t)
            e_u = network.as_eps(network.eps(x, t, null, vectors[1]), x, t)
            x = diffusion.step(x, e_u + CFG * (e_c - e_u), t, p, eta=0.0)[0]
            assert (resampled.latents[i + 1].double() * diffusion.abar(p).sqrt() - x).abs().max() < 2e-3
    assert (held.latents[-1] - resampled.latents[-1]).abs().max() > 1e-2


def test_more_learning_means_a_smaller_loss_and_a_better_picture_at_the_guidance():
    latent = tiny.latent()["samples"]

    def outcome(first_steps):
        inversion = invert(first_steps=first_steps, steps=4)[0]
        return inversion.settings.get("loss"), float((edit(inversion) - latent).pow(2).mean())

    nothing, little, much = outcome(0), outcome(2), outcome(20)
    assert nothing[0] is None and much[0] < 0.8 * little[0]
    assert much[1] < 0.6 * nothing[1]


def test_inner_steps_fall_as_in_the_papers_code():
    assert [style_diffusion.inner_steps(i) for i in (0, 1, 2)] == [100, 91, 82]
    assert sum(style_diffusion.inner_steps(i) for i in range(30)) <= 1015
    assert sum(style_diffusion.inner_steps(i) for i in range(50)) <= 1071


def test_sd15_compares_the_papers_five_layers():
    sizes = {("input", n): s for ns, s in (((1, 2), 64), ((4, 5), 32), ((7, 8), 16)) for n in ns} | {("middle", 0): 8}
    sizes |= {("output", n): s for ns, s in (((3, 4, 5), 16), ((6, 7, 8), 32), ((9, 10, 11), 64)) for n in ns}
    layers = (Layer(part=part, number=number, index=0, level=(64 // side).bit_length() - 1, width=320, order=k)
              for k, ((part, number), side) in enumerate(sizes.items()))
    layout = Layout(layers=tuple(layers), resblocks=())
    five = {("input", 7, 0), ("input", 8, 0), ("output", 3, 0), ("output", 4, 0), ("output", 5, 0)}
    assert set(at_quarter_resolution(layout, (64, 64))) == five
    assert set(at_quarter_resolution(layout, (96, 64))) == five


# --- what it does to an edit ----------------------------------------------------------------------------------------

def by_hand(kind, y, sigma, t, value):
    """Guided D in float64, the input of every `to_v` replaced in the positive's prediction."""
    network = learning.Network(kind)
    (words, null), (y_words, y_null) = ((c[0][0].double() for c in prompts(kind)), (network.vector(c, y) for c in prompts(kind)))
    y = y.double()
    x = y * diffusion.abar(t).sqrt()
    e_c = network.as_eps(network.eps(x, t, words, y_words, value), x, t)
    e_u = network.as_eps(network.eps(x, t, null, y_null), x, t)
    return y - sigma * (e_u + CFG * (e_c - e_u))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_only_to_v_of_the_positive_sees_the_learned_words(kind):
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(1, 2, 77, tiny.CONTEXT, generator=generator)
    seen = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            patch = attention_taps.ValuePatch([guider.conds["positive"][0]["uuid"]])
            options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
            patch.install(options)
            for name, patch.value in (("without", None), ("with", value)):
                seen[name] = guider(latent_image, sigmas[:1].expand(1), **{**extra_args, "model_options": options})
            seen["y"], seen["sigma"] = latent_image, sigmas[0]
            return latent_image

    t = diffusion.ddim_uniform(3)[1]
    latent = tiny.latent(kind)["samples"]
    guider = LeditsGuider(model(kind), *prompts(kind), CFG)
    guider.sample(torch.zeros_like(latent), latent, Probe(), torch.tensor([diffusion.sigma(t), 0.0]), disable_pbar=True)
    words = prompts(kind)[0][0][0].double()
    with torch.inference_mode(False):
        y, sigma = seen["y"].clone(), float(seen["sigma"])
        plain = by_hand(kind, y, sigma, t, None)
        changed = by_hand(kind, y, sigma, t, words * value[:, 0].double() + value[:, 1].double())
    apart = (changed - plain).abs().max()
    assert apart > 0.1
    assert (seen["without"] - plain).abs().max() < 1e-3 * apart
    assert (seen["with"] - changed).abs().max() < 1e-3 * apart


def test_tau_v_is_the_share_of_steps_that_use_the_values():
    inversion = invert(steps=4)[0]

    def with_tau(tau):
        return edit(type(inversion)(**{**vars(inversion), "settings": inversion.settings | {"tau_v": tau}}))

    def first(steps):
        value = inversion.overrides["value"].clone()
        value[steps:, :, 0], value[steps:, :, 1] = 1, 0
        return edit(type(inversion)(**{**vars(inversion), "overrides": {"value": value}}))

    for tau, steps in ((0.0, 0), (0.5, 2), (0.6, 3), (1.0, 4)):  # i < N * tau
        assert torch.allclose(with_tau(tau), first(steps), atol=1e-5)
    assert not torch.allclose(with_tau(0.5), with_tau(1.0), atol=1e-3)


def test_longer_prompts_get_the_values_in_every_part():
    words, value = torch.randn(1, 154, 8), torch.randn(1, 2, 77, 8)
    out = style_diffusion.modulate(words, value)
    for part in (slice(0, 77), slice(77, 154)):
        assert torch.allclose(out[:, part], words[:, part] * value[:, 0] + value[:, 1])
    with pytest.raises(ValueError, match="77 tokens"):
        style_diffusion.modulate(words[:, :100], value)
    assert edit(invert()[0], pair=(tiny.conditioning(tokens=154), prompts()[1])).isfinite().all()


# --- the mapping network --------------------------------------------------------------------------------------------

def test_the_mapping_network_has_the_papers_size_and_begins_as_the_plain_prompt():
    with torch.inference_mode(False):
        paper = style_diffusion.Mapping(torch.randn(1, 197, 768), 77, 768)
        other = style_diffusion.Mapping(torch.randn(2, 9, 48), 77, 32)
        assert sum(p.numel() for p in paper.parameters[0]) == 78_540
        for mapping in (paper, other):
            scale, shift = mapping().unbind(1)
            assert (scale == 1).all() and (shift == 0).all()
            # every parameter takes part as soon as the last layer is no longer 0
            for own in mapping.parameters:
                own[6].data.normal_()
            out = mapping()
            grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), [p for own in mapping.parameters for p in own])
            assert all((g != 0).any() for i, g in enumerate(grads) if i % len(mapping.parameters[0]) not in (1, 3))


@pytest.fixture
def clip_vision(tmp_path):
    config = {"hidden_size": 48, "image_size": 32, "intermediate_size": 64, "layer_norm_eps": 1e-5, "num_channels": 3,
              "hidden_act": "quick_gelu", "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 16,
              "projection_dim": 16, "model_type": "clip_vision_model"}
    (tmp_path / "vision.json").write_text(json.dumps(config))
    encoder = comfy.clip_vision.ClipVisionModel(str(tmp_path / "vision.json"))
    tiny.fill(encoder.model, 3)
    return encoder


def test_the_mapping_network_learns_from_the_stock_image_encoder(clip_vision):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    little, much = (
        invert(first_steps=n, clip_vision=clip_vision, image=image)[0].settings["loss"] for n in (1, 10)
    )
    assert much < 0.9 * little
    for more in ({"clip_vision": clip_vision}, {"image": image}):
        with pytest.raises(ValueError, match="belong together"):
            invert(**more)
    with pytest.raises(ValueError, match="3 pictures, latent 1"):
        invert(clip_vision=clip_vision, image=image.expand(3, -1, -1, -1))


# --- a good citizen -------------------------------------------------------------------------------------------------

def test_patches_of_others_still_run_and_nothing_is_left():
    plain, calls = model(), []
    patched = plain.clone()
    patched.set_model_attn2_patch(lambda n, c, v, options: (calls.append(v.shape), (n, c, v))[1])
    for block in (("output", 0), ("input", 3)):
        patched.set_model_attn2_replace(
            lambda q, k, v, options: (calls.append("replaced"), torch.zeros_like(q) + v.mean(1, True))[1], *block
        )
    before = repr(patched.model_options)
    invert(on=patched, steps=2, first_steps=1)
    assert "replaced" in calls and len(calls) > 2 and repr(patched.model_options) == before
    left = [n for n, m in plain.model.named_modules() if getattr(m, "weight_function", None) or "forward" in vars(m)]
    assert not left
