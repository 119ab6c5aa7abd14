"""Demo-Bench: PIE-Bench's format made of the demo model's world, where the true result of every edit is known.

    python tools/run.py benchmarks.demobench FOLDER [--each 25] [--seed 0]

Every picture is a held-out scene of the renderer, every edit replaces one value of it, so the true target is the same
scene with that value. The mask is where the two pictures differ. Whether an edit was made is read from the edited
picture (`demobench_truth.py`), not from similarity.
"""

import argparse
import difflib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...demo import captions, pictures, scenes
from . import piebench

EACH, SIDE = 25, 128  # pictures of a type, pixels of a side
FIRST_SEED = 500_000  # of scenes; training's begin at 10,000,000
DIFFERENCE = 0.02  # of a true picture's values, from which on a pixel belongs to the edit
TARGETS, MAKER = "targets", "demobench.json"
FORMAT = 1  # goes up when the same seed gives another folder


# --- edits ----------------------------------------------------------------------------------------------------------
# Each takes a seed: (source scene, target scene, number of the edited thing, blended words, instruction).


def _one(seed, **fixed):
    return scenes.random_scene(seed, things=1, **fixed)


def _changed(scene, **values):
    return replace(scene, things=(replace(scene.things[0], **values),))


def change_object(seed, rng):
    scene = _one(seed)
    kind = scene.things[0].kind
    other = str(rng.choice([k for k in scenes.KINDS if k != kind]))
    return scene, _changed(scene, kind=other), 0, (kind, other), f"Make the {kind} a {other}"


def add_object(seed, rng):
    both = scenes.random_scene(seed, things=2)
    first, added = both.things
    return replace(both, things=(first,)), both, 1, (), f"Add {captions.with_article(captions.thing_words(added))}"


def delete_object(seed, rng):
    both = scenes.random_scene(seed, things=2)
    gone = both.things[1]
    return both, replace(both, things=both.things[:1]), 1, (), f"Remove the {captions.thing_words(gone)}"


def change_place(seed, rng):
    scene = _one(seed, size=str(rng.choice(["small", "medium"])))
    thing = scene.things[0]
    place = str(rng.choice([p for p in scenes.PLACES if p != thing.place]))
    room = 0.94 - thing.radius * 1.05
    x, y = (round(float(np.clip(c + rng.uniform(-0.08, 0.08), -room, room)), 4) for c in scenes.PLACES[place])
    moved = _changed(scene, place=place, x=x, y=y)
    return scene, moved, 0, (thing.kind,) * 2, f"Move the {thing.kind} to {place.split(' ', 1)[1]}"


def change_colour(seed, rng):
    scene = _one(seed)
    kind, colour = scene.things[0].kind, pictures.other_colour(scene, rng)
    return scene, pictures.recoloured(scene, colour), 0, (kind, kind), f"Make the {kind} {colour}"


def change_material(seed, rng):
    """Stripes and none: dots are too fine for the demo model's autoencoder."""
    before, after = rng.permutation(["plain", "striped"])
    scene = _one(seed, size=str(rng.choice(["medium", "big"])), pattern=str(before))
    kind = scene.things[0].kind
    return scene, _changed(scene, pattern=str(after)), 0, (kind, kind), f"Make the {kind} {after}"


def change_background(seed, rng):
    scene = scenes.random_scene(seed)
    taken = {scene.ground, *(t.colour for t in scene.things)}
    ground = str(rng.choice([g for g in scenes.GROUNDS if g not in taken]))
    return scene, replace(scene, ground=ground), None, ("ground",) * 2, f"Make the ground {ground}"


def change_style(seed, rng):
    scene = scenes.random_scene(seed, style=str(rng.choice(scenes.STYLES)))
    style = next(s for s in scenes.STYLES if s != scene.style)
    return scene, replace(scene, style=style), None, (), f"Make it a {style}"


EDITS = {1: change_object, 2: add_object, 3: delete_object, 5: change_place, 6: change_colour, 7: change_material,
         8: change_background, 9: change_style}
"""By number of piebench.TYPES."""


# --- prompts and masks ----------------------------------------------------------------------------------------------


def bracketed(before, after):
    """Two prompts with what differs in square brackets; a single word between two differences belongs to them."""
    words = before.split(), after.split()
    spans = [list(op) for op in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()]
    for i in range(1, len(spans) - 1):
        if spans[i][0] == "equal" and spans[i][2] - spans[i][1] == 1:
            spans[i][0] = "between"
    out = ["", ""]
    for side, text in enumerate(words):
        changed = False
        for kind, *span in spans:
            part = " ".join(text[span[2 * side] : span[2 * side + 1]])
            if part and (kind == "equal") == changed:
                out[side] += "]" if changed else " ["
                changed = not changed
                out[side] += f" {part}" if kind == "equal" else part
            elif part:
                out[side] += f" {part}"
        out[side] = (out[side] + "]" * changed).strip()
    return tuple(out)


def prompts(source, target):
    """The scenes' sentences with brackets. A photo is called one only where the edit is one of style, and a thing's
    place is named only where the number of things stays."""
    place = len(source.things) == len(target.things)
    texts = [captions.sentence(scene, place) for scene in (source, target)]
    if source.style != target.style:
        texts = [text if text.startswith("a drawing of ") else f"a photo of {text}" for text in texts]
    return bracketed(*texts)


def mask_of(source, target, number):
    """Where the edit is: bool [SIDE, SIDE]. The edited thing before and after, and whatever else the edit changes."""
    (before, old), (after, new) = scenes.render(source, SIDE), scenes.render(target, SIDE)
    if source.style != target.style:
        return np.ones((SIDE, SIDE), bool)
    mask = np.abs(before - after).max(-1) > DIFFERENCE
    for masks in (old, new):
        if number is not None and number < len(masks):
            mask |= masks[number] > 0
    return mask


# --- the folder -----------------------------------------------------------------------------------------------------


def entry(number, kind, seed):
    """One entry of the mapping with its pictures: (key, entry, source, target); None: the scene is not held out."""
    source, target, thing, blended, instruction = EDITS[kind](seed, np.random.default_rng([seed, kind]))
    if not scenes.held_out(source):
        return None
    truth = {"type": kind, "source": asdict(source), "scene": asdict(target), "thing": thing}
    drawn = [scenes.render(scene, SIDE)[0] for scene in (source, target)]
    key = f"{kind}{number:011d}"
    name = f"{kind}_{piebench.TYPES[kind].replace(' ', '_')}/{key}.png"
    before, after = prompts(source, target)
    return key, {
        "image_path": name,
        "original_prompt": before,
        "editing_prompt": after,
        "editing_instruction": instruction,
        "editing_type_id": str(kind),
        "blended_word": " ".join(blended),
        "mask": piebench.encode(mask_of(source, target, thing)),
        "truth": {**truth, "target": name},
    }, *drawn


def make(folder, each=EACH, seed=0, progress=None):
    """Write `each` pictures of every type of edit; `folder` is complete afterwards or not there.

    Args:
        seed: another one gives other scenes.
        progress: called with (done, all).
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    mapping = {}
    for kind in EDITS:
        found, at = 0, FIRST_SEED + 10_000 * kind + 100_000_000 * seed
        while found < each:
            made, at = entry(found, kind, at), at + 1
            if made is None:
                continue
            key, mapping[key], *drawn = made[0], made[1], *made[2:]
            for where, picture in zip((piebench.PICTURES, TARGETS), drawn):
                path = partial / where / mapping[key]["image_path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(piebench.png_of(picture))
            found += 1
            if progress is not None:
                progress(len(mapping), each * len(EDITS))
    (partial / piebench.MAPPING).write_text(json.dumps(mapping) + "\n", "utf-8")
    (partial / MAKER).write_text(json.dumps({"format": FORMAT, "each": each, "seed": seed}) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def ready(folder, each=EACH, seed=0, progress=None):
    """`make` where the folder does not hold just that already.

    Raises:
        piebench.Problem: there is something else.
    """
    folder = Path(folder)
    if folder.exists():
        try:
            made = json.loads((folder / MAKER).read_text("utf-8"))
        except (OSError, ValueError):
            raise piebench.Problem(f"{folder} is no Demo-Bench: choose another folder for it.") from None
        if made == {"format": FORMAT, "each": each, "seed": seed}:
            return
    make(folder, each, seed, progress)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=EACH, help="pictures of every type of edit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    ready(options.folder, options.each, options.seed)
    print(f"{options.folder}: {len(EDITS) * options.each} pictures")
    return 0
