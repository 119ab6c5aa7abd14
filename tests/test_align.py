"""Words, tokens and alignments, on what ComfyUI's own tokenizers make of prompts."""
import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy.text_encoders import sd3_clip
from comfyui_ledits.attention_hooks.text import widget_text
from comfyui_ledits.attention_hooks.text.align import align, equalizer, word_schedule
from comfyui_ledits.attention_hooks.text.prompts import edit_prompts
from comfyui_ledits.attention_hooks.text.tokens import read
from safetensors.torch import save_file
from support import editing, tiny


@pytest.fixture(scope="module")
def clip():
    return editing.clip()


@pytest.fixture(scope="module")
def clip_xl():
    return editing.clip("sdxl")


# Positions counted by hand: 0 is the start, then CLIP's tokens ("schnauzer" is two).
@pytest.mark.parametrize("text, phrase, positions", [
    ("a cat, sitting", "cat", (2,)),
    ("A Cat sits", "cat", (2,)),
    ("a cat sits", "CAT!", (2,)),
    ("a (cat:1.3) sits", "cat", (2,)),
    ("a ((cat)), (red:0.7) sofa", "red sofa", (4, 5)),
    ("a schnauzer on a mat", "schnauzer", (2, 3)),
    ("a cat and a cat", "cat", (2, 5)),
    ("a red-haired girl", "red-haired", (2, 4)),
    ("the cat's tail", "cat's", (2, 3)),
    ("Caf\u00e9 in 2024", "caf\u00e9", (1,)),
    ("in 2024, paris", "2024", (2, 3, 4, 5)),
    ("the category of a cat", "cat", (5,)),
])
def test_words_are_found_whatever_case_and_punctuation(clip, text, phrase, positions):
    assert read(clip, text).find(phrase) == positions


def test_a_word_that_is_not_there_is_named_with_the_prompt(clip):
    with pytest.raises(ValueError, match="'dog'.*'a cat, sitting'"):
        read(clip, "a cat, sitting").find("dog")


def test_long_prompts_count_on_in_the_next_chunk(clip):
    tokens = read(clip, "word " * 70 + "(silver:1.1) " + "more " * 30 + "cat")
    assert len(tokens) == 154
    (silver,), (cat,) = tokens.find("silver"), tokens.find("cat")
    assert silver == 71
    ids = [token for chunk in clip.tokenize(tokens.text)["l"] for token, _ in chunk]
    assert ids[cat] == clip.tokenize("cat")["l"][0][1][0] and cat > 77


def test_sdxl_s_two_encoders_share_positions(clip_xl, clip):
    text = "a schnauzer, " + "on a red mat " * 20
    both, one = read(clip_xl, text), read(clip, text)
    assert both.words == one.words and both.kinds == one.kinds


def test_embeddings_are_words(tmp_path):
    vectors = torch.randn(3, tiny.CONTEXT)
    save_file({"emb_params": vectors}, str(tmp_path / "style.safetensors"))
    clip = editing.clip(embeddings=str(tmp_path))
    tokens = read(clip, "a embedding:missing cat in embedding:style, red")
    assert tokens.find("embedding:style") == tuple(range(tokens.find("in")[0] + 1, tokens.find("in")[0] + 4))
    assert tokens.find("red") == (tokens.find("embedding:style")[-1] + 2,)
    same = align(tokens, tokens, "refine")
    assert torch.equal(same.matrix, torch.eye(77)) and not same.own.any()


def columns(matrix):
    """{target position: {source position: share}} of what is not the same position."""
    return {j: {i: round(float(matrix[i, j]), 4) for i in matrix[:, j].nonzero().flatten().tolist()}
            for j in range(matrix.shape[1]) if not (matrix[j, j] == 1 and matrix[:, j].sum() == 1)}


def aligned(clip, source, target, mapping="auto"):
    return align(read(clip, source), read(clip, target), mapping)


def test_replacement_shares_a_word_and_shifts_what_follows(clip):
    out = aligned(clip, "a cat on a mat", "a schnauzer on a mat")
    assert out.kind == "replace" and not out.own.any()
    # start a cat on a mat end pad... -> start a schnau zer on a mat end pad...
    shifted = {j: {j - 1: 1.0} for j in range(4, 77)}
    assert columns(out.matrix) == {2: {2: 0.5}, 3: {2: 0.5}} | shifted


def test_replacement_by_a_shorter_word_loses_no_attention(clip):
    out = aligned(clip, "a schnauzer on a mat", "a cat on a mat")
    shifted = {j: {j + 1: 1.0} for j in range(3, 76)}
    assert columns(out.matrix) == {2: {2: 1.0, 3: 1.0}} | shifted
    assert out.matrix[76, 76] == 1
    assert (out.matrix.sum(1) > 0).all()


def test_replacement_needs_as_many_words(clip):
    with pytest.raises(ValueError, match="3 words.*4"):
        aligned(clip, "a cat sits", "a silver cat sits", "replace")


def test_refinement_keeps_what_both_have(clip):
    out = aligned(clip, "a cat on a mat", "a silver cat sculpture on a mat")
    assert out.kind == "refine"
    pairs = {0: 0, 1: 1, 3: 2, 5: 3, 6: 4, 7: 5, 8: 6} | {j: j for j in range(9, 77)}
    expected, own = torch.zeros(77, 77), torch.ones(77)
    for j, i in pairs.items():
        expected[i, j], own[j] = 1, 0
    assert torch.equal(out.matrix, expected) and torch.equal(out.own, own)


def test_refinement_gives_a_swapped_word_its_own_attention(clip):
    out = aligned(clip, "a cat on a mat", "a dog on a mat", "refine")
    assert out.own.nonzero().flatten().tolist() == [2] and not out.matrix[:, 2].any()


def test_refinement_of_a_shortened_prompt_takes_no_word_for_padding(clip):
    out = aligned(clip, "a cat on a red mat", "a cat")
    assert out.matrix[0, 0] == out.matrix[1, 1] == out.matrix[2, 2] == out.matrix[7, 3] == 1
    assert out.own.nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_alignments_of_prompts_of_several_chunks(clip):
    long = "word " * 80 + "cat"
    out = aligned(clip, "a cat", long, "refine")
    assert out.matrix.shape == (77, 154)
    assert out.matrix[2, read(clip, long).find("cat")[0]] == 1
    same = aligned(clip, long, long.replace("cat", "dog"))
    assert same.kind == "replace" and torch.equal(same.matrix, torch.eye(154))


def test_automatic_mapping_goes_by_the_number_of_words(clip):
    assert aligned(clip, "a cat sits", "a dog runs").kind == "replace"
    assert aligned(clip, "a cat sits", "a big dog runs").kind == "refine"
    assert aligned(clip, "a cat sits", "a dog runs", "refine").kind == "refine"


def test_windows_round_as_in_the_released_code(clip):
    tokens = read(clip, "a cat on a mat")
    for window, steps in ((0.4, 20), (0.6, 30), (0.8, 40), (1.0, 51), (0.29, 14)):
        assert word_schedule(tokens, 50, (0, window)).sum(0).unique().tolist() == [steps]
    own = word_schedule(tokens, 10, (0, 0.8), (("mat", (0.3, 0.6)),))
    assert own[:, 5].nonzero().flatten().tolist() == [3, 4, 5]
    assert own[:, 4].nonzero().flatten().tolist() == list(range(8))
    with pytest.raises(ValueError, match="dog"):
        word_schedule(tokens, 10, (0, 1), (("dog", (0, 1)),))


def test_widget_texts():
    assert widget_text.phrases("cat, red hat\n") == ("cat", "red hat")
    assert widget_text.factors("smiling: 2, hat: -1.5") == (("smiling", 2.0), ("hat", -1.5))
    assert widget_text.factors("embedding:style: 3") == (("embedding:style", 3.0),)
    assert widget_text.windows("dog: 0.2, sofa: 0.1-0.6") == (("dog", (0.0, 0.2)), ("sofa", (0.1, 0.6)))
    for wrong in ("hat", "hat: big", ": 2"):
        with pytest.raises(ValueError):
            widget_text.factors(wrong)
    for wrong in ("hat: 0.6-0.2", "hat: 2", "hat: -0.5"):
        with pytest.raises(ValueError):
            widget_text.windows(wrong)


def test_factors_of_words(clip):
    tokens = read(clip, "a schnauzer on a mat")
    assert equalizer(tokens, (("schnauzer", -2), ("Mat.", 3))).tolist()[:8] == [1, 1, -2, -2, 1, 1, 3, 1]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_prompts_are_encoded_as_clip_text_encode_does(kind):
    clip = editing.clip(kind)
    out = edit_prompts(clip, "a (cat:1.2)", "a dog " * 50, "refine")
    for text, own in (("a (cat:1.2)", out.source), ("a dog " * 50, out.target)):
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        assert torch.equal(own[0][0], expected[0][0])
    assert out.target[0][0].shape[1] == len(out.target_tokens) == 154


def test_another_kind_of_text_encoder_is_refused(clip):
    target = comfy.supported_models_base.ClipTarget(sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(False, False, False))
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    with pytest.raises(ValueError, match="t5xxl"):
        edit_prompts(clip, "a", "b")
