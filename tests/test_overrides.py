"""Embeddings that an inversion prescribes: negative-prompt inversion, and the places that per-step embeddings go to."""
import functools
from dataclasses import replace

import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, NegativePromptInversion
from comfyui_ledits.nodes.sampling import LeditsSamplerNode
from oracles import diffusion
from support import runs, tiny
from support.runs import EMPTY, RESIMULATED, SOURCE, TARGET, invert, model, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")
KINDS = ["sd1", "sd2", "sdxl", "sdxl_v"]
close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


def edit_node(kind, inversion, cfg=7.5, prompt=TARGET, **inputs):
    return runs.edit_node(kind, inversion, cfg=cfg, prompt=prompt, **inputs)


def edit(kind, inversion, **inputs):
    return edit_node(kind, inversion, **inputs)[0]["samples"]


def slerp(low, high, share):
    """From the reference code of proximal guidance, for one vector."""
    omega = torch.acos((low / low.norm() * high / high.norm()).sum())
    return (torch.sin((1 - share) * omega) * low + torch.sin(share * omega) * high) / torch.sin(omega)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_negative_prompt_inversion_is_a_plain_loop_with_the_source_as_negative(kind, share):
    latent, timesteps = tiny.latent(kind), diffusion.ddim_uniform(10)
    inversion = invert(NegativePromptInversion, kind, latent, interpolation=share)[0]
    source, empty, target = prompts(kind, SOURCE, EMPTY, TARGET)
    words = slerp(source[0][0].double(), empty[0][0].double(), share).float() if 0 < share < 1 else None
    negative = [[words, {}]] if words is not None else [source, empty][int(share)]
    x = inversion.latents[0].double() * diffusion.abar(timesteps[0]).sqrt()
    for t, p in zip(timesteps, timesteps[1:]):
        x = diffusion.step(x, diffusion.guided(model(kind), target, negative, 7.5)(x, t), t, p, eta=0.0)[0]
    edited = edit(kind, inversion)
    close(edited, tiny.KINDS[kind][0].latent_format().process_out(x).float())
    plain = edit(kind, replace(inversion, overrides={}))
    assert torch.allclose(edited, plain, atol=1e-3) == (share == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_ddim_inversion_edited_with_the_source_as_negative(kind):
    latent = tiny.latent(kind, 2)
    inversion = invert(NegativePromptInversion, kind, latent)[0]
    plain = invert(DDIMInversion, kind, latent)[0]
    assert torch.equal(inversion.latents, plain.latents)
    assert inversion.overrides.keys() == {"negative"} | ({"negative_pooled"} if kind.startswith("sdxl") else set())
    expected = edit(kind, plain, negative=SOURCE)
    assert torch.equal(edit(kind, inversion), expected)
    assert not torch.allclose(edit(kind, plain), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_source_prompt_follows_the_path_of_guidance_1_at_any_cfg_with_one_row_a_step(kind):
    latent = tiny.latent(kind)
    inversion = invert(NegativePromptInversion, kind, latent)[0]
    with tiny.Calls(model(kind)) as calls:
        output = edit_node(kind, inversion, prompt=SOURCE)
    assert calls.rows == output.ui["ledits"][0]["unet_rows"] == 10
    plain = edit(kind, replace(inversion, overrides={}), cfg=1.0, prompt=SOURCE)
    close(output[0]["samples"], plain, atol=1e-4)
    again = invert(NegativePromptInversion, kind, latent, path=RESIMULATED)[0]
    close(model(kind).model.process_latent_out(again.latents[-1]), plain, atol=1e-4)


def test_equal_prompts_are_evaluated_twice_where_the_inversion_makes_them_differ():
    inversion = invert(NegativePromptInversion, "sd1")[0]
    with tiny.Calls(model("sd1")) as calls:
        output = edit_node("sd1", inversion, negative=TARGET)
    assert calls.rows == output.ui["ledits"][0]["unet_rows"] == 20
    assert torch.equal(output[0]["samples"], edit("sd1", inversion))


def test_one_evaluation_serves_both_in_just_the_steps_where_they_are_equal():
    pair = prompts("sd1", TARGET, EMPTY)
    words = random(5, 1, 77, tiny.CONTEXT)
    words[0] = words[3] = pair[0][0][0]
    inversion = prescribing("sd1", negative=words)
    with tiny.Calls(model("sd1")) as calls:
        edit("sd1", inversion, pair=pair)
    assert [sum(len(t) for t, _ in step) for step in _by_step(calls.calls)] == [1, 2, 2, 1, 2]


@pytest.mark.parametrize("pair", ["two entries", "other length"])
def test_prompts_that_cannot_stand_in_for_each_other_are_refused(pair):
    source, empty = prompts("sd1", SOURCE, EMPTY)
    if pair == "two entries":
        pair, share, word = [source + empty, empty], 0.0, "plain prompt"
    else:
        pair, share, word = [tiny.conditioning("sd1", SOURCE, tokens=154), empty], 0.5, "interpolation to 0"
    with pytest.raises(ValueError, match=word):
        invert(NegativePromptInversion, "sd1", interpolation=share, pair=pair)


# --- per-step embeddings --------------------------------------------------------------------------------------------

def prescribing(kind, batch=1, **overrides):
    return replace(invert(DDIMInversion, kind, batch=batch, steps=5)[0], overrides=overrides)


def random(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(inversion, guider, skip=0):
    sampler, sigmas = LeditsSamplerNode.execute(inversion=inversion, skip=skip).result
    x_T = {"samples": torch.zeros(inversion.batch, 4, 8, 8)}
    return runs.in_parts(guider, sampler, sigmas, x_T)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("own", ["one for all", "one for each picture"])
@pytest.mark.parametrize("guider", ["LEDITS", "core"])
def test_each_step_sees_its_own_negative_and_the_guider_keeps_none_of_them(guider, own, skip):
    words = random(5, 1 if own == "one for all" else 2, 77, tiny.CONTEXT)
    inversion, pair = prescribing("sd1", 2, negative=words), prompts("sd1", TARGET, EMPTY)
    before = pair[1][0][0].clone()
    core = CFGGuider.execute(model=model("sd1"), positive=pair[0], negative=pair[1], cfg=7.5)[0]
    guider = core if guider == "core" else None
    with tiny.Calls(model("sd1")) as calls:
        if guider is None:
            edit("sd1", inversion, pair=pair, skip=skip)
        else:
            run(inversion, guider, skip)
    seen = [torch.cat([c for _, c in group]) for group in _by_step(calls.calls)]
    assert len(seen) == 5 - skip
    for i, rows in enumerate(seen):
        wanted = [*words[skip + i].expand(2, -1, -1), *pair[0][0][0].expand(2, -1, -1)]
        assert len(rows) == 4
        assert all(any(torch.equal(row, w) for row in rows) for w in wanted)
    assert torch.equal(pair[1][0][0], before)
    if guider is not None:  # the next run, on a path without any, sees the negative again
        with tiny.Calls(model("sd1")) as calls:
            run(replace(inversion, overrides={}), guider)
        assert len(calls.rows_of(pair[1])) == 10


def _by_step(calls):
    """Calls of one noise level together."""
    steps = {}
    for timesteps, words in calls:
        steps.setdefault(float(timesteps[0]), []).append((timesteps, words))
    return list(steps.values())


def test_a_guider_without_a_negative_runs_without():
    inversion = prescribing("sd1", negative=random(5, 1, 77, tiny.CONTEXT))
    guider = BasicGuider.execute(model=model("sd1"), conditioning=prompts("sd1", TARGET)[0])[0]
    assert torch.equal(run(inversion, guider), run(replace(inversion, overrides={}), guider))


def test_the_pooled_negative_is_seen_and_sizes_are_kept():
    pooled, latent = random(1, tiny.POOLED), tiny.latent("sdxl")
    pair = [tiny.conditioning("sdxl", seed, width=256, height=128, crop_w=8) for seed in (TARGET, EMPTY)]
    by_hand = [[pair[1][0][0], {**pair[1][0][1], "pooled_output": pooled}]]
    plain = invert(DDIMInversion, "sdxl", latent)[0]
    results = [edit("sdxl", inversion, pair=(pair[0], negative))
               for negative, inversion in [(by_hand, plain), (pair[1], replace(plain, overrides={"negative_pooled": pooled})),
                                           (pair[1], plain)]]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


class Projections:
    """What `to_k` and `to_v` of every cross-attention are fed: lists of [rows, tokens, CONTEXT]."""

    def __init__(self, network):
        self.keys, self.values, self.handles = [], [], []
        for name, module in network.named_modules():
            for end, seen in (("attn2.to_k", self.keys), ("attn2.to_v", self.values)):
                if name.endswith(end):
                    self.handles.append(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("tau", "changed"), [(1.0, 5), (0.4, 2), (0.0, 0)])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_values_change_to_v_of_the_positive_alone_while_tau_v_lasts(kind, tau, changed):
    value, pair = random(5, 1, 2, 77, tiny.CONTEXT), prompts(kind, TARGET, EMPTY)
    inversion = prescribing(kind, 2, value=value)
    inversion = replace(inversion, settings={**inversion.settings, "tau_v": tau})
    with Projections(model(kind).model.diffusion_model) as seen:
        edit(kind, inversion, pair=pair)
    layers = len(seen.keys) // 5
    assert len(seen.keys) == len(seen.values) == 5 * layers > 0
    positive, negative = (c[0][0][0] for c in pair)
    for n, (keys, values) in enumerate(zip(seen.keys, seen.values)):
        i = n // layers
        modulated = positive * value[i, 0, 0] + value[i, 0, 1] if i < changed else positive
        assert len(keys) == len(values) == 4
        for key, val in zip(keys, values):
            assert torch.equal(key, positive) or torch.equal(key, negative)
            close(val, modulated if torch.equal(key, positive) else negative, rtol=0, atol=1e-5)


def test_equal_prompts_are_evaluated_twice_where_values_differ():
    value = torch.stack([torch.ones(5, 1, 77, tiny.CONTEXT), torch.ones(5, 1, 77, tiny.CONTEXT)], 2)
    inversion = prescribing("sd1", value=value)
    with tiny.Calls(model("sd1")) as calls:
        edit("sd1", inversion, negative=TARGET)
    assert calls.rows == 10


@pytest.mark.parametrize(("overrides", "word"), [({"key": torch.zeros(1)}, "'key'"),
                                                 ({"value": torch.zeros(5, 1, 2, 50, tiny.CONTEXT)}, "50 tokens")])
def test_what_cannot_be_applied_is_refused_before_the_model_runs(overrides, word):
    inversion = prescribing("sd1", **overrides)
    with tiny.Calls(model("sd1")) as calls, pytest.raises(ValueError, match=word):
        edit("sd1", inversion)
    assert not calls.calls
