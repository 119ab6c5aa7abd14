"""The demo flow model: ComfyUI runs the very network that was trained, and what editing on it promises, on held-out pictures.

Settings of the edits were chosen on other pictures (seeds from 970,000 on). Run with -s to read the numbers.
LEDITS_DEMO_PICTURES names a smaller number of pictures.
"""

import pytest
import torch
from comfyui_ledits.attention_hooks.text.prompts import edit_prompts
from comfyui_ledits.demo import captions, flow_net, loader, nets
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.flowedit import FlowEdit, FlowEditSource
from comfyui_ledits.nodes.sampling import LeditsKSampler
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.tools.benchmarks import flow_curves
from support.demo_nodes import FIRST_SEED, MOST, DemoNodes, draw

COUNT, AT_ONCE, STEPS = 60, 20, 28


@pytest.fixture(scope="module", autouse=True)
def inference():
    with torch.inference_mode():
        yield


class FlowNodes(DemoNodes):
    def __init__(self):
        self.model, self.clip, self.vae = loader.load_flow()


@pytest.fixture(scope="module")
def nodes():
    return FlowNodes()


# --- the same network -----------------------------------------------------------------------------------------------------

TEXTS = ["a big striped red star on the left on a tiled grey ground", "red", ""]


def test_comfyui_encodes_prompts_as_in_training(nodes):
    _, _, text, tokens = nets.load_diffusers()
    words, pooled = flow_net.encode(text, tokens, TEXTS)
    ((ours, more),) = nodes.prompts(TEXTS)
    assert ours.shape == (len(TEXTS), flow_net.WORDS, nets.CONTEXT)
    torch.testing.assert_close(ours, words, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(more["pooled_output"], pooled, rtol=1e-3, atol=1e-3)


def test_words_of_prompts_are_found_without_the_padding_that_is_left_out(nodes):
    tokens = edit_prompts(nodes.clip, "a red star", "a green star").target_tokens
    assert len(tokens) == flow_net.WORDS and tokens.find("green") == (2,)


def test_a_longer_prompt_keeps_all_its_words(nodes):
    long = nodes.prompts(["a big striped red star on the left and a small green moon on the right on a tiled grey ground with dots"])
    assert long[0][0].shape[1] >= flow_net.WORDS


def test_comfyui_predicts_what_diffusers_does(nodes):
    """The stored weights in diffusers' FluxTransformer2DModel, which they were trained in, against ComfyUI's Flux."""
    transformer = flow_net.Velocity(flow_net.load_diffusers())
    ((words, more),) = nodes.prompts(TEXTS)
    x, s = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.1])
    ours = nodes.model.model.diffusion_model(x, s, context=words, y=more["pooled_output"], guidance=None)
    torch.testing.assert_close(ours.float(), transformer(x, s, words, more["pooled_output"]), rtol=1e-3, atol=1e-3)


def test_the_network_knows_no_time_of_its_own_but_the_level(nodes):
    sampling = nodes.model.get_model_object("model_sampling")
    levels = torch.tensor([1.0, 0.5, 0.01])
    torch.testing.assert_close(sampling.timestep(levels), levels)
    assert float(sampling.sigma_max) == 1


def test_the_two_demo_models_share_text_encoder_and_autoencoder(nodes):
    _, clip, vae = loader.load()
    words, more = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))[0]
    ((ours, own),) = nodes.prompts(["a red star"])
    assert torch.equal(words[:, : flow_net.WORDS], ours) and torch.equal(more["pooled_output"], own["pooled_output"])
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.encode(picture), nodes.vae.encode(picture))


# --- what it promises -----------------------------------------------------------------------------------------------------

FLOWEDIT_SKIP, LEDITS_SKIP, CFG = 12, 16, 3.0
KIND_SKIP = {"FlowEdit": 4, "LEDITS": 6}
CONCEPT = {"direction": "towards", "scale": 2.0, "threshold": 0.9, "warmup": 0, "cooldown": 0, "momentum_scale": 0.3,
           "momentum_beta": 0.6, "weight": 1.0}
CONCEPT_SKIP = 10


def tasks(what):
    return flow_curves.tasks(what, min(COUNT, MOST), FIRST_SEED)


def groups(pairs):
    for start in range(0, len(pairs), AT_ONCE):
        yield start, pairs[start : start + AT_ONCE]


def sentences(of):
    return [captions.sentence(scene) for scene in of]


def edited(nodes, pairs, method, skip):
    """Edited pictures by "FlowEdit", "LEDITS" with a target sentence, or "concept" alone."""
    out = []
    for start, group in groups(pairs):
        sources, targets = zip(*group)
        latent, empty = nodes.encode([draw(s)[0] for s in sources]), nodes.prompts([""])
        target, source = nodes.prompts(sentences(targets)), nodes.prompts(sentences(sources))
        common = {"model": nodes.model, "negative": empty}
        if method == "FlowEdit":
            path = FlowEditSource.execute(**common, positive=source, latent=latent, scheduler="simple", seed=start,
                                          settings={"settings": "own", "steps": STEPS, "cfg": 1.0})[0]
            made = FlowEdit.execute(**common, positive=target, inversion=path,
                                    settings={"settings": "own", "cfg": CFG, "skip": skip})[0]
        else:
            concept = method == "concept"
            path = EditFriendlyInversion.execute(**common, positive=empty if concept else source, latent=latent, cfg=1.0,
                                                 steps=STEPS, scheduler="simple", eta=1.0, seed=start)[0]
            more = {}
            if concept:
                words = nodes.prompts([f"a {t.things[0].colour} {t.things[0].kind}" for t in targets])
                more["concepts"] = SemanticConcept.execute(prompt="", conditioning=words, **CONCEPT)[0]
            made = LeditsKSampler.execute(**common, positive=empty if concept else target, inversion=path, skip=skip,
                                          cfg=1.0 if concept else CFG, **more)[0]
        out += nodes.decode(made["samples"])
    return out


def verdict(what, pairs, found):
    """Share of edits made, and mean PSNR outside of the thing before and after."""
    share, psnr = flow_curves.judged(what, pairs, found)
    print(f"\n{what}: made in {100 * share:.1f} %, {psnr:.2f} dB outside the thing")
    return share, psnr


@pytest.mark.demo
@pytest.mark.parametrize("method, skip, made, decibel", [
    ("FlowEdit", FLOWEDIT_SKIP, 0.95, 28), ("LEDITS", LEDITS_SKIP, 0.95, 28), ("concept", CONCEPT_SKIP, 0.90, 26)])
def test_the_colour_that_is_asked_for_is_made_and_the_rest_stays(nodes, method, skip, made, decibel):
    pairs = tasks("colour")
    share, psnr = verdict("colour", pairs, edited(nodes, pairs, method, skip))
    assert share >= made and psnr >= decibel


@pytest.mark.demo
@pytest.mark.parametrize("method", ["FlowEdit", "LEDITS"])
def test_the_kind_that_is_asked_for_is_made_and_the_rest_stays(nodes, method):
    pairs = tasks("kind")
    share, psnr = verdict("kind", pairs, edited(nodes, pairs, method, KIND_SKIP[method]))
    assert share >= 0.85 and psnr >= 25


@pytest.mark.demo
def test_nothing_asked_gives_the_picture_back(nodes):
    pairs = tasks("colour")[:AT_ONCE]
    same = [(source, source) for source, _ in pairs]
    for start, group in groups(same):
        sources = [s for s, _ in group]
        latent, empty, source = nodes.encode([draw(s)[0] for s in sources]), nodes.prompts([""]), nodes.prompts(sentences(sources))
        path = EditFriendlyInversion.execute(model=nodes.model, negative=empty, positive=source, latent=latent, cfg=1.0,
                                             steps=STEPS, scheduler="simple", eta=1.0, seed=start)[0]
        out = LeditsKSampler.execute(model=nodes.model, negative=empty, positive=source, inversion=path, cfg=1.0, skip=0)[0]
        assert float((out["samples"] - latent["samples"]).abs().max()) < 1e-4
