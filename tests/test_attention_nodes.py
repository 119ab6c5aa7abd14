"""The attention nodes: their defaults, what they refuse, and the ways to run them."""
import comfy.samplers
import pytest
import torch
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.edits import in_window
from comfyui_ledits.nodes import attention, capture_attention, edit_prompts, sampling
from comfyui_ledits.samplers.ledits import LeditsSampler
from oracles import joint_attention
from support import editing, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
SCENE = {"masactrl": dict(start_layer="output.1-"), "pnp": dict(feature_blocks="output.1.0"), "p2p": {}, "p2plus": {}}
NODES = {"p2p": attention.PromptToPromptNode, "p2plus": attention.P2PlusNode, "masactrl": attention.MasaCtrlNode,
         "pnp": attention.PlugAndPlayNode}


@pytest.fixture(scope="module")
def words():
    return edit_prompts.EditPrompts.execute(clip=editing.clip(), source=SOURCE, target=TARGET).args


def defaults(node):
    """Values of the widgets, as a new node on the canvas has them: (all, those that are not optional)."""
    inputs = [i for i in node.define_schema().inputs if getattr(i, "default", None) is not None]
    return {i.id: i.default for i in inputs}, {i.id: i.default for i in inputs if not i.optional}


@pytest.mark.parametrize("name", NODES)
def test_a_widget_left_out_is_its_default(words, name):
    everything, needed = defaults(NODES[name])
    assert len(everything) > len(needed)
    made = [NODES[name].execute(prompts=words[2], **widgets).args[0] for widgets in (everything, needed)]
    assert made[0] == made[1]


def test_published_defaults(words):
    def made(name):
        return NODES[name].execute(prompts=words[2], **defaults(NODES[name])[0]).args[0][0]

    p2p, plus, masactrl, pnp = map(made, ("p2p", "p2plus", "masactrl", "pnp"))
    assert (p2p.cross, p2p.self_, p2p.uncond_self) == ((0, 0.8), (0, 0.4), (0, 0))
    assert (plus.cross, plus.self_, plus.uncond_self) == ((0, 0.8), (0, 0.4), (0, 0.5))
    assert [step for step in range(50) if in_window(step, 50, masactrl.window)] == list(range(4, 50))
    assert sum(in_window(step, 50, pnp.features) for step in range(50)) == 40
    assert sum(in_window(step, 50, pnp.attention) for step in range(50)) == 25


@pytest.mark.parametrize("name, widgets, match", [
    ("p2p", dict(equalizer="horse: 2"), "'horse'.*'a dog sits on a sofa'"),
    ("p2p", dict(word_steps="cat: 0.2"), "'cat'.*'a dog sits on a sofa'"),
    ("p2p", dict(blend_words="cat, horse"), "'horse'"),
    ("p2p", dict(substruct_words="cat"), "blend_words"),
    ("p2p", dict(equalizer="dog"), "word and a number"),
    ("masactrl", dict(source_words="dog", target_words="dog"), "'dog'.*'a cat sits on a sofa'"),
    ("masactrl", dict(source_words="cat"), "in pairs"),
    ("masactrl", dict(source_mask=torch.ones(1, 8, 8)), "in pairs"),
])
def test_what_no_model_could_serve_is_refused_by_the_node(words, name, widgets, match):
    with pytest.raises(ValueError, match=match):
        NODES[name].execute(prompts=words[2], **defaults(NODES[name])[1] | widgets)


@pytest.mark.parametrize("name", NODES)
def test_the_sampler_nodes_and_the_store_agree(words, name):
    model = tiny.model()
    path, empty = editing.path(model, 5), editing.negative("sd1")
    control, = NODES[name].execute(prompts=words[2], **defaults(NODES[name])[1] | SCENE[name]).args
    with torch.inference_mode():
        one = sampling.LeditsKSampler.execute(model=model, positive=words[1], negative=empty, inversion=path,
            cfg=7.5, skip=1, attention=control)
        store, = capture_attention.CaptureAttention.execute(model=model, negative=empty, inversion=path,
            attention=control, skip=1, precision="float32").args
        two = sampling.LeditsKSampler.execute(model=model, positive=words[1], negative=empty, inversion=path,
            cfg=7.5, skip=1, attention=control, store=store)
        sampler, sigmas = sampling.LeditsSamplerNode.execute(inversion=path, skip=1, attention=control).args
        guider = comfy.samplers.CFGGuider(editing.split(model))
        guider.set_conds(words[1], empty)
        guider.set_cfg(7.5)
        x = path.latent_format.process_out(path.latents[1])
        three = guider.sample(torch.zeros_like(x), x, sampler, sigmas, disable_pbar=True)
    one, two = one.args[0]["samples"], two.args[0]["samples"]
    assert (one - two).abs().max() < 1e-3 and (one - three).abs().max() < 1e-3  # in units of a LATENT, 5 times larger
    plain, _ = editing.run(model, path, words[1], empty, 7.5, start=1)
    assert (path.latent_format.process_out(plain) - one).abs().max() > 1e-2


def test_masks_from_words_with_core_s_guider(words):
    """ComfyUI evaluates the negative first where it splits; the masks of a step come from the positive."""
    model = tiny.model()
    path, empty = editing.path(model, 5), editing.negative("sd1")
    control = MasaCtrl(prompts=words[2], window=(0, 1), blocks="output.1-", source_words=("cat",), target_words=("dog",),
                       threshold=0.5, map_blocks="@1/2")
    ours, _ = editing.run(model, path, words[1], empty, 7.5, [control])
    guider = comfy.samplers.CFGGuider(editing.split(model))
    guider.set_conds(words[1], empty)
    guider.set_cfg(7.5)
    x = path.latent_format.process_out(path.latents[0])
    with torch.inference_mode():
        core = guider.sample(torch.zeros_like(x), x, LeditsSampler(path, attention=[control]), path.sigmas, disable_pbar=True)
    assert (path.latent_format.process_in(core) - ours).abs().max() < 1e-4


@pytest.mark.parametrize("control", [
    lambda words: MasaCtrl(prompts=words, window=(0, 1), blocks="output.1-"),
    lambda words: PromptToPrompt(prompts=words, uncond_self=(0, 1), self_=(0, 0)),
])
def test_the_source_s_negative_is_what_the_inversion_prescribes(words, control):
    """With another negative at every step (null-text), source and target see the same one."""
    import dataclasses

    model = tiny.model()
    path, empty = editing.path(model, 4), editing.negative("sd1")
    learned = torch.stack([editing.negative("sd1", text)[0][0] for text in ("red", "green", "blue", "grey")])
    prescribed = dataclasses.replace(path, overrides={"negative": learned})
    got, guider = editing.run(model, prescribed, words[1], empty, 7.5, [control(words[2])])

    class Paper(joint_attention.Editor):
        masactrl = isinstance(control(words[2]), MasaCtrl)

        def self_attention(self, q, k, v, probs, layer):
            out = super().self_attention(q, k, v, probs, layer)
            for half in "uc":
                s, t = f"{half}_s", f"{half}_t"
                if self.masactrl and layer[0][0] == "output" and layer[0][1] >= 1:
                    out[t] = (q[t] @ k[s].mT * q[t].shape[-1] ** -0.5).softmax(-1) @ v[s]
                elif not self.masactrl and half == "u" and layer[1][0] * layer[1][1] <= 64:
                    out[t] = probs[s] @ v[t]
            return out

        def cross_maps(self, probs, layer):
            if not self.masactrl and self.step < int(0.8 * 5):
                probs["c_t"] = probs["c_s"]
            return probs

        def begin(self, step):
            self.step = step

    expected = joint_attention.joint_edit(model, path, words[0], words[1], [[[n]] for n in learned], 7.5, Paper())
    assert (got - expected).abs().max() < 1e-4
