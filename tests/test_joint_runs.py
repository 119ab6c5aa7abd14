"""Attention control on transformers of flow models as a run has it: branches, other packs, references, sizes, stores, traces."""
import sys

import pytest
import torch
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.attention_hooks.controls.record import Record
from comfyui_ledits.files import store_file
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.samplers.guider import LeditsGuider
from comfyui_ledits.samplers.ledits import LeditsSampler
from oracles.joint_softmax import KINDS, Explicit, softmax
from support import editing, flow_editing, tiny_flow

EVERY = (0.0, 1.0)
PICTURES = [kind for kind in KINDS if kind not in ("wan", "hunyuan")]


def structure(words, **kwargs):
    return PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_put_into_itself_changes_no_bit(kind):
    path, words = flow_editing.path(kind, 2, 1), flow_editing.prompts(kind, 12, 12)
    words = words.__class__(**{**vars(words), "target": words.source})
    plain = flow_editing.edit(kind, path, words, [])
    for control in (structure(words), MasaCtrl(prompts=words, window=EVERY, blocks="all")):
        assert torch.equal(flow_editing.edit(kind, path, words, [control]), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_in_one_call_or_two(kind):
    """At guidance both are edited, the negative's by the negative's own rows."""
    path, words = flow_editing.path(kind, 1), flow_editing.prompts(kind, 12, 12)
    controls = [MasaCtrl(prompts=words, window=EVERY, blocks="all")]
    if kind != "hunyuan":
        controls.append(PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0)))
    together = flow_editing.edit(kind, path, words, controls, cfg=3.0)
    model = tiny_flow.model(kind).clone()
    few = model.model.memory_required
    try:
        editing.split(model)
        apart = editing.run(model, path, words.target, tiny_flow.conditioning(kind, 3), 3.0, controls)[0]
    finally:
        model.model.memory_required = few
    assert (together - flow_editing.edit(kind, path, words, [], cfg=3.0)).abs().max() > 1e-3
    assert (together - apart).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in PICTURES if kind != "qwen"])
def test_odd_sizes(kind):
    path, words = flow_editing.path(kind, 1, height=7, width=9), flow_editing.prompts(kind)
    controls = [structure(words), PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0), blend=LocalBlend(words=("wa",)))]
    assert torch.isfinite(flow_editing.edit(kind, path, words, controls)).all()


@pytest.mark.parametrize("kind", PICTURES)
def test_maps_of_words(kind):
    """Shares of the row of the joint softmax, mean over heads and over the chosen blocks."""
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind)
    twice = 2 if kind == "hidream" else 1
    seen, recorded = {"source": [], "target": []}, {}

    def override(step, name):
        def look(call, source):
            for of, at in (("source", source), ("target", call)):
                maps = softmax(at.rows(at.q), at.k)[..., at.words].mean(1)
                if twice == 2:
                    n = len(at.words) // 3
                    maps = torch.cat([maps[..., :n], maps[..., n : 2 * n] + maps[..., 2 * n :]], -1)
                seen[of].append(maps)
            return softmax(call.q, call.k) @ call.v
        picture = 64 if kind == "flux2" else 16
        return Explicit(kind, picture, (9, 12)[name == "target"] * twice, edit=look if name == "target" else None, recorded=recorded)

    flow_editing.slow_edit(kind, path, {"source": words.source, "target": words.target}, override)
    _, sampler = run(kind, path, words, [Record(prompts=words, blocks="all")])
    maps = sampler.observed.maps[0]
    for side, name in enumerate(("source", "target")):
        expected = torch.stack(seen[name]).mean(0)
        assert (maps[side].flatten(2).mT - expected).abs().max() < 1e-6, name


def run(kind, path, words, attention, cfg=1.0, **kwargs):
    """The latent and the SAMPLER."""
    guider = LeditsGuider(tiny_flow.model(kind), words.target, tiny_flow.conditioning(kind, 3), cfg)
    sampler = LeditsSampler(path, attention=attention, **kwargs)
    picture = path.latent_format.process_out(path.latents[-1])
    with torch.inference_mode():
        out = guider.sample(torch.zeros_like(picture), picture, sampler, path.sigmas, disable_pbar=True)
    return path.latent_format.process_in(out), sampler


@pytest.mark.parametrize("kind", PICTURES)
def test_local_blend_keeps_the_path_outside(kind):
    path, words = flow_editing.path(kind, 2), flow_editing.prompts(kind)
    blend = LocalBlend(words=("wa", "wb"), threshold=0.95, start=0.0)
    out, sampler = run(kind, path, words, [PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0), blend=blend)])
    mask = sampler.observed.masks["local blend"][1][1]
    assert mask.any() and not mask.all()
    outside = ~mask[:, None].expand(-1, out.shape[1], -1, -1)
    outside = outside[:, :, None] if out.ndim == 5 else outside
    assert (out - path.latents[-1])[outside].abs().max() < 1e-6  # of the latent's format, which scales and shifts
    assert (out - path.latents[-1])[~outside].abs().max() > 1e-3


@pytest.mark.parametrize("kind", PICTURES)
def test_masks_from_words_serve_the_negatives_branch_too(kind):
    """Seen in the positive's call, which comes first; within them MasaCtrl looks up, as with the same masks given."""
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind, 12, 12)
    worded = MasaCtrl(prompts=words, window=EVERY, blocks="all", source_words=("wa",), target_words=("wb",), threshold=0.4,
                      map_blocks="double.0")
    out, sampler = run(kind, path, words, [worded], cfg=3.0)
    source, target = (m.float() for m in sampler.observed.masks["MasaCtrl"][0])
    assert 0 < source.mean() < 1 and 0 < target.mean() < 1
    given = MasaCtrl(prompts=words, window=EVERY, blocks="all, -double.0", source_mask=source, target_mask=target)
    first = MasaCtrl(prompts=words, window=EVERY, blocks="double.0")  # no map is seen before it
    assert (out - run(kind, path, words, [first, given], cfg=3.0)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen", "chroma"])
def test_another_packs_override_and_skipped_layers(kind):
    """The other override sees every attention, and acts; SkipLayerGuidance's pass without a block is its own."""
    path, words = flow_editing.path(kind), flow_editing.prompts(kind, 12, 12)
    controls = [structure(words), PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0))]
    model, seen = tiny_flow.model(kind).clone(), []

    def half(func, q, k, v, *args, **kwargs):
        seen.append(q.shape)
        return func(q, k, 0.5 * v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = half
    other = editing.run(model, path, words.target, tiny_flow.conditioning(kind, 3), 1.0, controls)[0]
    assert seen and (other - flow_editing.edit(kind, path, words, controls)).abs().max() > 1e-3
    skipped = SkipLayerGuidanceDiT.execute(tiny_flow.model(kind), 2.0, 0.0, 1.0, "1", "", 0.0)[0]
    out = editing.run(skipped, path, words.target, tiny_flow.conditioning(kind, 3), 3.0, controls)[0]
    assert torch.isfinite(out).all() and (out - flow_editing.edit(kind, path, words, controls, cfg=3.0)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_another_packs_override_is_called_as_the_network_calls_it(kind):
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind, 12, 12)

    def calls(controls):
        model, seen = tiny_flow.model(kind).clone(), []
        model.model_options["transformer_options"]["optimized_attention_override"] = \
            lambda func, *args, **kwargs: (seen.append((len(args), *sorted(kwargs))), func(*args, **kwargs))[1]
        editing.run(model, path, words.target, words.target, 1.0, controls)
        return seen

    assert set(calls([structure(words)])) == set(calls([]))


@pytest.mark.parametrize("kind", ["flux", "flux2", "qwen"])
def test_reference_pictures(kind):
    """They lie behind the picture and stay the target's own; the picture's rows are the source's."""
    model, words = tiny_flow.model(kind), flow_editing.prompts(kind, 12, 12)
    reference = tiny_flow.latent(kind, 1, height=4, width=6, seed=400)["samples"]
    more = {"reference_latents": [reference]}
    words = words.__class__(**{**vars(words), **{side: [[c[0][0], {**c[0][1], **more}]] for side, c in
                                                 (("source", words.source), ("target", words.target))}})
    path, picture = flow_editing.path(kind, 1), 64 if kind == "flux2" else 16
    first, recorded = 512 if kind == "flux2" else 12, {}

    class Beside(Explicit):
        def _places(self, site, tokens):
            return slice(first, first + picture), torch.arange(first - 12, first)

    def edit(call, source):
        q, k = call.q.clone(), call.k.clone()
        q[:, :, call.image], k[:, :, call.image] = source.rows(source.q), source.rows(source.k)
        return softmax(q, k) @ call.v

    def override(step, name):
        return Beside(kind, picture, 12, edit=edit if name == "target" else None, recorded=recorded)

    expected = flow_editing.slow_edit(kind, path, {"source": words.source, "target": words.target}, override)
    out = editing.run(model, path, words.target, words.target, 1.0, [structure(words)])[0]
    assert (out - expected).abs().max() < 1e-5
    assert torch.isfinite(editing.run(model, path, words.target, words.target, 1.0, [
        PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0))])[0]).all()


def test_guidance_of_the_positive_is_the_sources_too():
    """FluxGuidance stands behind Edit Prompts' target alone; the source without a value of its own gets the same."""
    path, words = flow_editing.path("flux"), flow_editing.prompts("flux", 12, 12)
    def guided(conditioning, value):
        return [[c[0], {**c[1], "guidance": value}] for c in conditioning]

    target, negative = guided(words.target, 1.5), tiny_flow.conditioning("flux", 3)
    def edit(source):
        own = words.__class__(**{**vars(words), "source": source})
        return editing.run(tiny_flow.model("flux"), path, target, negative, 1.0, [structure(own)])[0]

    assert torch.equal(edit(words.source), edit(guided(words.source, 1.5)))
    assert (edit(words.source) - edit(guided(words.source, 8.0))).abs().max() > 1e-4


def guided(words, value):
    """`EditPrompts` whose target carries guidance, as FluxGuidance puts it there."""
    return words.__class__(**{**vars(words), "target": [[c[0], {**c[1], "guidance": value}] for c in words.target]})


def test_a_kept_store_is_for_the_guidance_it_was_captured_with(tmp_path):
    """The live pass takes the positive's; so does Capture Attention where it is connected, and other guidance is refused."""
    model, path, words = tiny_flow.model("flux"), flow_editing.path("flux"), flow_editing.prompts("flux", 12, 12)
    words, negative = guided(words, 1.5), tiny_flow.conditioning("flux", 3)
    common = {"model": model, "negative": negative, "inversion": path, "attention": (structure(words),), "skip": 0,
              "precision": "float32"}
    with torch.inference_mode():
        right, wrong = (CaptureAttention.execute(**common, **more)[0] for more in ({"positive": words.target}, {}))
    live = editing.run(model, path, words.target, negative, 1.0, [structure(words)])[0]
    store_file.save(tmp_path / "store", right)
    for store in (right, store_file.load(tmp_path / "store")):
        kept = editing.run(model, path, words.target, negative, 1.0, [structure(words)], store=store)[0]
        assert (kept - live).abs().max() < 1e-5
    with pytest.raises(ValueError, match="captured with guidance 3.5, the edit has guidance 1.5: connect the edit's positive"):
        editing.run(model, path, words.target, negative, 1.0, [structure(words)], store=wrong)


@pytest.mark.parametrize("kind", ["lumina2", "zimage"])
def test_source_and_negative_of_other_lengths(kind):
    """Where positions depend on the number of words each branch is turned by its own, in one call or two."""
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind, 9, 12)
    control, negative = [MasaCtrl(source=words.source, window=EVERY, blocks="all")], tiny_flow.conditioning(kind, 3, 40)
    one, three, nine = (editing.run(tiny_flow.model(kind), path, words.target, negative, cfg, control)[0] for cfg in (1.0, 3.0, 9.0))
    plain = editing.run(tiny_flow.model(kind), path, words.target, negative, 3.0, [])[0]
    assert (three - plain).abs().max() > 1e-4
    assert ((nine - one) - 4 * (three - one)).abs().max() < 1e-5  # of one step: guidance is linear in its branches


def test_a_mask_of_the_words(monkeypatch):
    """Qwen-Image hides padding from the picture: rows and masks follow it, edits of words are refused."""
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 9:] = 0
    words = flow_editing.prompts("qwen", 12, 12)
    words = words.__class__(**{**vars(words), **{side: [[c[0][0], {**c[0][1], "attention_mask": mask}]] for side, c in
                                                 (("source", words.source), ("target", words.target))}})
    path, recorded = flow_editing.path("qwen"), {}

    def edit(call, source):
        q, k = call.q.clone(), call.k.clone()
        if source is not None:
            q[:, :, call.image], k[:, :, call.image] = source.rows(source.q), source.rows(source.k)
        seen = torch.arange(k.shape[2])
        seen = seen[(seen < 9) | (seen >= 12)]
        return softmax(q, k[:, :, seen]) @ call.v[:, :, seen]

    class Masked(Explicit):
        def __call__(self, *args, **kwargs):
            if self.edit is not None:
                return super().__call__(*args, **kwargs)
            self.edit = lambda call, _: (self.calls.__setitem__(call.number, call), edit(call, None))[1]
            return super().__call__(*args, **kwargs)

    def override(step, name):
        return Masked("qwen", 16, 12, edit=edit if name == "target" else None, recorded=recorded)

    expected = flow_editing.slow_edit("qwen", path, {"source": words.source, "target": words.target}, override)
    out = editing.run(tiny_flow.model("qwen"), path, words.target, words.target, 1.0, [structure(words)])[0]
    assert (out - expected).abs().max() < 1e-5
    bare = flow_editing.prompts("qwen", 12, 12)
    for source, target in ((words.source, words.target), (words.source, bare.target), (bare.source, words.target)):
        given = words.__class__(**{**vars(words), "source": source, "target": target})
        for control in (PromptToPrompt(prompts=given, cross=EVERY), Record(prompts=given)):
            with pytest.raises(ValueError, match="hidden from the picture by a mask"):
                flow_editing.edit("qwen", path, given, [control])


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_of_a_block_is_seen(kind):
    """The interpreter counts calls of attention in the network's own files; a network that loses a hook fails here."""
    path, words = flow_editing.path(kind, 1, 1), flow_editing.prompts(kind, 12, 12)
    counted, seen, names = [], [], ("attention_pytorch", "attention_basic", "attention_sub_quad", "attention_split")

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_name in names:
            counted.append(frame.f_code.co_name)

    model = tiny_flow.model(kind).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = \
        lambda func, *args, **kwargs: (seen.append(1), func(*args, **kwargs))[1]
    sys.setprofile(profile)
    try:
        editing.run(model, path, words.target, words.target, 1.0, [])
    finally:
        sys.setprofile(None)
    assert len(counted) == len(seen) > 0
    store, _ = editing.capture(tiny_flow.model(kind), path, tiny_flow.conditioning(kind, 3), [structure(words)])
    network = tiny_flow.model(kind).model.diffusion_model
    blocks = sum(len(getattr(network, name, ())) for name in (
        "double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "layers", "blocks", "double_layers",
        "single_layers", "double_stream_blocks", "single_stream_blocks"))
    assert len({name.split("/")[3] for name in store.tensors()}) == blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_store_and_its_file(kind, tmp_path):
    path, words = flow_editing.path(kind), flow_editing.prompts(kind, 12, 12)
    controls = [structure(words)]
    if kind not in ("hunyuan", "wan"):
        controls.append(PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0), blend=LocalBlend(words=("wa",))))
    live = flow_editing.edit(kind, path, words, controls)
    store, _ = editing.capture(tiny_flow.model(kind), path, tiny_flow.conditioning(kind, 3), controls, dtype=torch.float32)
    assert (flow_editing.edit(kind, path, words, controls, store=store) - live).abs().max() < 1e-5
    store_file.save(tmp_path / "store", store)
    again = store_file.load(tmp_path / "store")
    assert (flow_editing.edit(kind, path, words, controls, store=again) - live).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_on_the_model(kind):
    model = tiny_flow.model(kind)

    def trace():
        network = model.model.diffusion_model
        return (repr(model.model_options), [sorted(vars(m)) for m in network.modules()], dict(model.object_patches),
                [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()], dict(model.patches))

    path, words, before = flow_editing.path(kind), flow_editing.prompts(kind, 12, 12), trace()
    plain = flow_editing.edit(kind, path, words, [])
    flow_editing.edit(kind, path, words, [structure(words)])
    assert trace() == before
    assert torch.equal(flow_editing.edit(kind, path, words, []), plain)
