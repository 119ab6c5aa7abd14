"""What a picture shows, measured without knowing how it was made: ground, objects, their colours and kinds.

    reading = measure.read(picture)                  # any picture of the demo model's world, float32 [H, W, 3] in 0..1
    reading.ground, reading.things[0].kind, reading.things[0].colour

The ground is fitted robustly (a colour under linear light); what is not a lighter or darker version of it is an object.
A colour is named by its nearest neighbour in Oklab, where each name stands for all its shades, so that stripes, dots
and shading do not matter. A kind is the outline of `scenes.SHAPES` with the largest intersection over union, over all
angles. Numpy and scipy only.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from scipy import ndimage, optimize

from ..demo import scenes

SMALLEST = 0.011  # of the picture's area; the smallest thing of the renderer has 0.024
ANGLES = np.linspace(-0.45, 0.45, 19)
SHADES = np.linspace(0.46, 1.12, 8)  # of a thing's colour: stripes and dots are about half as bright
GROUND_SHADES = np.linspace(0.58, 1.08, 11)  # of the ground: tile lines (0.72) in a shadow (0.84)
GROUND_DISTANCE = 0.055  # Oklab; farther from every shade of the ground is not ground
OUTLINE = 0.30  # Oklab lightness under which a pixel is a drawing's outline
COLOURS = tuple(scenes.COLOURS)


@dataclass(frozen=True)
class Found:
    """One object. Units as in `scenes.Thing`, of half the picture's shorter side; `match` is the kind's IoU."""

    kind: str
    colour: str
    place: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    match: float
    mask: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Reading:
    """Objects from left to right on a ground; `light` is the fitted ground, float32 [H, W, 3]."""

    ground: str
    things: tuple[Found, ...]
    light: np.ndarray = field(repr=False)


# --- colours --------------------------------------------------------------------------------------------------------


def oklab(rgb):
    """sRGB [..., 3] in 0..1 to Oklab (Bjorn Ottosson, "A perceptual color space for image processing")."""
    rgb = np.clip(np.asarray(rgb, np.float32), 0, 1)
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    lms = linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
                             [0.0514459929, 0.1073969566, 0.6299787005]], np.float32)
    return np.cbrt(lms) @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                                    [0.7936177850, -2.4285922050, 0.7827717662],
                                    [-0.0040720468, 0.4505937099, -0.8086757660]], np.float32)


def _shade_distance(lab, colour, shades):
    """Oklab distance of pixels to the nearest shade of a colour ([3], or [..., 3] for each pixel its own)."""
    return np.min([np.linalg.norm(lab - oklab(np.asarray(colour) * s), axis=-1) for s in shades], axis=0)


def _colour_distances(lab):
    return np.stack([_shade_distance(lab, scenes.COLOURS[name], SHADES) for name in COLOURS])


def _ground_distance(lab, light):
    # The tile lines of a dark ground are lighter than it.
    shades = [*GROUND_SHADES, 1.3, 1.6, 1.9] if light.mean() < 0.2 else GROUND_SHADES
    return _shade_distance(lab, light, shades)


def colour_shares(picture, mask):
    """What a picture shows in a mask: {name: share of its pixels} over all object colours and "ground".

    Outlines and the mask's own rim, where colours mix, do not count. A vanished object is "ground", whatever object
    colour its ground may resemble.

    Args:
        picture: float32 [H, W, 3] in 0..1.
        mask: [H, W] in 0..1.
    """
    lab, light = oklab(_calm(picture)), fit_ground(picture)
    inside = ndimage.binary_erosion(mask > 0.5, iterations=2)
    inside = inside if inside.any() else mask > 0.5
    off = _ground_distance(lab, light)
    body = inside & ((lab[..., 0] > OUTLINE) | (off < GROUND_DISTANCE))
    nearest = np.vstack([_colour_distances(lab[body]), off[body][None]]).argmin(0)
    count = max(len(nearest), 1)
    return {name: float((nearest == i).sum() / count) for i, name in enumerate((*COLOURS, "ground"))}


def has_colour(picture, mask, colour):
    """Whether more than half of what a picture shows in a mask is of an object colour."""
    return colour_shares(picture, mask)[colour] > 0.5


def _name_ground(light):
    centre = oklab(np.median(light.reshape(-1, 3), axis=0))
    return min(scenes.GROUNDS, key=lambda name: np.linalg.norm(centre - oklab(scenes.GROUNDS[name])))


# --- ground and masks -----------------------------------------------------------------------------------------------


def _calm(picture):
    return ndimage.gaussian_filter(picture, (0.7, 0.7, 0))


def _axes(height, width):
    """Coordinates of all pixels, 1 being half the shorter side; y points down."""
    half = min(height, width) / 2
    return np.meshgrid((np.arange(width) + 0.5 - width / 2) / half, (np.arange(height) + 0.5 - height / 2) / half)


def fit_ground(picture):
    """The ground without objects: a colour under linear light, float32 [H, W, 3].

    Begins at the border's median colour, which few objects reach, and fits again to the pixels that agree.
    """
    height, width = picture.shape[:2]
    x, y = _axes(height, width)
    basis = np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)
    pixels = _calm(picture).reshape(-1, 3)
    border = np.ones((height, width), bool)
    border[8:-8, 8:-8] = False
    light = np.broadcast_to(np.median(pixels[border.ravel()], axis=0), pixels.shape)
    for tolerance in (0.14, 0.10, 0.07, 0.05, 0.05):
        near = np.abs(pixels - light).max(1) < tolerance
        if near.sum() < 0.05 * len(near):
            break
        light = basis @ np.linalg.lstsq(basis[near], pixels[near], rcond=None)[0]
    return np.clip(light, 0, 1).reshape(picture.shape).astype(np.float32)


def _disc(radius):
    r = np.arange(-int(radius), int(radius) + 1)
    return r[:, None] ** 2 + r**2 <= radius**2


def foreground(picture, light):
    """Everything that is not a shade of the ground, small gaps closed, bool [H, W]."""
    off = _ground_distance(oklab(_calm(picture)), light) > GROUND_DISTANCE
    unit = min(off.shape) / 128
    padded = np.pad(off, 8)
    padded = ndimage.binary_closing(padded, _disc(2.5 * unit))
    off = ndimage.binary_fill_holes(padded)[8:-8, 8:-8]
    return ndimage.binary_opening(off, _disc(1.5 * unit))


def _parts(mask, least):
    labels, count = ndimage.label(mask)
    parts = [labels == i for i in range(1, count + 1)]
    return [p for p in parts if p.sum() >= least]


def _split(part, lab, least):
    """A part of two colours is two objects that touch."""
    core = ndimage.binary_erosion(part, iterations=2) & (lab[..., 0] > OUTLINE)
    nearest = np.full(part.shape, -1)
    if core.sum() < least / 2:
        return [part]
    nearest[core] = _colour_distances(lab[core]).argmin(0)
    first, second = np.argsort(np.bincount(nearest[core], minlength=len(COLOURS)))[:-3:-1]
    votes = [ndimage.gaussian_filter((nearest == c).astype(float), 2.5) for c in (first, second)]
    sides = [_parts(part & (votes[0] >= votes[1]), least), _parts(part & (votes[1] > votes[0]), least)]
    if not all(sides):
        return [part]
    big = [max(side, key=np.sum) for side in sides]
    whole = all((nearest[b] == c).sum() > 0.7 * (nearest == c).sum() for b, c in zip(big, (first, second)))
    return big if whole else [part]


# --- kinds ----------------------------------------------------------------------------------------------------------

_SIDE, _REACH = 48, 1.25  # of the frame in which outlines are compared: centroid 0, area 1


@cache
def _frame():
    line = (np.arange(_SIDE) + 0.5) * (2 * _REACH / _SIDE) - _REACH
    return np.meshgrid(line, line)


@cache
def _outline(kind, eroded):
    """Root of the area and centroid of a shape of radius 1, `eroded` taken off its rim."""
    line = np.linspace(-1.4, 1.4, 281)
    x, y = np.meshgrid(line, line)
    inside = scenes.SHAPES[kind](x, y) < -eroded
    return np.sqrt(inside.sum()) * (line[1] - line[0]), x[inside].mean(), y[inside].mean()


def _template(kind, eroded, angle, dx=0.0, dy=0.0, scale=1.0):
    """A shape in the common frame, soft [_SIDE, _SIDE]."""
    root, cx, cy = _outline(kind, eroded)
    x, y = ((w - d) / scale for w, d in zip(_frame(), (dx, dy)))
    c, s = np.cos(angle), np.sin(angle)
    distance = scenes.SHAPES[kind](root * (c * x + s * y) + cx, root * (c * y - s * x) + cy) + eroded
    return np.clip(0.5 - distance / root * scale * _SIDE / (2 * _REACH), 0, 1)


@cache
def _templates(eroded):
    keys = [(kind, angle) for kind in scenes.KINDS for angle in ANGLES]
    return keys, np.stack([_template(kind, eroded, angle) for kind, angle in keys]).reshape(len(keys), -1)


def _iou(a, b):
    return np.minimum(a, b).sum(-1) / np.maximum(a, b).sum(-1)


def match_kind(mask, erosions=(0.0,)):
    """The shape that fits a mask best.

    Args:
        mask: [H, W] in 0..1.
        erosions: how much of the rim may be missing, in radii (a black outline cannot be seen on black).

    Returns:
        kind, IoU, angle, and x, y, radius in pixels.
    """
    area = float(mask.sum())
    cy, cx = (float((mask * w).sum() / area) for w in np.indices(mask.shape))
    root = np.sqrt(area)
    fx, fy = _frame()
    calm = ndimage.gaussian_filter(mask.astype(float), 0.5)
    own = ndimage.map_coordinates(calm, [cy + fy * root, cx + fx * root], order=1)
    best = {}
    for eroded in erosions:
        keys, templates = _templates(eroded)
        for (kind, angle), fit in zip(keys, _iou(templates, own.ravel())):
            if fit > best.get(kind, (0,))[0]:
                best[kind] = (fit, eroded, angle)

    def refined(kind):
        _, eroded, angle = best[kind]
        start = [angle, 0, 0, 1]
        simplex = np.array([start] + [[angle + (i == 0) * 0.1, *(0.06 * (i == j) + (j == 3) for j in (1, 2, 3))]
                                      for i in range(4)])
        found = optimize.minimize(lambda p: -_iou(_template(kind, eroded, *p).ravel(), own.ravel()), start,
                                  method="Nelder-Mead", options={"maxfev": 90, "initial_simplex": simplex})
        return -found.fun, kind, eroded, found.x

    fit, kind, eroded, (angle, dx, dy, scale) = max(refined(k) for k in sorted(best, key=lambda k: -best[k][0])[:3])
    unit, sx, sy = _outline(kind, eroded)
    radius = root * scale / unit
    c, s = np.cos(angle), np.sin(angle)
    x = cx + dx * root - radius * (c * sx - s * sy)
    y = cy + dy * root - radius * (s * sx + c * sy)
    return kind, float(fit), float(angle), float(x), float(y), float(radius)


# --- the whole picture ----------------------------------------------------------------------------------------------


def read(picture):
    """What a picture shows.

    Args:
        picture: float32 [H, W, 3] in 0..1.

    Returns:
        Reading.
    """
    height, width = picture.shape[:2]
    light = fit_ground(picture)
    lab, ground = oklab(_calm(picture)), _name_ground(light)
    half, least = min(height, width) / 2, SMALLEST * min(height, width) ** 2
    parts = [p for whole in _parts(foreground(picture, light), least) for p in _split(whole, lab, least)]
    found = []
    for mask in parts:
        kind, fit, angle, x, y, radius = match_kind(mask, (0.0, 0.07, 0.14) if ground == "black" else (0.0,))
        x, y, radius = (x + 0.5 - width / 2) / half, (y + 0.5 - height / 2) / half, radius / half
        shares = colour_shares(picture, mask)
        colour = max(COLOURS, key=shares.get)
        place = min(scenes.PLACES, key=lambda p: np.hypot(x - scenes.PLACES[p][0], y - scenes.PLACES[p][1]))
        size = min(scenes.SIZES, key=lambda s: abs(radius - np.mean(scenes.SIZES[s])))
        found.append(Found(kind, colour, place, size, x, y, radius, angle, fit, mask))
    return Reading(ground, tuple(sorted(found, key=lambda f: f.x)), light)


def compare(reading, scene):
    """Which of a scene's features a picture shows: {"count", "kind", "colour", "ground"}, each True or False.

    Kinds and colours must hold for every thing; things are paired by place, from left to right.
    """
    wanted = sorted(scene.things, key=lambda t: t.x)
    count = len(wanted) == len(reading.things)
    pairs = list(zip(reading.things, wanted))
    return {
        "count": count,
        "kind": count and all(f.kind == t.kind for f, t in pairs),
        "colour": count and all(f.colour == t.colour for f, t in pairs),
        "ground": reading.ground == scene.ground,
    }


def psnr(a, b, mask=None):
    """Peak signal-to-noise ratio in dB of two pictures [H, W, 3] in 0..1, where `mask` [H, W] weighs pixels."""
    error = ((np.asarray(a, np.float64) - b) ** 2).mean(-1)
    weight = np.ones_like(error) if mask is None else np.asarray(mask, np.float64)
    return float(-10 * np.log10(max((error * weight).sum() / max(weight.sum(), 1e-9), 1e-10)))


def change(a, b, mask):
    """Mean absolute difference of two pictures inside a mask, 0..1."""
    return float((np.abs(np.asarray(a, np.float64) - b).mean(-1) * mask).sum() / max(mask.sum(), 1e-9))


def outside(masks):
    """Every pixel that no mask [things, H, W] touches, bool [H, W]."""
    return ~(np.max(masks, axis=0) > 0)
