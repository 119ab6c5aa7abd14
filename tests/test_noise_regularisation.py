"""Noise regularisation of pix2pix-zero against a loop of torch's autograd, and its place in DDIM inversion."""
import functools
import random

import pytest
import torch
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion
from comfyui_ledits.samplers.methods import ddim
from comfyui_ledits.samplers.methods.families import FAMILIES
from comfyui_ledits.samplers.methods.noise_regularisation import NoiseRegularisation, draw_shifts
from comfyui_ledits.tools.api.client import ComfyClient
from support import runs, tiny
from support.graphs import node

PUBLISHED = {"noise_regularisation": "pix2pix-zero", "lambda_ac": 20.0, "lambda_kl": 20.0, "reg_steps": 5, "ac_rolls": 5,
             "reg_seed": 0}


def correlation(noise, shifts):
    """Of one channel [h, w] over the pyramid, with one shift for each level."""
    total = 0.0
    for k, shift in enumerate(shifts):
        if k:
            noise = torch.nn.functional.avg_pool2d(noise[None, None], 2)[0, 0]
        for axis in (0, 1):
            total = total + (noise * torch.roll(noise, shift, axis)).mean() ** 2
    assert min(noise.shape) <= 8
    return total


def divergence(noise):
    return noise.var() + noise.mean() ** 2 - 1 - torch.log(noise.var() + 1e-7)


def descended(noise, loss, rate):
    noise = noise.detach().requires_grad_()
    slope, = torch.autograd.grad(loss(noise), noise)
    return (noise - rate * slope).detach()


def released(noise, draw, lambda_ac, lambda_kl, steps, rolls):
    """The loop of the released code (arXiv 2302.03027, section 3.1) for one picture [C, h, w]."""
    for _ in range(steps):
        for _ in range(rolls):
            shifts = list(zip(*draw_shifts((1, *noise.shape), draw)))  # for every channel
            noise = descended(noise, lambda n, s=shifts: sum(map(correlation, n, s)), lambda_ac / rolls)
        noise = descended(noise, divergence, lambda_kl)
    return noise


@pytest.mark.parametrize("height, width", [(32, 32), (16, 24), (18, 13), (8, 8)])
def test_it_is_the_released_code_s_loop(height, width):
    noise = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 1.3 * noise + 0.5 * noise.roll(1, -1)
    with torch.inference_mode():
        got = NoiseRegularisation(lambda_ac=50.0, seed=3)(noise.clone(), 7)
    for own, out in zip(noise, got):
        expected = released(own, random.Random("3, 7"), 50.0, 20.0, 5, 5)
        assert (out - expected).abs().max() < 1e-10
        assert (out - own).abs().max() > 1e-3


@pytest.mark.parametrize("off", ["lambda_ac", "lambda_kl"])
def test_each_term_alone(off):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    lambdas = {"lambda_ac": 100.0, "lambda_kl": 30.0, off: 0.0}
    expected = released(noise[0], random.Random("0, 0"), **lambdas, steps=2, rolls=3)
    assert (NoiseRegularisation(**lambdas, steps=2, rolls=3)(noise, 0)[0] - expected).abs().max() < 1e-10


def test_shifts_are_never_none_and_end_below_half_a_side():
    drawn = [draw_shifts((1, 4, 64, 48), random.Random(seed)) for seed in range(300)]
    assert {len(levels) for levels in drawn} == {4}  # sides 48, 24, 12, 6
    for k, side in enumerate((48, 24, 12, 6)):
        assert {s for levels in drawn for s in levels[k]} == set(range(1, side // 2))
    assert draw_shifts((1, 2, 2, 2), random.Random(0)) == [[1, 1]]


def test_correlated_noise_becomes_like_gaussian_noise():
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    noise = 1.5 * (noise + noise.roll(1, -1)) / 2**0.5
    out = noise
    regularise = NoiseRegularisation(lambda_ac=1000.0, lambda_kl=1000.0)
    for i in range(20):
        out = regularise(out, i)

    def neighbours(n):
        return (n * n.roll(1, -1)).mean() / n.var()

    assert neighbours(noise) > 0.4 and neighbours(out).abs() < 0.5 * neighbours(noise)
    assert abs(noise.var() - 1) > 0.5 and abs(out.var() - 1) < 0.2


# --- in the inversion -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("refinements", [0, 2])
def test_every_prediction_of_the_inversion_is_regularised(refinements):
    y0, sigmas = torch.randn(1, 4, 8, 8), torch.tensor([4.0, 1.5, 0.5, 0.0])
    asked = []

    def regularise(eps, i):
        asked.append(i)
        return 0.5 * eps + 0.1

    def denoise(y, sigma, i):
        return y - sigma.view(-1, 1, 1, 1) * y.tanh()  # eps is tanh(y)

    path = ddim.invert(y0, sigmas, denoise, family=FAMILIES["ve"], scaling=ddim.eps_scaling, refinements=refinements,
                       regularise=regularise)
    assert asked == [i for i in (2, 1, 0) for _ in range(refinements + 1)]
    y = y0
    for i in (2, 1, 0):
        high, low = float(sigmas[i]), float(sigmas[i + 1])
        fed = y * ((1 + high**2) / (1 + low**2)) ** 0.5
        guess = y + (high - low) * (0.5 * fed.tanh() + 0.1)
        for _ in range(refinements):
            guess = y + (high - low) * (0.5 * guess.tanh() + 0.1)
        y = guess
        assert (path[i] - y).abs().max() < 1e-4


def test_the_node_takes_it_with_the_published_values(inference_mode):
    model, latent = tiny.model(), tiny.latent(batch=2, height=16, width=16)
    invert = functools.partial(runs.invert, DDIMInversion, on=model, steps=4)
    plain, off, on, again = (invert(latent=latent, noise_regularisation=choice)[0]
                             for choice in (None, {"noise_regularisation": "none"}, PUBLISHED, PUBLISHED))
    assert torch.equal(plain.latents, off.latents) and plain.settings == off.settings
    assert torch.equal(on.latents, again.latents)
    assert (on.latents - plain.latents).abs().max() > 1e-3 and torch.equal(on.latents[-1], plain.latents[-1])
    assert on.settings | PUBLISHED == on.settings
    choice = next(i for i in DDIMInversion.define_schema().inputs if i.id == "noise_regularisation")
    assert choice.optional
    published = {i.id: i.default for i in choice.options[1].inputs}
    assert {"noise_regularisation": "pix2pix-zero", **published} == PUBLISHED
    # a picture is inverted alike in any company
    first = {"samples": latent["samples"][:1]}
    alone = invert(latent=first, noise_regularisation=PUBLISHED)[0]
    assert (alone.latents - on.latents[:, :1]).abs().max() < 1e-4


def test_a_server_takes_the_nested_inputs_and_does_without_them(server_url):
    graph = {
        "model": node("LEDITS_LoadDemoModel"),
        "words": node("CLIPTextEncode", text="a red star on a grey ground", clip=["model", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "drawn": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "picture": node("VAEEncode", pixels=["drawn", 0], vae=["model", 2]),
        "target": node("LEDITS_EditDirection", clip=["model", 1], conditioning=["words", 0], strength=1.0,
                       source_sentences="a red star\na red circle", target_sentences="a blue star"),
        "control": node("LEDITS_Pix2PixZero", xa_guidance=0.1, source=["words", 0]),
    }
    nested = {f"noise_regularisation.{name}": value for name, value in PUBLISHED.items() if name != "noise_regularisation"}
    for name, more in {"without": {}, "with": {"noise_regularisation": "pix2pix-zero", **nested}}.items():
        graph[name] = node(
            "LEDITS_DDIMInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0], latent=["picture", 0],
            cfg=1.0, steps=2, scheduler="ddim_uniform", refinements=0, tolerance=0.0, convention="B", path="inverted", **more)
        graph[f"edit {name}"] = node(
            "LEDITS_KSampler", model=["model", 0], positive=["target", 0], negative=["empty", 0], inversion=[name, 0], cfg=3.0,
            skip=0, attention=["control", 0])
        graph[f"saved {name}"] = node("SaveLatent", samples=[f"edit {name}", 0], filename_prefix="pix2pix-zero")
    entry = ComfyClient(server_url).run(graph)
    assert [entry["outputs"][name]["ledits"][0]["unet_rows"] for name in ("edit without", "edit with")] == [2 * 5] * 2
