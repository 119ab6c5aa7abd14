"""Preview Attention: what it draws, what it refuses, and that it shows the right run."""
import io
import json

import numpy
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced
from comfyui_ledits.attention_hooks.observed import Observed
from comfyui_ledits.attention_hooks.text.tokens import Tokens, Word
from comfyui_ledits.nodes import sampling, sockets
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.preview import PreviewAttention, RecordAttention
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.samplers.ledits import LeditsSampler
from comfyui_ledits.samplers.methods.sega import NOISE, SEGA
from comfyui_ledits.tools.api.client import ComfyClient
from PIL import Image
from support import editing, runs, tiny
from support.graphs import node

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"


def by_hand(batch=1, steps=(0, 1, 2, 3), **masks):
    """An `Observed` whose word "cat" looks at the upper left in the source, and "dog" at the lower right in the target."""
    def tokens(text):
        words = tuple(Word(w, (n + 1,)) for n, w in enumerate(text.split()))
        return Tokens(text=text, ids=(), kinds=(), chunks=(0, 77), parts=(), words=words)

    before, after = torch.full((batch, 2, 16, 16), 0.01), torch.full((batch, 2, 16, 16), 0.01)
    before[:, 1, 2:5, 2:5], after[:, 1, 11:14, 11:14] = 0.5, 0.5
    observed = Observed(steps=len(steps), size=(128, 128), latent=torch.zeros(batch, 4, 16, 16), masks=masks,
                        tokens=(tokens("a cat"), tokens("a dog")), maps={step: (before, after) for step in steps})
    return {"samples": torch.zeros(batch, 4, 16, 16), sockets.OBSERVED: observed}


def hot(picture):
    """Places (y, x) of the brightest colour in a picture [H, W, 3]."""
    return (picture - torch.tensor([255, 250, 220]) / 255).abs().amax(-1).lt(0.04).nonzero()


def test_the_table_shows_words_beside_each_other():
    picture = PreviewAttention.execute(latent=by_hand(), words="cat, dog", view="average")[0][0]
    places = hot(picture)
    left = places[places[:, 1] < 500].float()  # the source's column: cat only
    right = places[places[:, 1] > 500].float()
    assert len(left) > 300 and len(right) > 300
    assert right[:, 0].mean() > left[:, 0].mean() + 300  # the second row, and lower in it
    spot = left.mean(0), left.amax(0) - left.amin(0)
    assert (spot[1] - 3 / 16 * 300).abs().max() < 20  # three of sixteen cells of a picture of 300 pixels
    x = left[:, 1].mean() - (36 + 190)
    assert abs(x - 3.5 / 16 * 300) < 8
    one = PreviewAttention.execute(latent=by_hand(), words="cat", view="average")[0][0]
    assert len(hot(one)[hot(one)[:, 1] > 500]) == 0  # not in the target prompt


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_beside_each_other(batch):
    picture, *_ = PreviewAttention.execute(latent=by_hand(batch, steps=tuple(range(20))), words="cat",
        view="by step").args
    assert picture.shape[0] == batch
    columns = hot(picture[0])[:, 1].unique()
    assert (columns.diff() > 20).sum() == 7  # eight steps of twenty


def test_masks_are_drawn_as_they_are():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8, :8] = True
    latent = by_hand(**{"local blend": {1: (None, mask), 3: (None, mask)}})
    with_mask = PreviewAttention.execute(latent=latent, words="cat", view="average")[0][0]
    white = (with_mask > 0.999).all(-1).nonzero()
    size = white.amax(0) - white.amin(0) + 1
    assert abs(int(size[0]) - 150) < 3 and abs(int(size[1]) - 150) < 3  # a quarter of 300 x 300
    drawn = PreviewAttention.execute(latent=latent, words="cat", view="by step")[0][0]
    columns = (drawn > 0.999).all(-1).nonzero()[:, 1].unique()
    assert (columns.diff() > 20).sum() >= 1


def test_attention_is_drawn_over_the_pictures():
    green = torch.zeros(1, 128, 128, 3)
    green[..., 1] = 1
    seen = by_hand()
    assert not _greenish(PreviewAttention.execute(latent=seen, words="cat", view="average")[0][0])
    assert _greenish(PreviewAttention.execute(latent=seen, words="cat", view="average", image=green)[0][0])
    assert not _greenish(PreviewAttention.execute(latent=seen, words="cat", view="average",
        edited_image=green)[0][0])  # cat is the source's
    assert _greenish(PreviewAttention.execute(latent=seen, words="dog", view="average", edited_image=green)[0][0])


def _greenish(picture):
    return ((picture[..., 1] > 0.4) & (picture[..., 0] < 0.1)).sum() > 10_000


def test_the_words_of_an_edit_are_all_shown_where_none_are_named():
    every = PreviewAttention.execute(latent=by_hand(), words="", view="average")[0]
    assert every.shape[1] == PreviewAttention.execute(latent=by_hand(), words="a, cat, dog", view="average")[0].shape[1]


@pytest.mark.parametrize("words, match", [
    ("horse", "'horse' is in neither prompt. Source: 'a cat'. Target: 'a dog'"),
    ("cat, red hat", "'red hat' is in neither"),
])
def test_a_word_that_is_not_there_is_named(words, match):
    with pytest.raises(ValueError, match=match):
        PreviewAttention.execute(latent=by_hand(), words=words, view="average")


def test_what_was_not_recorded_is_said():
    latent = by_hand()
    with pytest.raises(ValueError, match="no attention to see.*Record Attention"):
        PreviewAttention.execute(latent={"samples": latent["samples"]}, words="", view="average")
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    masks_only = Observed(steps=4, size=(128, 128), latent=latent["samples"], masks={"local blend": {3: (None, mask)}})
    PreviewAttention.execute(latent=latent | {sockets.OBSERVED: masks_only}, words="", view="average")
    with pytest.raises(ValueError, match="put Record Attention"):
        PreviewAttention.execute(latent=latent | {sockets.OBSERVED: masks_only}, words="cat", view="average")


def test_with_sampler_custom_advanced():
    model = tiny.model()
    path, words, empty = editing.path(model, 3), editing.prompts("sd1", SOURCE, TARGET), editing.negative("sd1")
    attention = RecordAttention.execute(prompts=words).args[0]
    with torch.inference_mode():
        sampler, sigmas = sampling.LeditsSamplerNode.execute(inversion=path, skip=0, attention=attention).args
        x_T = {"samples": path.latent_format.process_out(path.latents[0])}
        noise, = DisableNoise.execute().args
        results = []
        for cfg in (7.5, 1.5):
            guider = sampling.LeditsGuiderNode.execute(model=model, positive=words.target, negative=empty,
                cfg=cfg).args[0]
            results.append(SamplerCustomAdvanced.execute(noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                                                         latent_image=x_T).args[0])
            shown = PreviewAttention.execute(latent=results[-1], words="sofa", view="average", sampler=sampler)
            one = sampling.LeditsKSampler.execute(model=model, positive=words.target, negative=empty, inversion=path,
                cfg=cfg, skip=0, attention=attention).args[0]
            assert torch.allclose(PreviewAttention.execute(latent=one, words="sofa", view="average")[0], shown[0],
                atol=1 / 255)
        with pytest.raises(ValueError, match="did not make this latent"):
            PreviewAttention.execute(latent=results[0], words="sofa", view="average", sampler=sampler)
        other = sampling.LeditsSamplerNode.execute(inversion=path, skip=0).args[0]
        with pytest.raises(ValueError, match="no attention to see"):
            PreviewAttention.execute(latent=results[0], words="sofa", view="average", sampler=other)


@pytest.mark.usefixtures("inference_mode")
@pytest.mark.parametrize("masking", [NOISE, SEGA])
def test_where_concepts_pushed_is_seen(masking):
    """At one step at cfg 1 the latent differs from the unedited one where a concept pushes, and nowhere else."""
    path, words = runs.invert(EditFriendlyInversion, "sd1", steps=4)[0], [runs.prompts("sd1", seed)[0] for seed in (5, 6)]
    concept = {"prompt": "", "direction": "towards", "scale": 5.0, "threshold": 0.8, "warmup": 0, "cooldown": 0,
               "momentum_scale": 0.0, "momentum_beta": 0.0, "weight": 1.0, "masking": masking}
    first, = SemanticConcept.execute(conditioning=words[0], **concept)
    both, = SemanticConcept.execute(conditioning=words[1], concepts=first, **concept)
    plain = runs.edit("sd1", path, cfg=1.0, skip=3)
    made, latents = {}, {}
    for name, concepts in (("one", first), ("both", both)):
        latent = sampling.LeditsKSampler.execute(
            model=runs.model("sd1"), positive=runs.prompts("sd1")[0], negative=runs.prompts("sd1")[1], inversion=path, cfg=1.0,
            skip=3, concepts=concepts)[0]
        latents[name], made[name] = latent, PreviewAttention.execute(latent=latent, words="", view="average")
    observed = latents["one"][sockets.OBSERVED]
    ((step, (source, area)),) = observed.masks["concept 1"].items()
    assert step == 0 and source is None and 0 < area.float().mean() < 1
    moved = (latents["one"]["samples"] - plain).abs().amax(1) > 1e-6
    assert torch.equal(moved, area)
    assert set(latents["both"][sockets.OBSERVED].masks) == {"concept 1", "concept 2"}
    shown = made["both"][4]
    assert shown.shape == (len(area), 8 * area.shape[1], 8 * area.shape[2]) and shown.mean() > made["one"][4].mean()
    guider = sampling.LeditsGuiderNode.execute(model=runs.model("sd1"), positive=words[0], negative=words[1], cfg=1.0, concepts=first)[0]
    picture, sampler = path.latent_format.process_out(path.latents[-1]), LeditsSampler(path)
    guider.sample(torch.zeros_like(picture), picture, sampler, path.sigmas[3:], disable_pbar=True)
    assert "concept 1" in sampler.observed.masks and guider.areas == {}  # nothing stays on the GUIDER
    assert sockets.OBSERVED not in sampling.LeditsKSampler.execute(
        model=runs.model("sd1"), positive=runs.prompts("sd1")[0], negative=runs.prompts("sd1")[1], inversion=path, cfg=1.0, skip=3)[0]


def test_in_a_server(server_url):
    """The right run is shown: again after a change of the edit, and not when only the words change."""
    client = ComfyClient(server_url)

    def graph(cfg, words, **more):
        return {
            "model": node("LEDITS_LoadDemoModel"),
            "words": node("LEDITS_EditPrompts", clip=["model", 1], source="a red star on sand", target="a blue star on sand",
                          mapping="auto"),
            "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
            "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
            "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
            "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["words", 0], negative=["empty", 0],
                              latent=["encoded", 0], cfg=1.0, steps=5, scheduler="ddim_uniform", eta=1.0, seed=0),
            "p2p": node("LEDITS_PromptToPrompt", prompts=["words", 2], cross_replace_steps=0.8, self_replace_steps=0.4,
                        blend_words="star", threshold=0.8),
            "record": node("LEDITS_RecordAttention", prompts=["words", 2], attention=["p2p", 0]),
            "edit": node("LEDITS_KSampler", model=["model", 0], positive=["words", 1], negative=["empty", 0], cfg=cfg, skip=0,
                         inversion=["inversion", 0], attention=["record", 0]),
            "preview": node("LEDITS_PreviewAttention", latent=["edit", 0], words=words, view="by step"),
            "mask": node("MaskToImage", mask=["preview", 1]),
            "kept": node("PreviewImage", images=["mask", 0]),
        } | more

    def run(*args, **more):
        outputs = client.run(graph(*args, **more))["outputs"]
        picture, mask = (client.fetch(outputs[name]["images"][0]) for name in ("preview", "kept"))
        return [numpy.asarray(Image.open(io.BytesIO(raw)).convert("RGB")) for raw in (picture, mask)], outputs

    (first, mask), _ = run(7.5, "star, sand")
    assert mask.shape == (128, 128, 3) and set(numpy.unique(mask)) <= {0, 255}
    (second, _), outputs = run(2.0, "star, sand")
    assert "edit" in outputs
    assert first.shape == second.shape and not numpy.array_equal(first, second)
    (again, same_mask), _ = run(7.5, "star, sand")
    assert numpy.array_equal(first, again) and numpy.array_equal(mask, same_mask)
    (other, _), outputs = run(7.5, "blue")
    assert "edit" not in outputs and other.shape[0] < first.shape[0]
    with pytest.raises(Exception, match="'horse' is in neither prompt"):
        run(7.5, "horse")
    more = {"pose": node("MaskToImage", mask=["preview", 2]), "shown": node("PreviewImage", images=["pose", 0])}
    _, outputs = run(7.5, "star", **more)
    assert "shown" not in outputs  # there is no such mask; the rest of the workflow goes on
    information = json.loads(client.ask("/object_info/LEDITS_PreviewAttention"))["LEDITS_PreviewAttention"]
    assert information["output_node"] and len(information["output_tooltips"]) == 5
