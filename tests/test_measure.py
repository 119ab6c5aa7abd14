"""The measuring of pictures, against what the renderer knows of them."""

from dataclasses import replace

import numpy as np
import pytest
from comfyui_ledits.demo import captions, pictures, scenes
from comfyui_ledits.tools import measure
from scipy import ndimage


def worn(picture, seed):
    """A picture as an autoencoder leaves it: blurred, with noise."""
    noise = np.random.default_rng(seed).normal(0, 0.02, picture.shape)
    return np.clip(ndimage.gaussian_filter(picture, (0.8, 0.8, 0)) + noise, 0, 1).astype(np.float32)


def plain(kind="star", colour="red", ground="grey", seed=5, **thing):
    return scenes.Scene((scenes.Thing(kind, colour, **thing),), ground, seed=seed)


def test_reads_what_was_drawn():
    drawn = pictures.held_out(500_000, 60)
    right = [measure.compare(measure.read(worn(scenes.render(s)[0], s.seed)), s) for s in drawn]
    shares = {key: np.mean([r[key] for r in right]) for key in right[0]}
    assert shares["kind"] >= 0.97 and shares["colour"] >= 0.98 and shares["ground"] >= 0.98, shares


@pytest.mark.parametrize("pattern", scenes.PATTERNS)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_names_every_colour_whatever_its_pattern(colour, pattern):
    scene = plain("square", colour, "grey", pattern=pattern, radius=0.5)
    picture, masks = scenes.render(scene)
    shares = measure.colour_shares(worn(picture, 1), masks[0])
    assert max(shares, key=shares.get) == colour and shares[colour] > 0.8, shares
    assert sum(shares.values()) == pytest.approx(1)
    others = [c for c in scenes.COLOURS if measure.has_colour(picture, masks[0], c)]
    assert others == [colour]


def test_sees_place_size_and_angle():
    scene = plain("heart", x=-0.3, y=0.25, radius=0.5, angle=0.2)
    picture, masks = scenes.render(scene)
    (found,) = measure.read(worn(picture, 2)).things
    assert (found.x, found.y) == pytest.approx((-0.3, 0.25), abs=0.03)
    assert found.radius == pytest.approx(0.5, rel=0.06) and found.angle == pytest.approx(0.2, abs=0.06)
    both, either = np.minimum(found.mask, masks[0]).sum(), np.maximum(found.mask, masks[0]).sum()
    assert both / either > 0.93


def test_tells_apart_two_things_that_touch():
    things = (scenes.Thing("circle", "red", x=-0.33, radius=0.38), scenes.Thing("square", "blue", x=0.33, radius=0.38))
    reading = measure.read(worn(scenes.render(scenes.Scene(things, "green"))[0], 3))
    assert [(t.kind, t.colour) for t in reading.things] == [("circle", "red"), ("square", "blue")]


def test_sees_a_wide_picture():
    entry = next(e for e in pictures.load() if e["width"] > e["height"])
    reading = measure.read(worn(pictures.draw(entry)[0], 4))
    assert [(t.kind, t.colour) for t in reading.things] == [("circle", "green"), ("star", "red")]


def test_ground_fits_under_light_and_behind_things():
    scene = plain("circle", "white", "blue", radius=0.6, seed=9)
    empty = scenes.render(replace(scene, things=()))[0]
    light = measure.fit_ground(scenes.render(scene)[0])
    assert np.abs(light - ndimage.gaussian_filter(empty, (3, 3, 0))).max() < 0.03


def test_a_thing_that_vanished_has_no_colour():
    scene = plain("circle", "red", "green", radius=0.5)
    masks = scenes.render(scene)[1]
    empty = scenes.render(replace(scene, things=()))[0]
    assert measure.colour_shares(empty, masks[0])["ground"] > 0.95
    assert not measure.has_colour(empty, masks[0], "green") and not measure.read(empty).things


@pytest.mark.filterwarnings("error")
def test_where_all_is_as_dark_as_an_outline_no_colour_is_named():
    picture = np.full((128, 128, 3), 0.6, np.float32)
    picture[40:80, 40:80] = 0.02
    mask = np.zeros((128, 128))
    mask[44:76, 44:76] = 1
    assert set(measure.colour_shares(picture, mask).values()) == {0.0}


def test_a_half_done_edit_is_not_done():
    scene = plain("square", "red", "grey", radius=0.5)
    picture, masks = scenes.render(scene)
    half = picture.copy()
    half[:, :58] = scenes.render(pictures.recoloured(scene, "blue"))[0][:, :58]
    assert not measure.has_colour(half, masks[0], "blue")
    assert 0.3 < measure.colour_shares(half, masks[0])["blue"] < 0.5


def test_compare_wants_every_thing():
    things = (scenes.Thing("circle", "red", x=-0.45, radius=0.3), scenes.Thing("square", "blue", x=0.45, radius=0.3))
    scene = scenes.Scene(things, "green")
    reading = measure.read(scenes.render(scene)[0])
    assert all(measure.compare(reading, scene).values())
    for other, wrong in (
        (pictures.recoloured(scene, "green", 1), {"colour"}),
        (replace(scene, ground="brown"), {"ground"}),
        (replace(scene, things=things[:1]), {"count", "kind", "colour"}),
        (replace(scene, things=(replace(things[0], kind="star"), things[1])), {"kind"}),
    ):
        assert {key for key, right in measure.compare(reading, other).items() if not right} == wrong


def test_psnr_and_change_by_hand():
    a = np.full((4, 6, 3), 0.5, np.float32)
    b = a.copy()
    b[:2] += 0.1
    top = np.zeros((4, 6))
    top[:2] = 1
    assert measure.psnr(a, b, top) == pytest.approx(20, abs=1e-3)
    assert measure.psnr(a, b) == pytest.approx(20 + 10 * np.log10(2), abs=1e-3)
    assert measure.psnr(a, b, 1 - top) == pytest.approx(100)
    assert measure.change(a, b, top) == pytest.approx(0.1, abs=1e-6) and measure.change(a, b, 1 - top) == 0
    assert (measure.outside(np.stack([top, np.roll(top, 1, 0)])) == (np.arange(4)[:, None] == 3)).all()


def test_demo_pictures_are_held_out_and_true():
    entries = pictures.load()
    assert {e["file"] for e in entries} == {p.name for p in pictures.FOLDER.glob("*.png")}
    from PIL import Image

    for entry in entries:
        scene = pictures.scene_of(entry)
        assert scenes.held_out(scene) and entry["caption"] == captions.sentence(scene)
        stored = np.asarray(Image.open(pictures.FOLDER / entry["file"]), np.float32) / 255
        drawn, masks = pictures.draw(entry)
        assert stored.shape == drawn.shape == (entry["height"], entry["width"], 3)
        assert np.abs(stored - drawn).max() <= 0.5 / 255 + 1e-6
        assert measure.has_colour(stored, masks[0], scene.things[0].colour)
        assert entry["edit"]["colour"] not in {scene.ground, *(t.colour for t in scene.things)}
