"""The comparison nodes: a sheet holds its pictures and words, a sweep is the single edits."""

import comfy.latent_formats
import pytest
import torch
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.demo import loader
from comfyui_ledits.nodes import compare
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.compare import Sheet, Sweep
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.samplers.methods.sega import Concept
from support import runs, tiny
from support.runs import model

pytestmark = pytest.mark.usefixtures("inference_mode")
STEPS = 10


def pictures(*sizes, seed=0):
    """One IMAGE [1, height, width, 3] of noise for each (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, *size, 3, generator=generator) for size in sizes]


def connected(images):
    return {f"image{k}": image for k, image in enumerate(images)}


def sheet(images, labels="", columns=0, size=0):
    (page,) = Sheet.execute(images=connected(images), labels=labels, columns=columns, size=size).result
    assert page.shape[0] == 1 and page.dtype == torch.float32 and 0 <= page.min() and page.max() <= 1
    return page[0]


def place(page, picture):
    """(y, x) where the exact pixels of a picture [h, w, 3] lie in a page; None where they do not."""
    h, w = picture.shape[:2]
    for y, x in (page[..., 0] == picture[0, 0, 0]).nonzero().tolist():
        if torch.equal(page[y : y + h, x : x + w], picture):
            return y, x
    return None


def ink(page):
    return int((page.mean(-1) < 0.7).sum())


# --- the sheet ------------------------------------------------------------------------------------------------------

def test_pictures_are_copied_in_order_row_by_row():
    images = pictures(*[(20, 30)] * 5)
    page = sheet(images, columns=2)
    places = [place(page, image[0]) for image in images]
    assert None not in places
    assert places == sorted(places) and places[0][0] == places[1][0] < places[2][0] == places[3][0] < places[4][0]
    assert places[0][1] == places[2][1] == places[4][1] < places[1][1] == places[3][1]
    assert places[1][1] >= places[0][1] + 30 and places[2][0] >= places[0][0] + 20


def test_sockets_are_ordered_by_number():
    images = pictures(*[(8, 8)] * 12)
    shuffled = dict(reversed(connected(images).items()))
    (page,) = Sheet.execute(images=shuffled, labels="", columns=0).result
    places = [place(page[0], image[0]) for image in images]
    assert places == sorted(places) and len({x for _, x in places}) == 12


def test_batches_are_rows_and_a_single_picture_is_in_each():
    source, (a, b) = torch.cat(pictures((16, 16), (16, 16), seed=1)), pictures((16, 16), (16, 16), seed=2)
    page = sheet([a, source], "one\ntwo")
    first, second = (place(page, picture) for picture in source)
    assert first[1] == second[1] and first[0] < second[0]
    assert torch.equal(page[second[0] : second[0] + 16, place(page, a[0])[1] :][:, :16], a[0])  # again in the second row
    assert place(page, b[0]) is None


def test_labels_stand_under_their_own_pictures():
    images = [torch.ones(1, 40, 90, 3)] * 3
    bare = sheet(images)
    assert ink(bare) == 0
    page = sheet(images, "left\n\nright")
    assert page.shape[0] > bare.shape[0] and page.shape[1] == bare.shape[1]
    columns = page.chunk(3, 1)
    assert ink(columns[0]) > 20 and ink(columns[1]) == 0 and ink(columns[2]) > 20
    assert ink(page[:40]) == 0
    # words matter, and a long label keeps to its column
    assert not torch.equal(page, sheet(images, "left\n\nwrong"))
    long = sheet(images, "many words " * 30 + "\n\n\n").chunk(3, 1)
    assert ink(long[0]) > ink(columns[0]) and ink(long[1]) == 0 and ink(long[2]) == 0
    assert long[0].shape[0] < 40 + 5 * 20  # in three lines
    # one word longer than the column
    assert ink(sheet(images, "x" * 200 + "\n\n\n").chunk(3, 1)[1]) == 0


def test_a_label_for_every_picture_of_a_batch():
    batch = torch.ones(2, 40, 90, 3)
    page = sheet([batch, batch], "a\nb\nc\nd")
    again = sheet([batch, batch], "a\nb\na\nb")
    half = page.shape[0] // 2
    assert torch.equal(again, sheet([batch, batch], "a\nb"))
    assert torch.equal(page[:half], again[:half]) and not torch.equal(page[half:], again[half:])


def test_sizes():
    small, large = pictures((10, 20), (40, 40))
    page = sheet([small, large])
    assert place(page, large[0]) is not None and place(page, small[0]) is None  # enlarged to 20 x 40
    flat = torch.full((1, 10, 20, 3), 0.25)
    assert int((sheet([flat, large])[:, :44] - 0.25).abs().amax(-1).lt(1e-3).sum()) == 20 * 40
    sized = sheet([flat], size=80)
    assert int((sized - 0.25).abs().amax(-1).lt(1e-3).sum()) == 40 * 80
    # alpha is left out, grey becomes three channels
    clear = torch.cat([large, torch.zeros(1, 40, 40, 1)], -1)
    assert torch.equal(sheet([clear]), sheet([large]))
    assert place(sheet([large[..., :1]]), large[0, ..., :1].expand(-1, -1, 3)) is not None


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        ({}, "", "connect at least one image"),
        (connected([torch.ones(2, 8, 8, 3), torch.ones(3, 8, 8, 3)]), "", "batches of 2, 3 pictures"),
        (connected([torch.ones(1, 8, 8, 3)] * 2), "a\nb\nc", "labels has 3 lines for 2 inputs: write"),
        (connected([torch.ones(2, 8, 8, 3)] * 2), "a", "labels has 1 lines for 2 inputs with 4 pictures"),
    ],
)
def test_what_a_sheet_refuses(images, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sheet.execute(images=images, labels=labels, columns=0)


# --- the sweep ------------------------------------------------------------------------------------------------------

class Decoder:
    """A VAE that shows three channels of a latent, eight times as large."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).sigmoid().repeat_interleave(8, 1).repeat_interleave(8, 2)


def inverted(batch=1):
    return runs.invert(EditFriendlyInversion, batch=batch, cfg=3.5, steps=STEPS)[0]


def sweep(inversion, skips, scales, **more):
    target, empty = runs.prompts("sd1", runs.TARGET, runs.EMPTY)
    return Sweep.execute(model=model(), positive=target, negative=empty, inversion=inversion, vae=Decoder(),
                         skip_values=skips, cfg_values=scales, **more)


def single(inversion, skip, cfg, **more):
    return runs.edit("sd1", inversion, cfg=cfg, skip=skip, prompt=runs.TARGET, **more)


@pytest.mark.parametrize("case", ["plain", "concept, mask and solver", "attention"])
def test_every_cell_is_the_single_edit_bit_for_bit(case):
    inversion = inverted(batch=2)
    more = {
        "plain": {},
        "concept, mask and solver": {
            "concepts": (Concept(conditioning=tiny.conditioning(seed=4), scale=5.0, threshold=0.8, warmup=0, momentum_scale=0.3,
                                  momentum_beta=0.6),),
            "mask": torch.ones(1, 64, 64).tril(), "solver": "dpmpp_2m_sde",
        },
        "attention": {"attention": (PlugAndPlay(),)},
    }[case]
    cells = [(0, 1.0), (0, 7.5), (7, 1.0), (7, 7.5)]
    output = sweep(inversion, "0, 0.65", "1 7.5", **more)
    sheets, latents = output.result
    with tiny.Calls(model()) as calls:
        singles = [single(inversion, *cell, **more) for cell in cells]
    assert torch.equal(latents["samples"], torch.cat(singles))
    assert not torch.equal(singles[0], singles[1]) and not torch.equal(singles[0], singles[2])
    assert output.ui["ledits"] == [{"steps": 2 * 10 + 2 * 3, "unet_rows": calls.rows}]
    # one sheet a picture, the cells in order
    assert len(sheets) == 2
    for b, page in enumerate(sheets):
        places = [place(page, Decoder().decode(samples)[b]) for samples in singles]
        assert None not in places and places == sorted(places)
        assert places[0][0] == places[1][0] and places[0][1] == places[2][1]
        assert ink(page[: places[0][0]]) > 20 and ink(page[:, : places[0][1]]) > 20  # cfg over the columns, skip beside


def test_the_values_stand_at_rows_and_columns():
    inversion = inverted()
    page = sweep(inversion, "0, 3", "1, 2")[0][0]
    other_skip, other_cfg = sweep(inversion, "0, 4", "1, 2")[0][0], sweep(inversion, "0, 3", "1, 5")[0][0]
    y, x = place(page, Decoder().decode(single(inversion, 0, 1.0))[0])
    assert torch.equal(page[:y], other_skip[:y]) and not torch.equal(page[:y], other_cfg[:y])
    assert torch.equal(page[y:, :x], other_cfg[y:, :x]) and not torch.equal(page[y:, :x], other_skip[y:, :x])
    assert torch.equal(page[y : y + 64, :x], other_skip[y : y + 64, :x])  # the first row is the same


def test_a_sweep_inverts_nothing_and_counts_its_rows():
    inversion = inverted()
    with tiny.Calls(model()) as calls:
        output = sweep(inversion, "0, 50 %, 9", "1, 4")
    # cfg 1 takes one prediction a step, cfg 4 two
    assert calls.rows == 3 * (10 + 5 + 1) == output.ui["ledits"][0]["unet_rows"]


def test_a_kept_store_serves_every_cell_or_is_refused_first():
    inversion, control = inverted(), (PlugAndPlay(),)
    empty, = runs.prompts("sd1", runs.EMPTY)

    def captured(**more):
        return CaptureAttention.execute(model=model(), negative=empty, inversion=inversion, attention=control,
            skip=0, precision="float32", **more)[0]

    whole = sweep(inversion, "0, 3", "1, 4", attention=control, store=captured(all_steps=True))[1]["samples"]
    live = sweep(inversion, "0, 3", "1, 4", attention=control)[1]["samples"]
    torch.testing.assert_close(whole, live, rtol=0, atol=1e-4)
    later = CaptureAttention.execute(model=model(), negative=empty, inversion=inversion, attention=control, skip=3,
        precision="float32")[0]
    with tiny.Calls(model()) as calls, pytest.raises(ValueError, match="does not hold what this edit reads"):
        sweep(inversion, "3, 0", "1, 4", attention=control, store=later)  # the first row alone would be fine
    assert calls.rows == 0


@pytest.mark.parametrize(
    ("skips", "scales", "sentence"),
    [
        ("0, 10", "3", "skip_values holds 10, but the inversion has 10 steps"),
        ("0, 0.95", "3", "skip_values holds 0.95, but the inversion has 10 steps"),
        ("0, 100%", "3", "skip_values holds 100%"),
        ("0, 1.5", "3", "skip_values holds 1.5: give shares below 1"),
        ("", "3", "skip_values is empty"),
        ("0, many", "3", "skip_values holds 'many', which is no number"),
        ("-1", "3", "skip_values holds '-1'"),
        ("0", " ,", "cfg_values is empty"),
        ("0", "3, nan", "cfg_values holds 'nan'"),
        ("0", "50%", "cfg_values holds '50%'"),
        ("0", "3, 101", "cfg_values holds 101: choose 0 to 100"),
    ],
)
def test_what_a_sweep_refuses_before_anything_runs(skips, scales, sentence):
    inversion = inverted()
    with tiny.Calls(model()) as calls, pytest.raises(ValueError, match=sentence):
        sweep(inversion, skips, scales)
    assert calls.rows == 0


def test_skip_values():
    assert compare.skips_of("0, 0.15,0.3;.5", 50) == [0, 8, 15, 25]
    assert compare.skips_of("0 1 18 49", 50) == [0, 1, 18, 49]
    assert compare.skips_of("36 %, 36%\n0.36, 18", 50) == [18, 18, 18, 18]
    assert compare.scales_of("3, 7.5 15.") == [3.0, 7.5, 15.0]


def test_the_demo_vae_decodes_a_sweep():
    demo, clip, vae = loader.load()
    words = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))
    latent = {"samples": vae.encode(torch.rand(1, 128, 128, 3))}
    inversion = EditFriendlyInversion.execute(model=demo, positive=words, negative=words, latent=latent, cfg=1.0,
        steps=2, scheduler="ddim_uniform", eta=1.0, seed=0)[0]
    page, latents = Sweep.execute(model=demo, positive=words, negative=words, inversion=inversion, vae=vae,
        skip_values="0", cfg_values="1", size=64).result
    assert latents["samples"].shape == latent["samples"].shape
    assert isinstance(inversion.latent_format, comfy.latent_formats.LatentFormat)
    assert page.shape[0] == 1 and page.shape[1] > 64
