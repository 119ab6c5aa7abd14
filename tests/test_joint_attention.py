"""Attention control on transformers of flow models, in every block, against explicit matrices over words and picture."""
import pytest
import torch
from comfyui_ledits.attention_hooks.backbones.calls import JointCall
from comfyui_ledits.attention_hooks.controls.copy_attention import CopyAttention
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from oracles.joint_softmax import KINDS, Explicit, softmax
from support import flow_editing

PICTURE = {"flux2": 64, "wan": 48, "hunyuan": 48}  # tokens of the picture; 16 elsewhere
WORDS = (9, 12)
EVERY = (0.0, 1.0)
WITH_WORDS = [kind for kind in KINDS if kind != "hunyuan"]


def check(kind, control, explicit, *, steps=2, batch=1, sizes=WORDS, moves=1e-3, **kwargs):
    """The nodes' edit and the slow one give the same latent, and the edit is one."""
    path, words = flow_editing.path(kind, batch, steps), flow_editing.prompts(kind, *sizes)
    recorded, twice = {}, 2 if kind == "hidream" else 1

    def override(step, name):
        own = name == "target"
        return Explicit(kind, PICTURE.get(kind, 16), sizes[own] * twice, edit=explicit if own else None, recorded=recorded)

    conds = {"source": words.source, "target": words.target}
    expected = flow_editing.slow_edit(kind, path, conds, override)
    plain = flow_editing.edit(kind, path, words, [])
    controls = control(words)
    out = flow_editing.edit(kind, path, words, controls if isinstance(controls, list) else [controls], **kwargs)
    assert (expected - plain).abs().max() > moves
    assert (out - expected).abs().max() < 1e-5


def rows(names):
    """Rows of the picture's q, k, v from the source, for every query."""

    def edit(call, source):
        own = {"q": call.q, "k": call.k, "v": call.v}
        if call.site != "cross":
            for name in names:
                own[name] = own[name].clone()
                own[name][:, :, call.image] = getattr(source, name)[:, :, source.image]
        return softmax(own["q"], own["k"]) @ own["v"]

    return edit


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_queries_and_keys(kind):
    """With prompts of equal length, positions are the same for all kinds."""
    check(kind, lambda words: PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY), rows("qk"), sizes=(12, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_keys_and_values_of_two_pictures(kind):
    check(kind, lambda words: MasaCtrl(prompts=words, window=EVERY, blocks="all"), rows("kv"), sizes=(12, 12), batch=2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lumina2", "zimage")])
def test_rows_with_prompts_of_other_lengths(kind):
    check(kind, lambda words: PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY), rows("qk"))


def by_words(words, factors=None):
    """`(maps, columns, call, source)`: maps of the picture's queries whose `columns`, the words, follow Prompt-to-Prompt."""
    m, own = words.alignment.matrix.double(), words.alignment.own.double()

    def change(maps, columns, call, source):
        twice = len(columns) - len(own)  # HiDream: the second encoder's words once more, from their own copy
        column = torch.cat([torch.arange(len(own)), torch.arange(len(own) - twice, len(own))])
        at_source = torch.cat([torch.arange(len(m)), torch.arange(len(m) - (len(source.words) - len(m)), len(m))])
        copy_t, copy_s = torch.arange(len(column)) >= len(own), torch.arange(len(at_source)) >= len(m)
        matrix = m[at_source][:, column] * (copy_s[:, None] == copy_t)
        theirs = softmax(source.rows(source.q), source.k[:, :, source.words])
        f = torch.ones(len(column)).double() if factors is None else factors.double()[column]
        maps, share = maps.clone(), maps[..., columns].sum(-1, keepdim=True)
        if call.site == "cross":
            new = (theirs @ matrix + maps[..., columns] * own[column]) * f  # an attention of its own, as in a U-Net
        else:
            new = theirs @ matrix + maps[..., columns] / share * own[column]
            new = new / new.sum(-1, keepdim=True) * share * f
        maps[..., columns] = new
        return maps / maps.sum(-1, keepdim=True) if call.site == "joint" else maps

    return change


def mixed(words, factors=None):
    """Prompt-to-Prompt of the picture's queries by explicit maps."""
    change = by_words(words, factors)

    def edit(call, source):
        out = softmax(call.q, call.k) @ call.v
        if call.site != "self":
            out[:, :, call.image] = change(softmax(call.rows(call.q), call.k), call.words, call, source) @ call.v
        return out

    return edit


@pytest.mark.parametrize("share", [1.0, 0.5])  # replace: all columns the source's; refine: some of them
@pytest.mark.parametrize("kind", WITH_WORDS)
def test_prompt_to_prompt(kind, share, monkeypatch):
    words = flow_editing.prompts(kind, *WORDS, share=share)
    monkeypatch.setattr(flow_editing, "prompts", lambda *args: words)
    check(kind, lambda words: PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0)), mixed(words))


def test_a_swap_of_words_sums_over_them_once(monkeypatch):
    """Where all shares come from the source they sum to 1 already; a sum to divide by is needed where some stay own."""
    path, seen, alone = flow_editing.path("flux"), [], JointCall.alone
    monkeypatch.setattr(JointCall, "alone", lambda self, *args: seen.append(self) or alone(self, *args))
    for share, sums in ((1.0, 1), (0.5, 4)):
        seen.clear()
        words = flow_editing.prompts("flux", *WORDS, share=share)
        flow_editing.edit("flux", path, words, [PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0))])
        assert len(seen) == sums * len(set(map(id, seen)))


@pytest.mark.parametrize("kind", WITH_WORDS)
def test_reweighting_is_a_bias_of_ln_c(kind, monkeypatch):
    """Of the words' scores before the softmax: nothing is taken from the source."""
    words = flow_editing.prompts(kind, *WORDS, share=0.0)
    monkeypatch.setattr(flow_editing, "prompts", lambda *args: words)
    factors = torch.ones(len(words.target_tokens))
    factors[2], factors[5], factors[-1] = 3.0, 0.0, 0.5
    strengths = tuple((flow_editing.word(n), float(factors[n])) for n in (2, 5, len(factors) - 1))

    def biased(call, source):
        out = softmax(call.q, call.k) @ call.v
        if call.site == "self":
            return out
        column = torch.cat([torch.arange(len(factors)), torch.arange(2 * len(factors) - len(call.words), len(factors))])
        scores = call.rows(call.q) @ call.k.mT * call.q.shape[-1] ** -0.5
        scores[..., call.words] += factors.double().log()[column]
        out[:, :, call.image] = scores.softmax(-1) @ call.v
        return out

    explicit = biased if kind != "wan" else mixed(words, factors)  # an attention of its own: scaled, as in a U-Net
    check(kind, lambda words: PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0), equalizer=strengths), explicit)


def regions(kind, shape=(4, 4)):
    """(source, target) masks of the picture as MASKs, and as token masks."""
    g = torch.Generator().manual_seed(3)
    side = 8 if kind == "flux2" else 4
    masks = [(torch.rand(1, side, side, generator=g) > 0.5) for _ in range(2)]
    frames = 3 if kind in ("wan", "hunyuan") else 1
    return [m.float() for m in masks], [m.flatten().repeat(frames) for m in masks]


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masactrl_looks_up_the_source_within_masks(kind, own_keys):
    given, (source_mask, target_mask) = regions(kind)

    def edit(call, source):
        out = softmax(call.q, call.k) @ call.v
        if call.site == "cross":
            return out
        picture = torch.zeros(call.k.shape[2], dtype=torch.bool)
        picture[call.image] = True
        for inside in (True, False):
            parts = [(call.k[:, :, ~picture], call.v[:, :, ~picture])]
            parts.append([t[:, :, source.image][:, :, source_mask == inside] for t in (source.k, source.v)])
            if own_keys:
                parts.append([t[:, :, call.image][:, :, target_mask == inside] for t in (call.k, call.v)])
            k, v = (torch.cat(tensors, 2) for tensors in zip(*parts))
            seen = softmax(call.rows(call.q), k) @ v
            here = torch.zeros(call.q.shape[2], dtype=torch.bool)
            here[call.image] = target_mask == inside
            out[:, :, here] = seen[:, :, target_mask == inside]
        return out

    check(kind, lambda words: MasaCtrl(prompts=words, window=EVERY, blocks="all", own_keys=own_keys, source_mask=given[0],
                                       target_mask=given[1]), edit, sizes=(12, 12))


def beside(call):
    """Which tokens are not the picture's, and where the words are among them."""
    others = torch.ones(call.k.shape[2], dtype=torch.bool)
    others[call.image] = False
    return others, (others.cumsum(0) - 1)[call.words]


JOINED = [kind for kind in WITH_WORDS if kind != "wan"]


@pytest.mark.parametrize("kind", JOINED)
def test_words_and_copied_rows_chained(kind, monkeypatch):
    """Prompt-to-Prompt beside a structure's rows: its own shares are those of the copied queries and keys."""
    words = flow_editing.prompts(kind, 12, 12)
    monkeypatch.setattr(flow_editing, "prompts", lambda *args: words)
    change = by_words(words)

    def edit(call, source):
        q, k = call.q.clone(), call.k.clone()
        q[:, :, call.image], k[:, :, call.image] = source.rows(source.q), source.rows(source.k)
        out = softmax(q, k) @ call.v
        out[:, :, call.image] = change(softmax(call.rows(q), k), call.words, call, source) @ call.v
        return out

    check(kind, lambda words: [PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0)),
                               PlugAndPlay(prompts=words, features=(0, 0), attention=EVERY)], edit, sizes=(12, 12))


@pytest.mark.parametrize(("own_keys", "masks"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("kind", JOINED)
def test_words_and_looked_up_keys_chained(kind, own_keys, masks, monkeypatch):
    """Prompt-to-Prompt beside MasaCtrl: within each region the words' share is of the row over the keys of that region."""
    words = flow_editing.prompts(kind, 12, 12)
    monkeypatch.setattr(flow_editing, "prompts", lambda *args: words)
    given, tokens = regions(kind)
    change, everywhere = by_words(words, None), torch.ones_like(tokens[0])
    source_mask, target_mask = tokens if masks else (everywhere, everywhere)

    def edit(call, source):
        out = softmax(call.q, call.k) @ call.v
        others, columns = beside(call)
        for inside in (True, False):
            parts = [(call.k[:, :, others], call.v[:, :, others])]
            parts.append([t[:, :, source.image][:, :, source_mask == inside] for t in (source.k, source.v)])
            if own_keys:
                parts.append([t[:, :, call.image][:, :, target_mask == inside] for t in (call.k, call.v)])
            k, v = (torch.cat(tensors, 2) for tensors in zip(*parts))
            seen = change(softmax(call.rows(call.q), k), columns, call, source) @ v
            here = torch.zeros(call.q.shape[2], dtype=torch.bool)
            here[call.image] = target_mask == inside
            out[:, :, here] = seen[:, :, target_mask == inside]
        return out

    kept = dict(zip(("source_mask", "target_mask"), given)) if masks else {}
    check(kind, lambda words: [PromptToPrompt(prompts=words, cross=EVERY, self_=(0, 0)),
                               MasaCtrl(prompts=words, window=EVERY, blocks="all", own_keys=own_keys, **kept)],
          edit, sizes=(12, 12))


@pytest.mark.parametrize("names", ["qk", "kv", "v"])
@pytest.mark.parametrize("kind", KINDS)
def test_copied_rows_at_some_places(kind, names):
    """What ConsistEdit does beside a mask: rows of the source outside, the target's own inside."""
    given, tokens = regions(kind)

    def edit(call, source):
        own = {"q": call.q, "k": call.k, "v": call.v}
        if call.site != "cross":
            outside = torch.zeros(call.q.shape[2], dtype=torch.bool)
            outside[call.image] = ~tokens[0]
            for name in names:
                own[name] = own[name].clone()
                own[name][:, :, outside] = getattr(source, name)[:, :, source.image][:, :, ~tokens[0]]
        return softmax(own["q"], own["k"]) @ own["v"]

    check(kind, lambda words: CopyAttention(prompts=words, rows=names, window=EVERY, mask=given[0]), edit, sizes=(12, 12))
