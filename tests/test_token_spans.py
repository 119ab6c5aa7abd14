"""The words of prompts in the tokens of flow models' text encoders, against the offsets that other tokenizers give."""
import functools
import re
import unicodedata

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import pytest
import sentencepiece
import torch
import transformers
from comfyui_ledits.attention_hooks.text.prompts import edit_prompts
from comfyui_ledits.attention_hooks.text.tokens import PAD, START, TEMPLATE, WORD, draft, read
from safetensors.torch import save_file
from support import text_encoders
from support.text_encoders import ALL, encoded

# Letters with their accents, single digits, runs of other signs.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|(?:[^\W\d_][\u0300-\u036f\u3099]*)+|\d|(?:[^\w\s]|_)+")


def fast_offsets(own, text):
    """[(first, end)] of every token, from the `tokenizers` library."""
    return own.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]


@functools.cache
def spiece(own):
    return sentencepiece.SentencePieceProcessor(model_proto=own.serialize_model().numpy().tobytes())


def sentencepiece_offsets(own, text):
    """[(first, end)] of every token, from SentencePiece; bytes of one character all have its place."""
    processor = spiece(own.tokenizer)
    try:
        out = processor.encode(text, return_type="offset_mapping")
        pieces, offsets = out["pieces"], list(out["offsets"])
    except TypeError:  # older versions
        out = processor.encode(text, out_type="immutable_proto").pieces
        pieces, offsets = [p.piece for p in out], [(p.begin, p.end) for p in out]
    for n in reversed(range(len(pieces) - 1)):
        if pieces[n].startswith("<0x") and offsets[n][0] == offsets[n][1]:
            offsets[n] = offsets[n + 1]
    return offsets


def expected_words(parts, offsets, first):
    """[(word, tokens)]: all tokens that touch a word's letters, and those without letters before it."""
    words, loose, row = [], [], first
    for part in parts:
        its = [[unicodedata.normalize("NFC", m.group()), m.span(), set()] for m in WORDS.finditer(part.lower())]
        for start, end in offsets(part):
            touched = [w for w in its if start < w[1][1] and end > w[1][0]]
            for w in touched:
                w[2].add(row)
            if touched:
                touched[0][2].update(loose)
            loose = [] if touched else [*loose, row]
            row += 1
        words += its
    if words:
        words[-1][2].update(loose)
    return [(word, tuple(sorted(rows))) for word, _, rows in words if rows]


def llama_as_published():
    """A CLIP with Llama 3's tokenizer from ComfyUI's own files. (Some versions of `transformers` lose its spaces.)"""
    class Own(comfy.sd1_clip.SDTokenizer):
        def __init__(self, **_):
            folder = text_encoders.module("hunyuan_video").os.path.dirname(text_encoders.module("hunyuan_video").__file__)
            super().__init__(f"{folder}/llama_tokenizer", pad_with_end=False, embedding_size=16, embedding_key="llama",
                             tokenizer_class=transformers.PreTrainedTokenizerFast, has_end_token=False,
                             pad_to_max_length=False, max_length=99999999, pad_token=128258, min_length=64)

    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = comfy.sd1_clip.SD1Tokenizer(name="llama", tokenizer=Own), {}
    clip.cond_stage_model = torch.nn.Module()
    clip.cond_stage_model.llama = torch.nn.Module()
    return clip


# kind: (the tokenizer behind the CLIP's, its offsets, whether it reads weights)
TOKENIZERS = {
    "chroma": ("clip_t5xxl", fast_offsets, True),
    "aura": ("clip_pile_t5xl", sentencepiece_offsets, True),
    "qwen": ("qwen25_7b", fast_offsets, False),
    "zimage": ("qwen3_4b", fast_offsets, False),
    "llama": ("llama", fast_offsets, True),
    "wan": ("clip_umt5xxl", sentencepiece_offsets, True),
    "lumina2": ("gemma2_2b", sentencepiece_offsets, True),
    "flux2": ("mistral3_24b", fast_offsets, False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_are_where_the_tokenizer_s_own_offsets_have_them(kind):
    clip = llama_as_published() if kind == "llama" else text_encoders.clip(kind)
    name, offsets, weights = TOKENIZERS[kind]
    own = getattr(clip.tokenizer, name)
    several = 0
    for number in range(200):
        text = text_encoders.random_prompt(number)
        escaped = comfy.sd1_clip.escape_important(text)
        parts = [part for part, _ in comfy.sd1_clip.token_weights(escaped, 1.0)] if weights else [escaped]
        parts = [comfy.sd1_clip.unescape_important(part) for part in parts]
        its = draft(clip, text)
        start = its.parts[0].kinds.index(WORD)
        expected = expected_words(parts, lambda part: offsets(own, part), start)
        assert [(word.text, word.positions) for word in its.words] == expected, text
        several += sum(len(rows) > 1 for _, rows in expected)
    assert several > 500


TEXT = "a ginger-cat, (sitting:1.2) on 12 sofas"


def rows_of(conditioning):
    rows = conditioning[0][0].shape[1]
    return rows + (conditioning[0][1]["conditioning_llama3"].shape[2] if "conditioning_llama3" in conditioning[0][1] else 0)


def spelled(clip, tokens, positions):
    """The letters of tokens, by the tokenizers' own decoders."""
    out = ""
    for part in tokens.parts:
        name = {"clip": "clip_l", "t5xxl": "t5xxl"}.get(part.name, part.name)
        own = next(getattr(clip.tokenizer, n) for n in (name, f"clip_{name}") if hasattr(clip.tokenizer, n))
        ids = [tokens.ids[p] for p in positions if part.first <= p < part.end]
        own = own.tokenizer
        out += (getattr(own, "tokenizer", own) if hasattr(own, "serialize_model") else own).decode(ids) + " "
    return out.lower()


@pytest.mark.parametrize("kind", ALL)
def test_tokens_are_the_encoder_s_rows_and_spell_their_words(kind):
    clip = text_encoders.clip(kind)
    tokens = read(clip, TEXT)
    assert len(tokens) == rows_of(encoded(clip, TEXT)) == tokens.parts[-1].end == tokens.chunks[-1]
    weights = kind in ("flux", "sd3", "chroma", "aura", "wan", "omnigen2", "lumina2", "hidream", "hunyuan")
    words = ["a", "ginger", "-", "cat", ",", *(["sitting"] if weights else ["(", "sitting", ":", "1", ".", "2", ")"]), "on",
             "1", "2", "sofas"]
    assert [word.text for word in tokens.words] == words
    for word in tokens.words:
        for part in tokens.parts:
            assert any(part.first <= p < part.end for p in word.positions), (word, part)
            assert word.text in spelled(clip, tokens, word.positions).replace(" ", ""), word
    assert tokens.find("Ginger cat!")[0] == tokens.find("ginger")[0]
    assert not {tokens.kinds[p] for word in tokens.words for p in word.positions} - {WORD}


SWAPPED = ["flux", "chroma", "aura", "qwen", "zimage", "klein", "flux2", "lumina2", "wan"]


@pytest.mark.parametrize("kind", SWAPPED)
def test_the_rows_of_a_swapped_word_are_where_the_conditioning_differs_first(kind):
    """The networks see every token, but nothing before it (or hardly), so the first that differs is the word's own."""
    clip = text_encoders.clip(kind)
    out = edit_prompts(clip, "a red cat on the bench", "a red dog on the bench", "replace")
    cat, dog = out.source_tokens.find("cat"), out.target_tokens.find("dog")
    a, b = out.source[0][0][0], out.target[0][0][0]
    rows = min(len(a), len(b))
    differs = (a[:rows] - b[:rows]).abs().amax(1)
    first = next(n for n, (x, y) in enumerate(zip(out.source_tokens.ids, out.target_tokens.ids)) if x != y)
    assert first in cat and first in dog
    assert differs[first] > 1e-3
    if kind in ("qwen", "zimage", "klein", "flux2", "lumina2"):  # causal: what comes before is the same
        assert differs[:first].max() < 1e-4


def test_the_template_is_where_it_should_be():
    for kind, kept in (("qwen", False), ("zimage", True), ("klein", True), ("omnigen2", True), ("flux2", True)):
        clip = text_encoders.clip(kind)
        own = getattr(clip.tokenizer, clip.tokenizer.clip).tokenizer
        before, behind = (own(text, add_special_tokens=False)["input_ids"] for text in clip.tokenizer.llama_template.split("{}"))
        tokens = read(clip, "a cat")
        kinds = [k for k in tokens.kinds if k not in (PAD, START)]
        assert kinds == [TEMPLATE] * len(before) * kept + [WORD] * 2 + [TEMPLATE] * len(behind), kind


def test_a_prompt_that_begins_with_a_new_line_leaves_more_of_the_template():
    clip = text_encoders.clip("qwen")
    tokens = read(clip, "\n\na cat")
    assert len(tokens) == rows_of(encoded(clip, "\n\na cat"))
    assert spelled(clip, tokens, tokens.find("cat")).strip() == "cat" and TEMPLATE in tokens.kinds


def test_an_empty_prompt_has_no_words():
    for kind in ("flux", "sd3", "qwen", "zimage", "chroma", "lumina2"):
        clip = text_encoders.clip(kind)
        tokens = read(clip, "")
        assert tokens.words == () and len(tokens) == rows_of(encoded(clip, ""))


@pytest.mark.parametrize("loaded, parts", [
    (dict(t5=False), ["clip"]),
    (dict(clip_l=False), ["clip", "t5xxl"]),
    (dict(clip_g=False), ["clip", "t5xxl"]),
    (dict(clip_l=False, clip_g=False), ["t5xxl"]),
])
def test_sd3_with_some_of_its_encoders(loaded, parts):
    clip = text_encoders.clip("sd3", **loaded)
    for text, chunks in (("a cat", 1), ("word " * 80 + "cat", 2)):
        tokens = read(clip, text)
        assert [part.name for part in tokens.parts] == parts
        assert len(tokens) == rows_of(encoded(clip, text))
        assert len(tokens.find("cat")) == len(parts)
        if "clip" in parts:
            assert tokens.parts[0].end == 77 * chunks


def test_words_of_hidream_that_t5_does_not_read_are_llama_s_alone():
    clip = text_encoders.clip("hidream")
    text = "word " * 140 + "cat"
    tokens = read(clip, text)
    assert [len(range(p.first, p.end)) >= 128 for p in tokens.parts] == [True, True]
    assert len(tokens) == rows_of(encoded(clip, text))
    assert min(tokens.find("cat")) >= 128
    source = read(clip, "a cat")
    assert {position // 128 for position in source.find("cat")} == {0, 1}


@pytest.mark.parametrize("loaded", [dict(t5=False), dict(llama=False)])
def test_hidream_s_rows_of_zeros_are_padding(loaded):
    clip = text_encoders.clip("hidream", **loaded)
    tokens = read(clip, "a cat")
    assert len(tokens) == rows_of(encoded(clip, "a cat"))
    empty = tokens.parts[0 if "t5" in loaded else 1]
    assert set(tokens.kinds[empty.first : empty.end]) == {PAD}


def test_lumina_s_system_prompt_is_template():
    clip = text_encoders.clip("lumina2")
    text = "You are an assistant designed to paint a cat. <Prompt Start> a cat, (red:1.2)"
    tokens = read(clip, text)
    assert len(tokens) == rows_of(encoded(clip, text))
    assert [word.text for word in tokens.words] == ["a", "cat", ",", "red"]
    assert spelled(clip, tokens, tokens.find("cat")).strip() == "cat"
    assert tokens.kinds[1] == TEMPLATE and min(tokens.find("cat")) > 20


def with_embedding(kind, tensors, folder, text):
    """A CLIP that finds the embedding "style", and the tokens of a text."""
    save_file(tensors, str(folder / "style.safetensors"))
    clip = text_encoders.clip(kind, embeddings=str(folder))
    tokens = read(clip, text)
    assert len(tokens) == rows_of(encoded(clip, text))
    return clip, tokens


def test_embeddings_are_words_of_several_tokens(tmp_path):
    clip, tokens = with_embedding("chroma", {"t5xxl": torch.randn(3, 16)}, tmp_path,
                                  "a embedding:missing cat in (embedding:style:1.2), red embedding:style, dog")
    first, second = tokens.find("embedding:style")[:3], tokens.find("embedding:style")[3:]
    assert [tokens.ids[p] for p in first] == [("embedding:style", n) for n in range(3)] == [tokens.ids[p] for p in second]
    assert [word.text for word in tokens.words] == ["a", "cat", "in", "embedding:style", ",", "red", "embedding:style", ",",
                                                    "dog"]
    assert spelled(clip, tokens, tokens.find("red")).split() == ["red"]
    assert spelled(clip, tokens, tokens.find("dog")).split() == ["dog"]


def test_embeddings_in_a_template(tmp_path):
    clip, tokens = with_embedding("zimage", {"qwen3_4b": torch.randn(2, 16)}, tmp_path, "a cat, embedding:style in red")
    assert [tokens.ids[p] for p in tokens.find("embedding:style")][-2:] == [("embedding:style", 0), ("embedding:style", 1)]
    assert spelled(clip, tokens, tokens.find("in")).split() == ["in"]


def test_an_embedding_of_another_encoder_is_refused(tmp_path):
    """ComfyUI leaves it out and pads at the end: all words behind it would be at other positions."""
    save_file({"emb_params": torch.randn(3, 24)}, str(tmp_path / "style.safetensors"))
    clip = text_encoders.clip("chroma", embeddings=str(tmp_path))
    with pytest.raises(ValueError, match="24 numbers.*16"):
        read(clip, "embedding:style cat")


def test_unknown_encoders_templates_and_rows_are_refused():
    with pytest.raises(ValueError, match="qwen3_06b, t5xxl"):
        read(text_encoders.clip("anima"), "a cat")
    clip = text_encoders.clip("qwen")
    with pytest.raises(ValueError, match="template of its own"):
        read(clip, "<|im_start|>user\na cat<|im_end|>\n")
    clip.tokenizer.llama_template = "Another template: {}"
    its = draft(clip, "a cat")
    clip.tokenizer.llama_template = "<|im_start|>user\n{}"
    with pytest.raises(ValueError, match="gives"):
        its.fit(encoded(clip, "a cat and more"))

    class Other(type(clip.tokenizer)):
        def tokenize_with_weights(self, text, *args, **kwargs):
            return super().tokenize_with_weights("written otherwise " + text, *args, **kwargs)

    clip.tokenizer = Other()
    with pytest.raises(ValueError, match="do not spell the prompt"):
        read(clip, "a cat")
