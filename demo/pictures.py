"""The demo pictures: held-out scenes as files, and everything that is true about them.

`truth.json` holds for every file its scene (so masks and the true picture of an edit can be drawn), its caption and
the edit that `tools/demo_run.py` asks for; `tools/demo_pictures.py` makes it and the files. Needs numpy.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from . import captions, scenes

FOLDER = Path(__file__).parent / "images"
# file name, scene (training seeds begin at 10,000,000), colour that the edit gives to the first thing
PICTURES = (
    ("red_star", 702206, "green"),
    ("white_heart", 713041, "red"),
    ("blue_moon", 700984, "yellow"),
    ("orange_circle", 713893, "blue"),
    ("yellow_cross", 713229, "purple"),
    ("yellow_triangle", 759778, "orange"),
    ("red_square", 700524, "yellow"),
    ("yellow_circle", 701341, "red"),
    ("striped_blue_triangle", 755683, "yellow"),
    ("dotted_white_star", 703539, "blue"),
    ("drawn_orange_square", 710142, "green"),
    ("drawn_purple_cross", 700602, "white"),
    ("red_heart_and_orange_moon", 741438, "yellow"),
    ("wide_green_circle_and_red_star", 791254, "blue"),
)


def held_out(first, count, **fixed):
    """`count` random scenes from seed `first` on whose combination of kind, colour and ground was never trained on.

    Args:
        fixed: for `scenes.random_scene`.
    """
    chosen, seed = [], first
    while len(chosen) < count:
        scene = scenes.random_scene(seed, **fixed)
        seed += 1
        if scenes.held_out(scene):
            chosen.append(scene)
    return chosen


def recoloured(scene, colour, number=0):
    """The scene with another colour of one thing."""
    things = list(scene.things)
    things[number] = replace(things[number], colour=colour)
    return replace(scene, things=tuple(things))


def other_colour(scene, rng, number=0):
    """A colour that an edit can ask for: not the thing's, another thing's or the ground's."""
    taken = {scene.ground, *(t.colour for t in scene.things)}
    return str(rng.choice([c for c in scenes.COLOURS if c not in taken]))


def truth(name, seed, colour):
    """One entry of truth.json."""
    wide = name.startswith("wide")
    scene = scenes.random_scene(seed)
    asked = recoloured(scene, colour)
    first = asked.things[0]
    return {
        "file": f"{name}.png",
        "width": 192 if wide else 128,
        "height": 128,
        "caption": captions.sentence(scene),
        "scene": asdict(scene),
        "edit": {
            "colour": colour,
            "target": captions.sentence(asked),
            "phrase": captions.with_article(f"{colour} {first.kind}"),
            "fragment": f"{colour} {first.kind}",
        },
    }


def scene_of(entry):
    """The Scene of an entry of truth.json."""
    fields = dict(entry["scene"])
    return scenes.Scene(**fields | {"things": tuple(scenes.Thing(**t) for t in fields["things"])})


def draw(entry, scene=None):
    """The picture float32 [H, W, 3] and masks [things, H, W] of an entry; or another scene in the entry's frame."""
    side, top = max(entry["width"], entry["height"]), (entry["width"] - entry["height"]) // 2
    picture, masks = scenes.render(scene or scene_of(entry), side)
    rows = slice(top, top + entry["height"])
    return picture[rows], masks[:, rows]


def load(folder=FOLDER):
    """All entries of truth.json."""
    return json.loads((folder / "truth.json").read_text("utf-8"))
