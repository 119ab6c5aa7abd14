"""Edit directions: the difference of two means, by hand."""
import pytest
import torch
from comfyui_ledits.nodes.pix2pix_zero_edit import EditDirection
from support import editing, tiny


def encoded(clip, text):
    words, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return words, pooled


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_edit_direction_is_the_difference_of_means(kind):
    clip = editing.clip(kind)
    cats, dogs = ["a cat", "a cat sits"], ["a dog", "the dog (sits:1.3) here", "dogs"]
    conditioning = editing.negative(kind, "a cat on a sofa")
    given = [[words.clone(), {**more, "strength": 0.5}] for words, more in conditioning]
    for strength in (1.0, -0.5):
        out, = EditDirection.execute(clip=clip, conditioning=given, source_sentences="\n".join(cats) + "\n\n",
            target_sentences="\n".join(dogs), strength=strength).args
        for part, own in enumerate((given[0][0], given[0][1]["pooled_output"])):
            mean = [sum(encoded(clip, text)[part] for text in texts) / len(texts) for texts in (cats, dogs)]
            expected = own + strength * (mean[1] - mean[0])
            got = out[0][0] if part == 0 else out[0][1]["pooled_output"]
            assert (got - expected).abs().max() < 1e-5 < (got - own).abs().max()
        assert out[0][1]["strength"] == 0.5
    assert torch.equal(given[0][0], conditioning[0][0])  # what was given stays


def test_directions_and_prompts_of_different_lengths():
    clip = editing.clip()
    long, short = "a cat" + " word" * 90, "a dog"
    prompts = {tokens: tiny.conditioning(tokens=tokens) for tokens in (77, 154, 231)}
    both = encoded(clip, long)[0] - encoded(clip, long.replace("cat", "dog"))[0]
    assert both.shape[1] == 154
    for tokens, own in prompts.items():
        # all sentences have two chunks: both count as far as the prompt has them
        out, = EditDirection.execute(clip=clip, conditioning=own, source_sentences=long.replace("cat", "dog"),
            target_sentences=long, strength=1.0).args
        n = min(tokens, 154)
        assert (out[0][0][:, :n] - own[0][0][:, :n] - both[:, :n]).abs().max() < 1e-5
        assert torch.equal(out[0][0][:, n:], own[0][0][:, n:])
        # one sentence of one chunk: the others are cut to it
        out, = EditDirection.execute(clip=clip, conditioning=own, source_sentences=short,
            target_sentences=f"{long}\n{short}", strength=1.0).args
        half = (encoded(clip, long)[0][:, :77] - encoded(clip, short)[0]) / 2
        assert (out[0][0][:, :77] - own[0][0][:, :77] - half).abs().max() < 1e-5
        assert torch.equal(out[0][0][:, 77:], own[0][0][:, 77:])


def test_wrong_directions_are_refused():
    clip = editing.clip()
    with pytest.raises(ValueError, match="at least one"):
        EditDirection.execute(clip=clip, conditioning=tiny.conditioning(), source_sentences="a cat",
            target_sentences=" \n", strength=1.0)
    with pytest.raises(ValueError, match="another text encoder"):
        EditDirection.execute(clip=clip, conditioning=[[torch.zeros(1, 77, 64), {}]], source_sentences="a cat",
            target_sentences="a dog", strength=1.0)
