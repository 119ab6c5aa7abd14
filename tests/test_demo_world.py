"""The drawn world: what its colours promise to edits that do not say where."""

import itertools

import numpy as np
import pytest
import torch
from comfyui_ledits.demo import loader, scenes

SEED = 11  # of light and noise


@pytest.fixture(scope="module")
def encode():
    vae = loader.load()[2]

    def encode(picture):
        with torch.inference_mode():
            return vae.encode(torch.from_numpy(picture)[None])[0].float().numpy()

    return encode


def middle(encode, ground, things):
    """Mean latent [4] of the middle of a picture, where a big thing is, or nothing but ground."""
    picture, _ = scenes.render(scenes.Scene(things, ground, seed=SEED))
    return encode(picture)[:, 6:10, 6:10].mean((1, 2))


@pytest.mark.parametrize("ground", scenes.GROUNDS)
def test_noise_hides_a_colour_in_its_place_more_easily_than_elsewhere(encode, ground):
    """Noise is isotropic: that it made a thing of latent b look like a (in its place) is likelier than that it made b
    vanish from the ground g somewhere else and a appear, where |a - b|^2 < |a - g|^2 + |b - g|^2, or (a - g).(b - g) > 0."""
    colours = [name for name in scenes.COLOURS if name != ground]
    empty = middle(encode, ground, ())
    off = {c: middle(encode, ground, (scenes.Thing("circle", c, radius=0.6),)) - empty for c in colours}
    products = {(a, b): float(np.dot(off[a], off[b])) for a, b in itertools.combinations(colours, 2)}
    lowest = min(products, key=products.get)
    assert products[lowest] > 0, (lowest, products[lowest])
