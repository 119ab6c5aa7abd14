"""Captions of scenes, from whole sentences down to single words.

The model is to understand a concept however it is worded, so training draws a new caption form at every visit:
whole sentences, sentences with parts left out, fragments ("red star"), single words ("red", "star", "striped").
"""

import numpy as np

EMPTY = 0.10  # share of empty captions, for classifier-free guidance


def with_article(words):
    """The words with "a" or "an" in front."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def thing_words(thing, size=True, pattern=True, colour=True):
    """Noun phrase of a thing without its article: "big striped red star"."""
    words = [thing.size] if size and thing.size != "medium" else []
    words += [thing.pattern] if pattern and thing.pattern != "plain" else []
    words += [thing.colour] if colour else []
    return " ".join([*words, thing.kind])


def ground_words(scene, pattern=True):
    """Noun phrase of the ground without its article: "tiled blue ground"."""
    return ("tiled " if pattern and scene.ground_pattern == "tiled" else "") + scene.ground + " ground"


def sentence(scene, place=True):
    """The whole truth about a scene in one sentence."""
    things = " and ".join(with_article(thing_words(t)) for t in scene.things)
    where = f" {scene.things[0].place}" if place and len(scene.things) == 1 else ""
    lead = "a drawing of " if scene.style == "drawing" else ""
    return f"{lead}{things}{where} on {with_article(ground_words(scene))}"


def _partial(scene, rng):
    """A sentence with parts left out."""
    chance = rng.random(6) < (0.6, 0.75, 0.9, 0.3, 0.75, 0.3)
    things = [with_article(thing_words(t, *chance[:3])) for t in scene.things]
    text = " and ".join(things)
    if chance[3] and len(things) == 1:
        text += f" {scene.things[0].place}"
    if chance[4]:
        joint = " on " if rng.random() < 0.8 else ", "
        text += joint + with_article(ground_words(scene, bool(chance[1])))
    if scene.style == "drawing" and rng.random() < 0.7:
        return f"a drawing of {text}"
    return (f"a photo of {text}" if scene.style == "photo" else f"a picture of {text}") if chance[5] else text


def _fragment(scene, rng):
    """A few words, or one, that hold for the scene; half of the time the noun phrases of its things.

    They name all things or none: words for one of two would teach that "red star" may mean one star more.
    """
    if rng.random() < 0.5:
        phrases = [thing_words(thing, *(rng.random(3) < (0.4, 0.5, 0.9))) for thing in scene.things]
        phrases = [with_article(phrase) for phrase in phrases] if rng.random() < 0.6 else phrases
        return (" and " if rng.random() < 0.7 else ", ").join(phrases)
    options = [f"{scene.ground} ground", with_article(ground_words(scene)), scene.style, with_article(scene.style)]
    options += ["tiled ground", "tiled"] if scene.ground_pattern == "tiled" else []
    if len(scene.things) > 1:
        kinds = [thing.kind for thing in scene.things]
        options += ["two things", " and ".join(kinds), " and ".join(map(with_article, kinds))]
        return options[rng.integers(len(options))]
    (thing,) = scene.things
    options += [
        thing.kind, with_article(thing.kind), thing.colour, f"{thing.colour} {thing.kind}",
        with_article(f"{thing.colour} {thing.kind}"), f"{thing.kind}, {thing.colour}", thing_words(thing),
        with_article(thing_words(thing)), f"{thing.colour} {thing.kind}, {scene.ground} ground",
        f"{thing.kind} {thing.place}", thing.place,
    ]
    options += [thing.pattern, f"{thing.pattern} {thing.kind}"] if thing.pattern != "plain" else []
    options += [thing.size, f"{thing.size} {thing.kind}"] if thing.size != "medium" else []
    return options[rng.integers(len(options))]


def draw_caption(scene, rng):
    """A caption in a random form: 10 % empty, 35 % whole, 20 % partial, 35 % fragments."""
    u = rng.random()
    if u < EMPTY:
        return ""
    if u < EMPTY + 0.35:
        return sentence(scene, place=bool(rng.random() < 0.35))
    return _partial(scene, rng) if u < 0.65 else _fragment(scene, rng)


def vocabulary(seeds=4000):
    """Every caption text that the forms above can make of many scenes (to find the tokens in use)."""
    from .scenes import random_scene

    rng = np.random.default_rng(0)
    return sorted({draw_caption(random_scene(seed), rng) for seed in range(seeds) for _ in range(4)})
