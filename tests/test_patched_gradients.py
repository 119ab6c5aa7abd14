"""Gradients through patches of other packs, which change tensors in place: those of the same arithmetic out of place."""
import dataclasses

import pytest
import torch
from comfy_extras.nodes_freelunch import Fourier_filter, FreeU, FreeU_V2
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.samplers.methods import style_diffusion
from comfyui_ledits.samplers.methods.families import FAMILIES
from support import chain_parts, runs, tiny
from support.runs import model

pytestmark = pytest.mark.usefixtures("inference_mode")
NODES = {"null-text": NullTextInversion, "StyleDiffusion": StyleDiffusionInversion}


def learned(name, own):
    """What an inversion learns, or the edit of pix2pix-zero."""
    if name == "pix2pix-zero":
        return dataclasses.replace(chain_parts.scene(), model=own).edit("pix2pix")
    inversion = runs.invert(NODES[name], "sd1", tiny.latent("sd1", 1, 16, 16), on=own, cfg=7.5, steps=3)[0]
    return next(iter(inversion.overrides.values()))


def free_u(own, version):
    """FreeU without an assignment in place."""
    (b1, b2), (s1, s2) = (1.3, 1.4), (0.9, 0.2)
    scales, patched = {128: (b1, s1), 64: (b2, s2)}, own.clone()

    def patch(h, skip, options):
        if h.shape[1] not in scales:
            return h, skip
        b, s = scales[h.shape[1]]
        first, rest = h.chunk(2, 1)
        if version is FreeU_V2:
            mean = h.mean(1, keepdim=True)
            least, most = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
            b = (b - 1) * (mean - least) / (most - least) + 1
        return torch.cat([first * b, rest], 1), Fourier_filter(skip, threshold=1, scale=s)

    patched.set_model_output_block_patch(patch)
    return patched


def in_place(own, kind, does):
    """A MODEL with a patch that makes `x * tanh(x) + mean(x)` of its input, in place or not."""
    patched = own.clone()

    def change(x):
        made = x * torch.tanh(x) + x.mean()
        if not does:
            return made
        x.mul_(torch.tanh(x)).add_(made.mean() - x.mean())  # what was saved of x is changed...
        x.sub_(x).add_(made)  # ...and x again
        return x

    def beside(n, k, v, extra):  # core gives one tensor as all three
        made = change(v)
        return (n, k, made) if does else (made, made, made)

    if kind.endswith("output_patch"):
        getattr(patched, f"set_model_{kind}")(lambda out, extra: change(out))
    elif kind == "attn2_patch":  # k and v are the words of all layers
        patched.set_model_attn2_patch(lambda n, k, v, extra: (change(n), k, v))
    elif kind.endswith("_patch"):
        getattr(patched, f"set_model_{kind}")(beside)
    elif kind.endswith("replace"):
        getattr(patched, f"set_model_{kind}")(
            lambda q, k, v, extra: torch.nn.functional.scaled_dot_product_attention(change(q), k, change(v)), "output", 1)
    elif kind == "input_block":
        patched.set_model_input_block_patch(lambda h, options: change(h))
    elif kind == "output_block":
        patched.set_model_output_block_patch(lambda h, skip, options: (change(h), change(skip)))
    elif kind == "post_cfg":
        patched.set_model_sampler_post_cfg_function(lambda args: change(args["cond_denoised"]) + args["denoised"])
    elif kind == "pre_cfg":
        patched.set_model_sampler_pre_cfg_function(lambda args: [change(args["conds_out"][0]), args["conds_out"][1]])
    return patched


def base(name):
    return chain_parts.scene().model if name == "pix2pix-zero" else model()


@pytest.mark.parametrize("version", [FreeU, FreeU_V2])
@pytest.mark.parametrize("name", [*NODES, "pix2pix-zero"])
def test_free_u_is_learned_through(name, version):
    found = learned(name, version.execute(base(name), 1.3, 1.4, 0.9, 0.2)[0])
    expected, without = learned(name, free_u(base(name), version)), learned(name, base(name))
    assert (found - expected).abs().mean() < 0.02 * (without - expected).abs().mean()


PATCHES = ("attn1_output_patch", "attn2_output_patch", "attn1_patch", "attn2_patch", "attn1_replace", "attn2_replace",
           "input_block", "output_block")


@pytest.mark.parametrize("kind", [*PATCHES, "post_cfg", "pre_cfg"])
@pytest.mark.parametrize("name", [*NODES, "pix2pix-zero"])
def test_patches_that_write_in_place_have_the_gradient_of_their_arithmetic(name, kind):
    found, expected = (learned(name, in_place(base(name), kind, does)) for does in (True, False))
    without = learned(name, base(name))
    assert (found - expected).abs().mean() < 0.02 * (without - expected).abs().mean()


def weighted(own):
    """Weights of other packs are inference tensors, as all are that a node loads."""
    weight, patched = torch.tensor(0.9), own.clone()
    assert weight.is_inference()
    patched.set_model_attn2_patch(lambda n, k, v, extra: (n * weight, k, v * weight))
    return patched


def from_elsewhere(own):
    """Numbers without a derivative."""
    patched = own.clone()
    patched.set_model_attn1_output_patch(lambda out, extra: torch.tensor(out.detach().numpy()))
    return patched


@pytest.mark.parametrize("patch", [weighted, from_elsewhere])
@pytest.mark.parametrize("name", [*NODES, "pix2pix-zero"])
def test_a_patch_without_a_derivative_is_refused_before_the_work_begins(name, patch):
    own = patch(base(name))
    with tiny.Calls(own) as calls, pytest.raises(ValueError, match="cannot be differentiated.*Remove it"):
        learned(name, own)
    assert len(calls.calls) <= 8  # a try


# --- Deep Shrink and StyleDiffusion -----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [m for m in PatchModelAddDownscale.UPSCALE_METHODS if m != "bislerp"])
@pytest.mark.parametrize("after_skip", [True, False])
def test_deep_shrink_goes_with_style_diffusion(method, after_skip):
    """Its window ends in the middle of the path, where the grid of the maps changes."""
    shrunk = PatchModelAddDownscale.execute(model(), 1, 2.0, 0.0, 0.5, after_skip, method, method)[0]
    found, without = learned("StyleDiffusion", shrunk), learned("StyleDiffusion", model())
    assert torch.isfinite(found).all() and not torch.allclose(found, without, atol=1e-3)


@pytest.mark.parametrize("name", NODES)
def test_a_patch_whose_derivative_is_infinite_is_refused_before_the_work_begins(name):
    """bislerp has one where neighbours are alike."""
    shrunk = PatchModelAddDownscale.execute(model(), 1, 2.0, 0.0, 0.5, False, "bislerp", "bislerp")[0]
    with tiny.Calls(model()) as calls, pytest.raises(ValueError, match="derivative.*bislerp.*Remove the patch"):
        learned(name, shrunk)
    assert len(calls.calls) <= 8


def test_maps_of_another_grid_are_taken_at_the_step_s_own_level():
    """The loss of every step, by hand: maps `sigma * mean(y) * scale` on a grid that is smaller at the two noisy levels."""
    sigmas, family = [8.0, 4.0, 2.0, 1.0], FAMILIES["ve"]

    class Predict:
        def __call__(self, name, y, sigma, words=None):
            return torch.zeros_like(y)

        def combine(self, y, sigma, positive, negative):
            return positive

    def a_map(y, sigma, scale):
        return torch.ones(1, 2, 4 if sigma > 3 else 16, 3) * sigma * y.mean() * scale

    def look(y, sigma, value):
        scale = 2.0 if value is None else value[:, 0].mean() + 0.25
        return 0.0 * y * scale, [a_map(y, float(sigma), scale)]

    with torch.inference_mode(False):
        latents = torch.randn(4, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        value = style_diffusion.Direct(1, 3, 5)
        found = list(style_diffusion.learn(latents, torch.tensor(sigmas), Predict(), look, value, family=family, most=1,
                                           enough=0.0))
    up = ((1 + sigmas[0] ** 2) / (1 + sigmas[1] ** 2)) ** 0.5
    wanted = [(latents[1] * up, 8.0), (latents[1] * up, 8.0), (latents[2], 2.0)]
    y, scale = latents[0], 1.25
    for i, (learned, loss, *_) in enumerate(found):
        apart = a_map(y, sigmas[i], scale) - a_map(*wanted[i], 2.0)
        y = y * sigmas[i + 1] / sigmas[i]
        step = (y - latents[i + 1]).square().mean() / (1 + sigmas[i + 1] ** 2)
        assert float(loss) == pytest.approx(float(step + apart.square().mean()), rel=1e-4)
        scale = float(learned[:, 0].mean()) + 0.25


@pytest.mark.parametrize("node", NODES.values())
def test_an_inversion_says_that_another_packs_attention_does_not_act_while_it_learns(node):
    own = model("sd1").clone()
    own.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = \
        lambda function, *args, **kwargs: function(*args, **kwargs)

    def said(on):
        return str(runs.invert(node, "sd1", tiny.latent("sd1", 1, 16, 16), on=on, cfg=7.5, steps=2).ui)

    assert "Another pack's attention on the model did not act" in said(own)
    assert "did not act" not in said(model("sd1"))
