"""Two prompts matched token by token in the text encoders of flow models."""
import time

import pytest
import torch
from comfyui_ledits.attention_hooks.text.align import _global_align, align, places
from comfyui_ledits.attention_hooks.text.edit_direction import add_direction, edit_direction, may_be_cut
from comfyui_ledits.attention_hooks.text.tokens import TEMPLATE, draft, read
from support import text_encoders
from support.text_encoders import ALL, encoded


def units(tokens):
    """Words, as the number of tokens of every word in every part."""
    return [[sum(part.first <= p < part.end for p in word.positions) for part in tokens.parts] for word in tokens.words]


def shared(tokens):
    """Whether a token belongs to two words, as "-cat" does."""
    positions = [p for word in tokens.words for p in word.positions]
    return len(set(positions)) < len(positions)


PAIRS = [("a cat on a bench", "a dog on a bench"), ("a cat on a bench", "a schnauzer on a bench"),
         ("a schnauzer, red", "a cat, blue"), ("ginger-cat sits", "un-believable sits"),
         ("a red cat", "a very big red cat sits"), ("a very big red cat sits", "a cat")]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("mapping", ["auto", "refine"])
def test_every_target_token_has_the_source_s_attention_or_its_own(kind, mapping):
    clip = text_encoders.clip(kind)
    for source, target in PAIRS:
        a, b = read(clip, source), read(clip, target)
        out = align(a, b, mapping)
        assert out.matrix.shape == (len(a), len(b))
        total = out.matrix.sum(0) + out.own
        if out.kind == "refine":
            assert torch.equal(total, torch.ones(len(b))), (source, target)
            continue
        if units(a) == units(b) and not shared(a) and not shared(b):
            assert torch.equal(total, torch.ones(len(b))), (source, target)
        words = [p for word in b.words for p in word.positions]
        assert (total > 0).all() and not out.own[words].any()
        of_words = sorted({p for word in a.words for p in word.positions})
        assert torch.allclose(out.matrix[of_words].sum(1), torch.ones(len(of_words))), "no attention is lost or doubled"
        for x, y in zip(a.parts, b.parts):  # no part takes another's
            outside = torch.ones(len(a), dtype=torch.bool)
            outside[x.first : x.end] = False
            assert not out.matrix[outside][:, y.first : y.end].any()


@pytest.mark.parametrize(("source", "target", "before", "after"), [
    ("a cat on a bench", "a dog on a bench", "cat", "dog"),
    ("a red star", "a green star", "red star", "green star"),  # an adjective: its noun says where
    ("a red star", "an orange star", "red star", "orange star"),  # the article has changed too
    ("a star", "a star on the table", "", "table"),
    ("a cat sitting on a bench", "a dog sitting on a bench", "cat", "dog"),
    ("a bench", "a big, red bench", "bench", "big red bench"),
    ("a red cat, a dog", "a blue cat, a dog", "red cat", "blue cat"),
    ("a cat on a bench", "a cat in a bench", "on", "in"),  # nothing else has changed
    ("a cat", "a cat", "", "")])
def test_the_words_that_say_where_two_prompts_differ(source, target, before, after):
    clip = text_encoders.clip("flux")
    tokens = read(clip, source), read(clip, target)
    for one, positions, expected in zip(tokens, places(*tokens), (before, after)):
        assert [w.text for w in one.words if set(w.positions) <= set(positions)] == expected.split()


def test_a_longer_target_without_padding_keeps_its_own():
    clip = text_encoders.clip("chroma")
    a, b = read(clip, "a red cat"), read(clip, "a very big red cat sits")
    out = align(a, b)
    new = set(b.find("very big")) | set(b.find("sits"))
    assert set(out.own.nonzero().flatten().tolist()) == new
    assert out.matrix[a.find("red")[0], b.find("red")[0]] == 1
    assert out.matrix[len(a) - 1, len(b) - 1] == 1  # </s>


@pytest.mark.parametrize("mapping", ["replace", "refine"])
def test_templates_and_padding_follow_the_source_s(mapping):
    for kind, target in (("zimage", "a schnauzer sits"), ("flux2", "a elephant sits"), ("klein", "a schnauzer sits")):
        clip = text_encoders.clip(kind)
        a, b = read(clip, "a cat sits"), read(clip, target)
        out = align(a, b, mapping)
        before, behind = ([i for i, k in enumerate(t.kinds) if k == TEMPLATE] for t in (a, b))
        assert len(before) == len(behind) and len(a.words[1].positions) < len(b.words[1].positions)
        assert (out.matrix[before, behind] == 1).all()
    padding = range(300, 500)
    assert (out.matrix[padding, padding] == 1).all() if mapping == "refine" else out.matrix[padding].sum(1).eq(1).all()


def test_words_that_share_a_token_are_one_unit():
    clip = text_encoders.clip("qwen")
    a, b = read(clip, "a ginger-cat"), read(clip, "a ginger-\u732b")
    (joined,), hyphen, cat = a.find("cat"), b.find("-"), b.find("\u732b")
    assert a.find("-") == (joined,) and not set(hyphen) & set(cat)
    out = align(a, b, "replace")
    after = sorted({*hyphen, *cat})
    assert out.matrix[joined, after].tolist() == [1 / len(after)] * len(after) and out.matrix[joined].sum() == 1
    back = align(b, a, "replace")
    assert back.matrix[after, joined].tolist() == [1] * len(after)


def test_a_word_of_more_tokens_shares_the_attention_in_each_encoder():
    clip = text_encoders.clip("sd3")
    a, b = read(clip, "a cat sits"), read(clip, "a schnauzer sits")
    out = align(a, b, "replace")
    for x, y in zip(a.parts, b.parts):
        cat = [p for p in a.find("cat") if x.first <= p < x.end]
        dog = [p for p in b.find("schnauzer") if y.first <= p < y.end]
        assert len(dog) > len(cat) == 1
        assert out.matrix[cat[0], dog].tolist() == [pytest.approx(1 / len(dog))] * len(dog)


def slow_align(x, y):
    """Needleman and Wunsch as in the code released with Prompt-to-Prompt: gap 0, match 1, mismatch -1; left, up, diagonal."""
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    back = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            ways = score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            score[i][j] = max(ways)
            back[i][j] = ways.index(score[i][j])
    pairs, i, j = [], len(x), len(y)
    while i and j:
        if back[i][j] == 2:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif back[i][j] == 0:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def test_the_alignment_s_ties_are_the_released_code_s():
    generator = torch.Generator().manual_seed(0)
    for letters in (2, 3, 8):
        for _ in range(60):
            n, m = torch.randint(0, 25, (2,), generator=generator).tolist()
            x = torch.randint(0, letters, (n,), generator=generator).tolist()
            y = [("embedding:a", k) if k == 1 else k for k in torch.randint(0, letters, (m,), generator=generator).tolist()]
            assert _global_align(x, y) == slow_align(x, y)


def test_long_prompts_do_not_take_long_and_endless_ones_are_refused():
    clip = text_encoders.clip("chroma")
    short, long = (draft(clip, "a (red:1.2) cat, " * n).fit(None) for n in (800, 2000))
    start = time.perf_counter()
    out = align(short, short, "refine")
    assert torch.equal(out.matrix, torch.eye(len(short))) and time.perf_counter() - start < 5
    with pytest.raises(ValueError, match="too many"):
        align(long, long)


def test_edit_directions_of_other_encoders_need_as_many_tokens():
    clip = text_encoders.clip("flux")  # padded
    direction, pooled = edit_direction(clip, ["a cat", "a cat sleeps"], ["a dog on a very long sofa"])
    source = encoded(clip, "a cat and much more")
    moved = add_direction(source, direction, pooled, 1.0, may_be_cut(clip))
    assert torch.allclose(moved[0][0] - source[0][0], direction, atol=1e-5)
    clip = text_encoders.clip("qwen")
    with pytest.raises(ValueError, match="7 and 8 vectors"):
        edit_direction(clip, ["a cat", "a cat sleeps"], ["a dog"])
    direction, pooled = edit_direction(clip, ["a cat"], ["a dog"])
    with pytest.raises(ValueError, match="8 and 7 vectors"):
        add_direction(encoded(clip, "a red cat"), direction, pooled, 1.0, may_be_cut(clip))
    with pytest.raises(ValueError, match="HiDream"):
        edit_direction(text_encoders.clip("hidream"), ["a cat"], ["a dog"])
