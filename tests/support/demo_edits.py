"""Edits of demo pictures whose truth is known: what is asked, prompts of many pictures at once, and how an edit is judged."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from comfyui_ledits.attention_hooks.text.prompts import EditPrompts, edit_prompts
from comfyui_ledits.demo import captions, pictures, scenes
from comfyui_ledits.nodes.attention import PromptToPromptNode
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion
from comfyui_ledits.tools import measure
from comfyui_ledits.tools.benchmarks import demobench_truth

from support import runs
from support.demo_nodes import DemoNodes, draw, held_out

STEPS, CFG = 50, 3.0


@dataclass(frozen=True)
class Task:
    """A scene, the one that the edit asks for, and how prompts put them into words."""

    scene: scenes.Scene
    asked: scenes.Scene
    words: Callable = captions.sentence

    @functools.cached_property
    def drawn(self):
        return draw(self.scene)

    @property
    def picture(self):
        return self.drawn[0]

    @property
    def mask(self):
        return self.drawn[1]

    @property
    def texts(self):
        return self.words(self.scene), self.words(self.asked)

    @property
    def kinds(self):
        return {s.things[0].kind for s in (self.scene, self.asked)}


def changed(scene, **fields):
    """The scene with other fields of its thing."""
    return replace(scene, things=(replace(scene.things[0], **fields),))


def recoloured(scene, rng):
    return pictures.recoloured(scene, pictures.other_colour(scene, rng))


def reshaped(scene, rng):
    return changed(scene, kind=str(rng.choice([k for k in scenes.KINDS if k != scene.things[0].kind])))


def moved(scene, rng):
    return changed(scene, place=str(rng.choice([p for p in scenes.PLACES if p != scene.things[0].place])))


def another_ground(scene, rng):
    taken = {scene.ground, scene.things[0].colour}
    return replace(scene, ground=str(rng.choice([g for g in scenes.GROUNDS if g not in taken])))


def without_place(scene):
    return captions.sentence(scene, place=False)


def without_look(scene):
    thing = scene.things[0]
    return f"{captions.with_article(thing.kind)} {thing.place} on {captions.with_article(captions.ground_words(scene))}"


def tasks(change, words=captions.sentence, count=60, **fixed):
    return [Task(s, change(s, np.random.default_rng(s.seed)), words) for s in held_out(count, **fixed)]


class Editor(DemoNodes):
    """Edits many pictures at once: prompts of like words share one alignment."""

    def groups(self, tasks):
        """(indices, EditPrompts for all of them) of tasks whose prompts have the same words at the same positions."""
        made, encoded = {}, [edit_prompts(self.clip, *task.texts) for task in tasks]
        for i, (task, own) in enumerate(zip(tasks, encoded)):
            key = [tuple(w.positions for w in tokens.words) for tokens in (own.source_tokens, own.target_tokens)]
            key += [tokens.search(kind) for tokens in (own.source_tokens, own.target_tokens) for kind in scenes.KINDS
                    if kind in task.kinds and tokens.search(kind)]
            made.setdefault(str(key), []).append(i)
        for members in made.values():
            first = encoded[members[0]]
            for i in members:
                assert torch.equal(encoded[i].alignment.matrix, first.alignment.matrix)
            both = [_together([getattr(encoded[i], side) for i in members]) for side in ("source", "target")]
            yield members, EditPrompts(
                source=both[0], target=both[1], source_tokens=first.source_tokens, target_tokens=first.target_tokens,
                alignment=first.alignment)

    def path(self, prompts, latent, first, direct, cfg):
        """The inversion of some pictures.

        Args:
            first: number of the first of them.
        """
        invert = functools.partial(runs.invert, latent=latent, pair=(prompts.source, self.empty(latent)), on=self.model, steps=STEPS)
        again = {"path": "re-simulated", "edit_cfg": cfg}
        return (invert(DirectInversion) if direct else invert(DDIMInversion, path=again))[0]

    def empty(self, latent):
        return self.prompts([""] * len(latent["samples"]))

    def run(self, tasks, controls=None, direct=True, cfg=CFG, skip=0):
        """Edited pictures.

        Args:
            controls: `(prompts, task) -> tuple of controls`; the task is the first of those that share them.
        """
        out = [None] * len(tasks)
        for members, prompts in self.groups(tasks):
            latent = self.encode([tasks[i].picture for i in members])
            inversion = self.path(prompts, latent, members[0], direct, cfg)
            attention = controls and controls(prompts, tasks[members[0]])
            edited = runs.edit("demo", inversion, pair=(prompts.target, self.empty(latent)), on=self.model, cfg=cfg, skip=skip,
                               attention=attention)
            for i, picture in zip(members, self.decode(edited)):
                out[i] = picture
        return out


def p2p(cross, own, blend=False, node=PromptToPromptNode, **more):
    def controls(prompts, task):
        words = {"blend_words": ", ".join(sorted(task.kinds))} if blend else {}
        return node.execute(prompts=prompts, cross_replace_steps=cross, self_replace_steps=own, **more, **words)[0]

    return controls


def kept(task, edited):
    """PSNR outside the source's object, and where a kind changes outside the asked-for object too."""
    masks = np.stack([task.mask, draw(task.asked)[1]])
    return measure.psnr(task.picture, edited, measure.outside(masks))


def right(task, edited, what):
    if what == "colour":
        return measure.has_colour(edited, task.mask, task.asked.things[0].colour)
    found = measure.read(edited).things
    return len(found) == 1 and found[0].kind == task.asked.things[0].kind


def table(title, rows):
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:24} " + "  ".join(f"{k} {v:.3f}" if v < 2 else f"{k} {v:.2f}" for k, v in values.items()))


def in_its_place(task, edited):
    """Whether a thing of the asked-for kind lies where the source's was, as Demo-Bench judges it (overlap of 0.4)."""
    found = demobench_truth.at(measure.read(edited), draw(task.asked)[1])
    return found is not None and found.kind == task.asked.things[0].kind


def _together(conditionings):
    """One CONDITIONING of many, each of one row."""
    words, pooled = (torch.cat([c[0][0] for c in conditionings]), [c[0][1].get("pooled_output") for c in conditionings])
    return [[words, {} if pooled[0] is None else {"pooled_output": torch.cat(pooled)}]]
