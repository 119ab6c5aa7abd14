"""pix2pix-zero against its paper's joint batch with explicit matrices, and torch's autograd through all of it."""
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pix2pix_zero import Pix2PixZero
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.pix2pix_zero_edit import Pix2PixZeroNode
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods.sega import Concept
from oracles import joint_attention
from support import editing, tiny
from support.shapes import Scene, on_every_shape

import nodes

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
LAMBDA = 2.0  # large enough to see


class Paper(joint_attention.Editor):
    """arXiv 2302.03027, algorithm 1: a step of gradient descent on the latent, for the maps of the edited prompt.

    The published lambda goes with the released code's loss: the mean over heads and over two rows of each picture.
    """

    def __init__(self, amount=LAMBDA, until=10):
        self.amount, self.until = amount, until
        self.collected = None

    def begin(self, step):
        self.step = step

    def before(self, x, evaluate):
        if self.step >= self.until:
            return x
        x, self.collected = x.clone().requires_grad_(), []
        evaluate(x)
        slope, = torch.autograd.grad(sum(self.collected), x)
        self.collected = None
        return x.detach() - self.amount * slope

    def cross_maps(self, probs, layer):
        if self.collected is not None:
            apart = (probs["c_t"] - probs["c_s"].detach()) ** 2  # rows, heads, places, tokens
            self.collected.append((apart.sum((2, 3)).mean(1) / 2).sum())
        return probs


def rows(steps, guided, batch=1):
    """U-Net rows: two for the target; one for the source, and two for the gradient, forth and back."""
    return batch * (steps * 2 + guided * 3)


@pytest.fixture
def scene():
    """model, path of two pictures, prompts, negative"""
    path = editing.path(tiny.model(), 3, 2, 8, 8)
    return tiny.frozen("sd1"), path, editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")


def guide(words, **settings):
    return Pix2PixZero(source=words.source, **{"xa_guidance": LAMBDA, **settings})


# --- the edit -------------------------------------------------------------------------------------------------------

@on_every_shape
def test_the_target_s_maps_are_drawn_to_the_source_s(shape):
    scene = Scene(shape, SOURCE, TARGET, make=tiny.frozen)
    got, guider = scene.edited(guide(scene.words))
    assert (got - scene.by_paper(Paper())).abs().max() < 1e-4
    assert (got - scene.by_paper()).abs().max() > 1e-2
    assert guider.rows == rows(10, 10, shape.batch)


class Chained(Paper):
    """With what another editor does, whose changes the gradient goes through; compared are the target's own maps."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def cross_maps(self, probs, layer):
        probs = super().cross_maps(probs, layer)
        return probs | {"c_t": probs["c_s"]} if self.other == "p2p" and self.step < 2 else probs

    def self_attention(self, q, k, v, probs, layer):
        if self.other == "p2p" and layer[1][0] * layer[1][1] <= 16 and self.step < 1:
            probs = probs | {"c_t": probs["c_s"]}
        out = super().self_attention(q, k, v, probs, layer)
        if self.other == "masactrl" and layer[0][0] == "output":
            for half in "uc":
                s, t = f"{half}_s", f"{half}_t"
                out[t] = (q[t] @ k[s].mT * q[t].shape[-1] ** -0.5).softmax(-1) @ v[s]
        return out

    def feature(self, h, block):
        return h | {"u_t": h["c_s"], "c_t": h["c_s"]} if self.other == "pnp" and block == ("output", 1) else h


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("other", ["p2p", "masactrl", "pnp"])
def test_it_goes_with_the_other_controls(scene, other, apart):
    model, path, words, empty = scene
    control = {
        "p2p": PromptToPrompt(prompts=words, cross=(0, 0.5), self_=(0, 0.4)),  # 2 of 3 steps, 1 of 3
        "masactrl": MasaCtrl(source=words.source, window=(0, 1), blocks="output"),
        "pnp": PlugAndPlay(source=words.source, features=(0, 1), attention=(0, 0), feature_blocks="output.1"),
    }[other]
    expected = joint_attention.joint_edit(tiny.model(), path, words.source, words.target, empty, 7.5, Chained(other))
    alone, _ = editing.run(model, path, words.target, empty, 7.5, [control])
    model = editing.split(model) if apart else model
    for chain in ([control, guide(words)], [guide(words), control]):
        got, _ = editing.run(model, path, words.target, empty, 7.5, chain)
        assert (got - expected).abs().max() < 1e-4
        assert (got - alone).abs().max() > 1e-2


def test_it_acts_in_its_window_and_blocks_only(scene):
    model, path, words, empty = scene

    class Decoder(Paper):
        def cross_maps(self, probs, layer):
            return super().cross_maps(probs, layer) if layer[0][0] == "output" else probs

    expected = joint_attention.joint_edit(tiny.model(), path, words.source, words.target, empty, 7.5, Decoder(until=2))
    with tiny.Calls(model) as calls:
        got, guider = editing.run(model, path, words.target, empty, 7.5, [guide(words, window=(0, 0.7), blocks="output")])
    assert (got - expected).abs().max() < 1e-4
    assert guider.rows == rows(3, 2, batch=2)
    assert calls.rows == guider.rows - 2 * 2  # a backward pass is no call
    for off in (dict(xa_guidance=0.0), dict(window=(0, 0)), dict(blocks="none")):
        nothing, guider = editing.run(model, path, words.target, empty, 7.5, [guide(words, **off)])
        plain, _ = editing.run(model, path, words.target, empty, 7.5)
        assert torch.equal(nothing, plain) and guider.rows == rows(3, 0, batch=2)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_equal_prompts_give_the_picture_back(kind):
    """On a path that is the source's own: y_next = y + (sigma_next - sigma) * eps at every step."""
    model, words, empty = tiny.frozen(kind), editing.prompts(kind, SOURCE, SOURCE), editing.negative(kind)
    path = editing.own_path(model, editing.path(model, 4, 1, 8, 8), words.source, empty)
    out, _ = editing.run(model, path, words.target, empty, 1.0, [guide(words)])
    assert (out - path.latents[-1]).abs().max() < 1e-4


def test_without_a_source_prompt_it_is_the_negative(scene):
    """The released code's negative is the source prompt."""
    model, path, words, _ = scene
    got, guider = editing.run(model, path, words.target, words.source, 7.5, [Pix2PixZero(xa_guidance=LAMBDA)])
    named, _ = editing.run(model, path, words.target, words.source, 7.5, [guide(words)])
    assert (got - named).abs().max() < 1e-5
    assert guider.rows == rows(3, 3, batch=2)


def test_a_kept_store_and_core_s_guider_give_the_same(scene):
    model, path, words, empty = scene
    live, _ = editing.run(model, path, words.target, empty, 7.5, [guide(words)])
    with torch.inference_mode():
        store = CaptureAttention.execute(model=model, negative=empty, inversion=path, attention=(guide(words),),
            skip=0, precision="float32").args[0]
    kept, guider = editing.run(model, path, words.target, empty, 7.5, [guide(words)], store=store)
    assert (kept - live).abs().max() < 1e-5 and guider.rows == rows(3, 3, batch=2) - 3 * 2
    core = comfy.samplers.CFGGuider(model)
    core.set_conds(words.target, empty)
    core.set_cfg(7.5)
    x = path.latent_format.process_out(path.latents[0])
    with torch.inference_mode():
        out = core.sample(torch.zeros_like(x), x, LeditsSampler(path, attention=[guide(words)]), path.sigmas, disable_pbar=True)
    assert (path.latent_format.process_in(out) - live).abs().max() < 1e-4


def test_half_precision_is_close(scene):
    _, path, words, empty = scene
    exact, _ = editing.run(tiny.model(), path, words.target, empty, 2.0, [guide(words)])
    plain, _ = editing.run(tiny.model(), path, words.target, empty, 2.0)
    half = tiny.model()
    half.model.diffusion_model.half().dtype = torch.float16
    got, _ = editing.run(half, path, words.target, empty, 2.0, [guide(words)])
    assert (got - exact).square().mean() < 0.01 * (exact - plain).square().mean()


# --- what else may be in the graph ----------------------------------------------------------------------------------

def test_a_control_net_concepts_and_other_entries_of_the_positive(scene):
    model, path, words, empty = scene
    with torch.inference_mode():
        net = tiny.control_net()
    hinted = nodes.ControlNetApplyAdvanced().apply_controlnet(words.target, empty, net, torch.rand(2, 64, 64, 3), 1.0, 0.0, 1.0)
    concept = Concept(conditioning=tiny.conditioning(seed=5), warmup=0, scale=3.0, threshold=0.5)
    area = [[words.target[0][0], {"area": (4, 8, 4, 0), "strength": 1.0}]]
    other = [[tiny.conditioning(seed=6)[0][0], {}]]
    for positive, negative in (hinted, (words.target + area, empty), (words.target + other, empty)):
        plain, without = editing.run(model, path, positive, negative, 7.5, concepts=(concept,))
        out, guider = editing.run(model, path, positive, negative, 7.5, [guide(words)], concepts=(concept,))
        assert torch.isfinite(out).all() and (out - plain).abs().max() > 1e-3
        whole = sum("area" not in more for _, more in positive)
        assert guider.rows == without.rows + 2 * 3 * (1 + 2 * whole)


def test_the_gradient_is_that_of_the_mean_over_entries(scene):
    """Two equal entries are one."""
    model, path, words, empty = scene
    one, _ = editing.run(model, path, words.target, empty, 7.5, [guide(words)])
    for where in (model, editing.split(model)):
        two, _ = editing.run(where, path, words.target * 2, empty, 7.5, [guide(words)])
        assert (one - two).abs().max() < 1e-4


def test_what_does_not_fit_is_refused_before_anything_runs(scene):
    model, path, words, empty = scene

    def refused(match, attention, positive=words.target):
        with tiny.Calls(model) as calls, pytest.raises(ValueError, match=match):
            editing.run(model, path, positive, empty, 7.5, attention)
        assert not calls.calls

    refused("has 77 tokens.*154.*Edit Direction", [guide(words)], tiny.conditioning(tokens=154))
    refused("Two pix2pix-zero", [guide(words), guide(words)])
    refused("no block 'output.17'", [guide(words, blocks="output.17")])
    other = editing.prompts("sd1", "a horse", TARGET)
    refused("different source prompts", [guide(words), PlugAndPlay(prompts=other)])


def test_a_patch_that_has_no_gradient_is_named(scene):
    model, path, words, empty = scene
    with torch.inference_mode():
        weight = torch.ones(1)
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v * weight))
    with pytest.raises(ValueError, match="A patch on the model.*cannot be differentiated"):
        editing.run(patched, path, words.target, empty, 7.5, [guide(words)])


# --- what is left behind --------------------------------------------------------------------------------------------

def state(model):
    network = model.model.diffusion_model
    return {name: [sorted(vars(module)), len(module._forward_hooks), list(getattr(module, "weight_function", ()))]
            for name, module in network.named_modules()}


@pytest.mark.parametrize("fail_at", [None, 1, 2])  # the source, the gradient's prediction, the edit's
def test_nothing_is_left_on_the_model(scene, fail_at):
    model, path, words, empty = scene
    latent = tiny.latent(batch=2)
    chain = [guide(words), PlugAndPlay(source=words.source, feature_blocks="output.1")]

    def plain():
        with torch.inference_mode():
            return nodes.common_ksampler(model, 5, 3, 4.0, "dpmpp_2m", "karras", words.source, empty, latent)[0]["samples"]

    before, own = plain(), state(model)
    weights = {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}

    def interrupt(calls):
        if calls == fail_at:
            raise comfy.model_management.InterruptProcessingException()

    with tiny.Calls(model, interrupt):
        if fail_at is None:
            editing.run(model, path, words.target, empty, 7.5, chain)
        else:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                editing.run(model, path, words.target, empty, 7.5, chain)
    assert state(model) == own
    assert all(p.grad is None for p in model.model.diffusion_model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.model.diffusion_model.state_dict().items())
    assert not model.model_options.get("transformer_options")
    assert torch.equal(plain(), before)


@pytest.mark.parametrize("on_the_way_back", [False, True])
def test_an_interruption_in_the_middle_of_the_network_leaves_nothing(scene, on_the_way_back):
    model, path, words, empty = scene
    editing.run(model, path, words.target, empty, 7.5)
    own, seen = state(model), set()

    def interrupt(q, k, v, extra):
        place = (*extra["block"], extra["block_index"])
        if torch.is_grad_enabled() and (place in seen or not on_the_way_back):
            raise comfy.model_management.InterruptProcessingException()
        if torch.is_grad_enabled():
            seen.add(place)
        return q, k, v

    patched = model.clone()
    patched.set_model_attn1_patch(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        editing.run(patched, path, words.target, empty, 7.5, [guide(words)])
    assert state(model) == own and bool(seen) == on_the_way_back


# --- nodes ----------------------------------------------------------------------------------------------------------

def test_the_node_has_the_published_defaults():
    inputs = Pix2PixZeroNode.define_schema().inputs
    widgets = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    every, = Pix2PixZeroNode.execute(**widgets).args[0]
    needed, = Pix2PixZeroNode.execute(**{i.id: i.default for i in inputs if not i.optional}).args[0]
    assert every == needed == Pix2PixZero() and every.xa_guidance == 0.1 and every.window == (0, 1)
