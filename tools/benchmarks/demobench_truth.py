"""Whether an edit of Demo-Bench was made: read from the edited picture, with what is true about the edit.

Colour by segmentation, kind by shape matching, place by the mask (`tools/measure.py`); here also surface and style.
"""

import numpy as np
from scipy import ndimage

from ...demo import pictures, scenes
from .. import measure

OVERLAP = 0.4  # intersection over union from which on a found thing is the one that was meant
CONTRAST = 0.035  # of a surface's lightness, over which it is not plain
COHERENCE = 0.45  # of the directions of its edges, over which it is striped
RIM = 0.5  # share of a thing's rim that is dark in a drawing


def judge(truth, edited):
    """The verdict on one edited picture.

    Args:
        truth: of `demobench.entry`.
        edited: float32 [H, W, 3] in 0..1.

    Returns:
        {"success": 1.0 where what was asked for is there, "kept": 1.0 where number, kinds, colours and ground are those
        of the true target apart from what was edited, "target_psnr": dB to the true target}.
    """
    scene = pictures.scene_of({"scene": truth["scene"]})
    target, masks = scenes.render(scene, len(edited))
    reading = measure.read(edited)
    found = measure.compare(reading, scene)
    edit = _EDITS[truth["type"]]
    success = edit.made(truth, scene, masks, edited, reading)
    return {
        "success": float(success),
        "kept": float(all(found[name] for name in edit.keeps)),
        "target_psnr": measure.psnr(target, edited),
    }


def at(reading, mask):
    """The found thing that lies where a mask [H, W] is, or None."""
    best = max(reading.things, key=lambda thing: _iou(thing.mask, mask > 0.5), default=None)
    return best if best is not None and _iou(best.mask, mask > 0.5) >= OVERLAP else None


def _iou(a, b):
    return float((a & b).sum() / max((a | b).sum(), 1))


class _Edit:
    """How one type of edit is judged: features of `measure.compare` that it keeps, and whether it was made."""

    def __init__(self, made, *keeps):
        self.made, self.keeps = made, keeps


def _object(truth, scene, masks, edited, reading):
    found = at(reading, masks[0])
    return found is not None and found.kind == scene.things[0].kind


def _added(truth, scene, masks, edited, reading):
    thing, found = scene.things[truth["thing"]], at(reading, masks[truth["thing"]])
    return found is not None and (found.kind, found.colour) == (thing.kind, thing.colour)


def _deleted(truth, scene, masks, edited, reading):
    source = scenes.render(pictures.scene_of({"scene": truth["source"]}), len(edited))[1][truth["thing"]]
    gone = at(reading, source) is None
    return gone and measure.colour_shares(edited, source)["ground"] > 0.5


def _moved(truth, scene, masks, edited, reading):
    source = scenes.render(pictures.scene_of({"scene": truth["source"]}), len(edited))[1][0]
    found = at(reading, masks[0])
    return found is not None and _iou(found.mask, masks[0] > 0.5) > _iou(found.mask, source > 0.5)


def _coloured(truth, scene, masks, edited, reading):
    return measure.has_colour(edited, masks[0], scene.things[0].colour)


def _surfaced(truth, scene, masks, edited, reading):
    return pattern_of(edited, masks[0]) == scene.things[0].pattern


def _grounded(truth, scene, masks, edited, reading):
    return reading.ground == scene.ground


def _styled(truth, scene, masks, edited, reading):
    return style_of(edited, masks) == scene.style


_EDITS = {
    1: _Edit(_object, "count", "colour", "ground"),
    2: _Edit(_added, "count", "ground"),
    3: _Edit(_deleted, "count", "kind", "colour", "ground"),
    5: _Edit(_moved, "count", "kind", "colour", "ground"),
    6: _Edit(_coloured, "count", "kind", "ground"),
    7: _Edit(_surfaced, "count", "kind", "colour", "ground"),
    8: _Edit(_grounded, "count", "kind", "colour"),
    9: _Edit(_styled, "count", "kind", "colour", "ground"),
}


def pattern_of(picture, mask):
    """What the surface inside a mask [H, W] looks like: one of scenes.PATTERNS."""
    unit = len(mask) / 128
    inside = ndimage.binary_erosion(mask > 0.5, iterations=max(1, round(4 * unit)))
    if inside.sum() < 40:
        inside = mask > 0.5
    light = measure.oklab(ndimage.gaussian_filter(picture, (0.8 * unit, 0.8 * unit, 0)))[..., 0]
    weight = ndimage.gaussian_filter(inside.astype(float), 7 * unit)
    calm = ndimage.gaussian_filter(light * inside, 7 * unit) / np.maximum(weight, 1e-6)
    if np.std((light - calm)[inside]) < CONTRAST:
        return "plain"
    gy, gx = np.gradient(light)
    xx, yy, xy = ((a * b)[inside].mean() for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    coherence = np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9)
    return "striped" if coherence > COHERENCE else "dotted"


def style_of(picture, masks):
    """"drawing" where things have a dark outline, else "photo"; masks are [things, H, W]."""
    lightness, dark, count = measure.oklab(picture)[..., 0], 0, 0
    for mask in masks > 0.5:
        rim = mask & ~ndimage.binary_erosion(mask, iterations=2)
        body = ndimage.binary_erosion(mask, iterations=4)
        level = np.median(lightness[body]) if body.any() else 1.0
        dark, count = dark + (lightness[rim] < max(measure.OUTLINE, 0.6 * level)).sum(), count + rim.sum()
    return "drawing" if dark > RIM * max(count, 1) else "photo"
