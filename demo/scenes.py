"""Procedurally drawn scenes: the world that the demo model knows.

A scene is one or two things (a kind, a colour, a surface pattern, a size, a place) on a ground (a colour, plain or
tiled), as a shaded "photo" or as an outlined "drawing". Everything is given by plain values, so the true picture of an
edit is the same scene with one value replaced: `replace(scene, ...)`, rendered with the same seed.

Numpy only. Pictures are float32 [H, W, 3] in 0..1; masks are float32 coverage [H, W] in 0..1, one for each thing.
"""

from dataclasses import KW_ONLY, dataclass

import numpy as np

KINDS = ("circle", "square", "triangle", "star", "heart", "moon", "cross")
# Things are bright, grounds dim: noise that hides a blue star on grey can then hide a yellow one in its place more
# easily than a second star elsewhere, so that words without a place mean the thing that is there.
COLOURS = {
    "red": (0.93, 0.28, 0.27),
    "orange": (0.97, 0.62, 0.22),
    "yellow": (0.98, 0.92, 0.40),
    "green": (0.38, 0.86, 0.42),
    "blue": (0.36, 0.58, 0.98),
    "purple": (0.76, 0.42, 0.95),
    "white": (0.97, 0.97, 0.97),
}
GROUNDS = {
    "green": (0.06, 0.27, 0.11),
    "blue": (0.05, 0.12, 0.36),
    "red": (0.36, 0.05, 0.07),
    "purple": (0.25, 0.08, 0.33),
    "grey": (0.22, 0.22, 0.23),
    "brown": (0.27, 0.16, 0.06),
    "black": (0.06, 0.06, 0.07),
}
PATTERNS = ("plain", "striped", "dotted")
GROUND_PATTERNS = ("plain", "tiled")
STYLES = ("photo", "drawing")
SIZES = {"small": (0.32, 0.40), "medium": (0.44, 0.54), "big": (0.58, 0.68)}
PLACES = {
    "in the middle": (0.0, 0.0),
    "on the left": (-0.42, 0.0),
    "on the right": (0.42, 0.0),
    "at the top": (0.0, -0.42),
    "at the bottom": (0.0, 0.42),
}


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` and `radius` are in units of half the picture's side, `angle` in radians."""

    kind: str
    colour: str
    _: KW_ONLY
    pattern: str = "plain"
    size: str = "medium"
    place: str = "in the middle"
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.4
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things from back to front on a ground. `seed` fixes light, shade and noise."""

    things: tuple[Thing, ...]
    ground: str = "grey"
    _: KW_ONLY
    ground_pattern: str = "plain"
    style: str = "photo"
    seed: int = 0


# Signed distances to shapes of radius 1 (negative inside), y pointing down. Formulas after Inigo Quilez,
# "2D distance functions".


def _circle(x, y):
    return np.hypot(x, y) - 0.92


def _box(x, y, w, h):
    dx, dy = np.abs(x) - w, np.abs(y) - h
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x, y):
    return _box(x, y, 0.80, 0.80)


def _cross(x, y):
    return np.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95))


def _polygon(x, y, points):
    """Signed distance to a closed polygon given by its corners."""
    points = np.asarray(points, np.float32)
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0)):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - ex * t) ** 2 + (py - ey * t) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _corners(count, radii, turn=-np.pi / 2):
    angles = turn + 2 * np.pi * np.arange(count) / count
    radii = np.resize(radii, count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _triangle(x, y):
    return _polygon(x, y + 0.15, _corners(3, [1.12]))


def _star(x, y):
    return _polygon(x, y, _corners(10, [1.08, 0.47]))


def _heart(x, y):
    x, y = np.abs(x) / 1.75, (0.92 - y) / 1.75
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    low = np.maximum(x + y, 0) / 2
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - low) ** 2 + (y - low) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, tip) * 1.75


def _moon(x, y):
    return np.maximum(np.hypot(x + 0.08, y) - 1.0, 0.86 - np.hypot(x - 0.50, y))


SHAPES = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "heart": _heart, "moon": _moon, "cross": _cross,
}


def _grid(side):
    line = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
    return np.meshgrid(line, line)


def _own_frame(thing, x, y):
    """The picture's coordinates in the thing's own frame, where its radius is 1."""
    c, s = np.cos(thing.angle), np.sin(thing.angle)
    dx, dy = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    return c * dx + s * dy, c * dy - s * dx


def coverage(thing, side=128):
    """Antialiased coverage of a thing, float32 [side, side] in 0..1."""
    u, v = _own_frame(thing, *_grid(side))
    return np.clip(0.5 - SHAPES[thing.kind](u, v) * thing.radius * side / 2, 0, 1).astype(np.float32)


def _surface(thing, base, u, v, radius):
    """Colour of the thing's surface in its own frame, [H, W, 3]."""
    shade = base * 0.55 if base.mean() > 0.35 else base * 0.5
    if thing.pattern == "striped":
        band = np.clip(np.sin((u + v) * 0.7071 * radius * 26) * 3 + 0.5, 0, 1)
    elif thing.pattern == "dotted":
        step = 0.155 / radius
        du, dv = (np.mod(w + step / 2, step) - step / 2 for w in (u, v))
        band = np.clip((0.30 * step - np.hypot(du, dv)) * radius * 64 + 0.5, 0, 1)
    else:
        return np.broadcast_to(base, (*u.shape, 3))
    return base + (shade - base) * band[..., None]


def render(scene, side=128):
    """Draw a scene.

    Returns:
        picture float32 [side, side, 3] in 0..1, and masks float32 [things, side, side] in 0..1 (visible parts only).
    """
    rng = np.random.default_rng(scene.seed)
    drawing = scene.style == "drawing"
    x, y = _grid(side)
    light = rng.uniform(-1, 1, 2)
    jitter = rng.normal(0, 0.012, (3, 3)).astype(np.float32)

    ground = np.asarray(GROUNDS[scene.ground], np.float32) + jitter[0]
    picture = np.broadcast_to(ground, (side, side, 3)).copy()
    if scene.ground_pattern == "tiled":
        gap = np.minimum(*(np.abs(np.mod(w * 2.5 + 0.5, 1) - 0.5) for w in (x, y)))
        line = np.clip((0.055 - gap) * 25 + 0.5, 0, 1)[..., None]
        picture *= 1 - 0.28 * line if ground.mean() > 0.2 else 1 + 0.9 * line
    if not drawing:
        picture *= (1 + 0.09 * (light[0] * x + light[1] * y))[..., None]

    masks = []
    for number, thing in enumerate(scene.things):
        u, v = _own_frame(thing, x, y)
        distance = SHAPES[thing.kind](u, v) * thing.radius * side / 2
        cover = np.clip(0.5 - distance, 0, 1)
        base = np.asarray(COLOURS[thing.colour], np.float32) + jitter[1 + number]
        surface = _surface(thing, base, u, v, thing.radius)
        if drawing:
            edge = np.clip(1.8 - np.abs(distance + 1.0), 0, 1)[..., None]
            surface = surface * (1 - edge) + 0.05 * edge
        else:
            surface = surface * (1 + 0.10 * (light[0] * u + light[1] * v) - 0.05 * (u * u + v * v))[..., None]
            shadow_u, shadow_v = u + 0.10 * light[0], v + 0.10 * light[1]
            shadow = np.clip(0.5 - SHAPES[thing.kind](shadow_u, shadow_v) * thing.radius * side / 12, 0, 1)
            picture *= 1 - 0.16 * shadow[..., None]
        picture += (surface - picture) * cover[..., None]
        masks = [m * (1 - cover) for m in masks] + [cover]
    picture += rng.normal(0, 0.006 if drawing else 0.012, picture.shape)
    return np.clip(picture, 0, 1).astype(np.float32), np.asarray(masks, np.float32)


def _place(rng, size, place=None):
    radius = rng.uniform(*SIZES[size])
    name = place or str(rng.choice(list(PLACES)))
    room = max(0.0, 0.94 - radius * 1.05)
    x, y = (np.clip(c + rng.uniform(-0.08, 0.08), -room, room) for c in PLACES[name])
    return name, round(float(x), 4), round(float(y), 4), round(float(radius), 4)


def held_out(scene):
    """Whether a scene's combination of kind, colour and ground is kept out of training (about one in ten)."""
    kinds, colours, grounds = list(KINDS), list(COLOURS), list(GROUNDS)
    return any(
        (3 * kinds.index(t.kind) + 5 * colours.index(t.colour) + 7 * grounds.index(scene.ground)) % 10 == 0
        for t in scene.things
    )


def random_scene(seed, things=None, style=None, ground_pattern=None, pattern=None, size=None):
    """A random scene, the same one for the same arguments. Arguments left None are drawn."""
    rng = np.random.default_rng([seed, 7919])

    def pick(fixed, options, weights=None):
        return fixed or str(rng.choice(list(options), p=weights))

    count = things or int(rng.choice([1, 2], p=[0.78, 0.22]))
    ground = str(rng.choice(list(GROUNDS)))
    colours = [c for c in COLOURS if c != ground]
    rng.shuffle(colours)
    kinds = [str(k) for k in rng.choice(KINDS, 2, replace=False)]
    made = []
    for i in range(count):
        side = None if count == 1 else ("on the left", "on the right")[i]
        wanted = pick(size, SIZES, [0.25, 0.5, 0.25]) if count == 1 else "small"
        place, x, y, radius = _place(rng, wanted, side)
        made.append(Thing(  # in this order: patterns are drawn before angles
            kind=kinds[i],
            colour=colours[i],
            pattern=pick(pattern, PATTERNS, [0.6, 0.2, 0.2]),
            size=wanted,
            place=place,
            x=x,
            y=y,
            radius=radius,
            angle=round(float(rng.uniform(-0.25, 0.25)), 4),
        ))
    return Scene(
        things=tuple(made),
        ground=ground,
        ground_pattern=pick(ground_pattern, GROUND_PATTERNS, [0.75, 0.25]),
        style=pick(style, STYLES, [0.85, 0.15]),
        seed=int(seed),
    )
