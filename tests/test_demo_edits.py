"""What LEDITS promises, measured on held-out demo pictures with the demo model: edits hit the object and spare the rest.

The pictures hold one thing each, of any pattern, size, place, ground and style. Settings were chosen on other pictures
(seeds from 970,000 on); the objects' masks are used for measuring only. Run with -s to read the numbers. The drawn world
itself was changed after fragments had failed in an earlier one (demo/README.md), and the scales were lowered after those from
0.5 to 3 had failed on these pictures (0.935, 0.992, 0.991, 0.990, 0.985: saturated).
LEDITS_DEMO_WEIGHTS names other weights than the pack's, LEDITS_DEMO_PICTURES a smaller number of pictures.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from comfyui_ledits.demo import captions, pictures, scenes
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.nodes.sampling import LeditsKSampler
from comfyui_ledits.nodes.semantic_concept import SemanticConcept
from comfyui_ledits.tools import measure
from support.demo_nodes import DemoNodes, draw, held_out

pytestmark = pytest.mark.demo

COUNT, AT_ONCE = 60, 20
STEPS, SKIP = 50, 18
TARGET_SKIP, TARGET_CFG = 26, 3.0
CONCEPT = {"direction": "towards", "scale": 3.0, "threshold": 0.8, "warmup": 2, "cooldown": 0, "momentum_scale": 0.3,
           "momentum_beta": 0.6, "weight": 1.0}
SCALES, SCALE_PICTURES = (0.1, 0.2, 0.3, 0.4, 0.5), 20


@dataclass(frozen=True)
class Task:
    """A picture and the colour that its thing is to get."""

    scene: scenes.Scene
    colour: str
    picture: np.ndarray
    mask: np.ndarray

    @property
    def caption(self):
        return captions.sentence(self.scene)

    @property
    def target(self):
        return captions.sentence(pictures.recoloured(self.scene, self.colour))

    @property
    def fragment(self):
        return f"{self.colour} {self.scene.things[0].kind}"

    @property
    def placed(self):
        return f"{captions.with_article(self.fragment)} {self.scene.things[0].place}"


def make_tasks(count=COUNT, **where):
    return [
        Task(scene, pictures.other_colour(scene, np.random.default_rng(scene.seed)), *draw(scene))
        for scene in held_out(count, **where)
    ]


class Editor(DemoNodes):
    """LEDITS on many pictures at once."""

    def __init__(self):
        super().__init__()
        self._inversions = {}

    def inversion(self, tasks, number, sources):
        """The path of a group of pictures, inverted with cfg 1; picture `number + b` has noise seed `number + b`."""
        key = (number, tuple(sources))
        if key not in self._inversions:
            latent = self.encode([t.picture for t in tasks])
            self._inversions[key] = EditFriendlyInversion.execute(
                model=self.model, positive=self.prompts(sources), negative=self.prompts([""]), latent=latent,
                    cfg=1.0, steps=STEPS, scheduler="ddim_uniform", eta=1.0, seed=number
            ).result[0]
        return self._inversions[key]

    def edit(self, tasks, source, positive, cfg, concept=None, skip=SKIP, at_once=AT_ONCE, **settings):
        """Edited pictures, float32 [H, W, 3]; `source`, `positive` and `concept` give a task's words."""
        edited = []
        for start in range(0, len(tasks), at_once):
            group = tasks[start : start + at_once]
            inversion = self.inversion(group, start, [source(t) for t in group])
            concepts = None
            if concept is not None:
                words = self.prompts([concept(t) for t in group])
                concepts = SemanticConcept.execute(prompt="", conditioning=words, **CONCEPT | settings).result[0]
            latent = LeditsKSampler.execute(
                model=self.model,
                positive=self.prompts([positive(t) for t in group]),
                negative=self.prompts([""]),
                inversion=inversion,
                cfg=cfg,
                skip=skip,
                concepts=concepts,
            ).result[0]
            edited += self.decode(latent["samples"])
        return edited


def nothing(task):
    return ""


def verdict(tasks, edited):
    """Share of objects that have the colour asked for, and mean PSNR outside the object's mask against the picture."""
    right = [measure.has_colour(p, t.mask, t.colour) for t, p in zip(tasks, edited)]
    kept = [measure.psnr(t.picture, p, measure.outside(t.mask[None])) for t, p in zip(tasks, edited)]
    return float(np.mean(right)), float(np.mean(kept))


def told(name, share, psnr):
    print(f"\n{name}: the asked-for colour in {100 * share:.1f} %, {psnr:.2f} dB outside the object")


@pytest.fixture(scope="module")
def editor():
    with torch.inference_mode():  # as ComfyUI runs nodes
        yield Editor()


@pytest.fixture(scope="module")
def tasks():
    return make_tasks()


def test_nothing_asked_gives_the_picture_back(editor, tasks):
    """The measure's own limits: what the autoencoder alone does, and that no object passes unedited."""
    some = tasks[:AT_ONCE]
    back = editor.edit(some, nothing, nothing, 1.0, skip=0)
    rebuilt = editor.decode(editor.encode([t.picture for t in some])["samples"])
    assert max(np.abs(a - b).max() for a, b in zip(back, rebuilt)) < 1e-3
    share, psnr = verdict(some, back)
    told("no edit", share, psnr)
    assert share == 0 and psnr >= 28


def test_target_sentence(editor, tasks):
    edited = editor.edit(tasks, lambda t: t.caption, lambda t: t.target, TARGET_CFG, skip=TARGET_SKIP)
    share, psnr = verdict(tasks, edited)
    told(f"target sentence, cfg {TARGET_CFG}", share, psnr)
    assert share >= 0.80 and psnr >= 26


@pytest.mark.parametrize(
    ("form", "threshold"),
    [
        ("target", 0.9),  # "a yellow star on the left on a blue ground"
        ("placed", 0.9),  # "a yellow star on the left"
        ("fragment", 0.9),  # "yellow star"
    ],
)
def test_concept_alone(editor, tasks, form, threshold):
    edited = editor.edit(tasks, nothing, nothing, 1.0, lambda t: getattr(t, form), threshold=threshold)
    share, psnr = verdict(tasks, edited)
    told(f"concept alone, {'sentence' if form == 'target' else form}", share, psnr)
    assert share >= 0.80 and psnr >= 24


def test_more_scale_gives_more_of_the_concept(editor, tasks):
    some, shares = tasks[:SCALE_PICTURES], []
    for scale in SCALES:
        edited = editor.edit(some, nothing, nothing, 1.0, lambda t: t.target, scale=scale)
        shares.append(np.mean([measure.colour_shares(p, t.mask)[t.colour] for t, p in zip(some, edited)]))
    print("\nshare of the object that has the concept's colour:",
          ", ".join(f"{share:.3f} at scale {scale}" for scale, share in zip(SCALES, shares)))
    assert np.all(np.diff(shares) > 0), shares


def test_every_picture_of_a_batch_has_its_own_prompt(editor, tasks):
    """That the batches above are what single runs would give."""
    words = (lambda t: t.caption), (lambda t: t.target)
    together = editor.edit(tasks[:3], *words, TARGET_CFG)
    first = editor.edit(tasks[:1], *words, TARGET_CFG)[0]
    assert np.abs(together[0] - first).max() < 5e-3
    swapped = editor.edit(tasks[:3], words[0], lambda t: tasks[1].target, TARGET_CFG)
    assert np.abs(together[1] - swapped[1]).max() < 5e-3 < np.abs(together[0] - swapped[0]).max()
