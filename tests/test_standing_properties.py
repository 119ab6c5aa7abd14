"""Whatever is chosen: the same prompt both ways gives the picture back, an edit is finite, nothing stays on the model; or a
sentence says what cannot be.

Choices are hypothesis': the same ones every time, so that a failure can be had again.
"""
import collections

import comfy.samplers
import pytest
import torch
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.samplers.ledits import SOLVERS
from comfyui_ledits.samplers.methods.sega import Concept
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from support import chain_parts, editing, runs, tiny, tiny_flow
from test_no_trace import everything, sample, user_s_model

pytestmark = [pytest.mark.standing, pytest.mark.usefixtures("inference_mode")]
KINDS = [*tiny.KINDS, *tiny_flow.KINDS]
KINDS.remove("flow")  # a U-Net that no checkpoint has
SIZES = some.integers(3, 12)


def examples(count):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck))


def sentence(error):
    said = str(error)
    assert len(said) > 30 and said.rstrip().endswith((".", ")")), said
    return said


def close(cfg):
    """How exactly a picture comes back, in units of its standard deviation: guidance enlarges rounding at every step."""
    return 2e-4 if cfg <= 3.5 else 5e-3


@pytest.mark.parametrize("replay", ["edit-friendly", "noise maps", "input shift"])
def test_the_same_prompt_and_cfg_give_the_picture_back(unsettled, replay):
    ended = collections.Counter()

    @examples(70)
    @given(kind=some.sampled_from(KINDS), scheduler=some.sampled_from(comfy.samplers.SCHEDULER_NAMES), steps=some.integers(1, 12),
           skip=some.floats(0, 1), cfg=some.sampled_from([1.0, 1.7, 3.5]), batch=some.integers(1, 3), height=SIZES, width=SIZES,
           eta=some.sampled_from([0.0, 0.4, 1.0]), seed=some.integers(0, 2**64 - 1), solver=some.sampled_from(SOLVERS))
    def comes_back(kind, scheduler, steps, skip, cfg, batch, height, width, eta, seed, solver):
        if kind == "hunyuan":  # the network that no odd size fits, under core's samplers either
            height, width = height + height % 2, width + width % 2
        latent = runs.parts_of(kind).latent(kind, batch, height, width)
        try:
            if replay == "edit-friendly":
                inversion = runs.invert(EditFriendlyInversion, kind, latent, cfg=cfg, scheduler=scheduler, steps=steps, eta=eta,
                                        seed=seed)[0]
            else:
                cfg, solver = 1.0, "ddpm"
                inversion = runs.invert(DDIMInversion, kind, latent, scheduler=scheduler, steps=steps, replay=replay)[0]
        except ValueError as error:
            ended["refused"] += 1
            assert any(word in sentence(error) for word in ("scheduler", "SIGMAS")), error
            return
        samples = runs.edit(kind, inversion, cfg=cfg, skip=int(skip * (inversion.steps - 1)), solver=solver)
        assert samples.isfinite().all() and samples.shape == latent["samples"].shape
        assert runs.error(kind, samples, latent) < close(cfg)
        ended["back"] += 1

    comes_back()
    assert ended["back"] > 3 * ended["refused"]


def test_an_edit_of_anything_is_finite_or_refused_and_leaves_nothing():
    """Chains of controls and concepts, in any order and number, on a model that has patches of other packs already."""
    model, ended = user_s_model(), collections.Counter()
    expected, before = sample(model), everything(model)
    parts = {batch: chain_parts.plain(model, batch) for batch in (1, 2)}

    @examples(60)
    @given(chain=some.lists(some.sampled_from(chain_parts.CONTROLS), max_size=4), batch=some.integers(1, 2),
           concepts=some.lists(some.tuples(some.integers(4, 9), some.floats(-20, 20), some.floats(0, 1), some.integers(0, 3)),
                               max_size=3),
           cfg=some.floats(0, 15), skip=some.integers(0, chain_parts.STEPS), masked=some.booleans())
    def runs_or_says_why(chain, batch, concepts, cfg, skip, masked):
        scene, more = parts[batch], {}
        if chain:
            more["attention"] = tuple(control for name in chain for control in chain_parts.attention(name))
        if concepts:
            more["concepts"] = tuple(
                Concept(conditioning=tiny.conditioning(seed=seed), scale=scale, threshold=threshold, warmup=warmup)
                for seed, scale, threshold, warmup in concepts)
        try:
            out = runs.edit("sd1", scene.path, pair=(scene.positive, scene.negative), on=model, cfg=cfg, skip=skip,
                            mask=chain_parts.steps_mask() if masked else None, **more)
        except ValueError as error:
            sentence(error)
            ended["refused"] += 1
        else:
            assert out.isfinite().all() and len(out) == batch
            ended["edited"] += 1
        assert everything(model) == before

    runs_or_says_why()
    assert torch.equal(sample(model), expected)
    assert ended["edited"] > 15 and ended["refused"] > 3


def test_controls_of_equal_prompts_change_nothing(unsettled):
    """What is read of the source is what the target has there already, in whatever chain and window."""
    words = editing.prompts("sd1", "a cat sits on a sofa", "a cat sits on a sofa")
    empty = editing.negative("sd1")
    window = some.tuples(some.floats(0, 0.6), some.floats(0.3, 1)).map(sorted).filter(lambda w: w[0] < w[1]).map(tuple)
    controls = some.one_of(
        some.builds(lambda c, s: PromptToPrompt(prompts=words, cross=c, self_=s), window, window),
        some.builds(lambda w: MasaCtrl(prompts=words, window=w, blocks="output.1-"), window),
        some.builds(lambda f, a: PlugAndPlay(prompts=words, features=f, attention=a, feature_blocks="output.1.0",
                                             attention_blocks="output.1-"), window, window))
    ended = collections.Counter()

    @examples(40)
    @given(chain=some.lists(controls, max_size=2), cfg=some.sampled_from([1.0, 2.0, 3.5]), batch=some.integers(1, 2),
           height=some.integers(8, 13), width=some.integers(8, 13), direct=some.booleans(), skip=some.integers(0, 4))
    def nothing_changes(chain, cfg, batch, height, width, direct, skip):
        latent = tiny.latent("sd1", batch, height, width)
        pair = words.source, empty
        if any(isinstance(control, PlugAndPlay) for control in chain):
            cfg = 1.0  # at more the negative takes from the source too, and is another prompt
        if direct:
            cfg = 1.0
            inversion = runs.invert(DirectInversion, "sd1", latent, pair=pair, steps=6)[0]
        else:
            inversion = runs.invert(EditFriendlyInversion, "sd1", latent, pair=pair, steps=6, cfg=cfg)[0]
        common = {"pair": (words.target, empty), "cfg": cfg, "skip": skip}
        plain = runs.edit("sd1", inversion, **common)
        try:
            out = runs.edit("sd1", inversion, attention=tuple(chain) or None, **common)
        except ValueError as error:
            sentence(error)
            ended["refused"] += 1
            return
        assert out.isfinite().all()
        ended["edited"] += 1
        if not direct:  # whose path its own steps do not follow, while the source's attention is of the path
            assert runs.error("sd1", plain, latent) < close(cfg)
            assert runs.error("sd1", out, latent) < 5 * close(cfg)

    nothing_changes()
    assert ended["edited"] > 15
