"""Every edit together with stock nodes and other packs' patches: both act, and the source sees only what is its own."""

import dataclasses
import functools

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from support import chain_parts, editing, runs, tiny
from support.chain_parts import CFG, CONTROLS, EDITS, LINKS, ON_TARGET, SIDE, Watch, linked, plain, scene

import nodes

# pix2pix-zero moves the latent instead of editing self-attention
ATTENDING = [name for name in CONTROLS if name != "pix2pix"]


def gap(a, b):
    """Largest difference of two LATENTs, in the model's own space."""
    return float((a - b).abs().max()) * tiny.scale()


@functools.cache
def alone(edit):
    """An edit with nothing connected, and its source pass."""
    parts = scene()
    with Watch(parts) as watch:
        out = parts.edit(edit)
    return out, watch.source()


@functools.cache
def plainly(link):
    """Neither concepts nor control, with a link or with none."""
    return scene(*filter(None, [link])).edit("plain")


@functools.cache
def predictions(link):
    """What the MODEL of a link answers to the source on its path, asked by core's guider: {timestep: answer}."""
    parts = scene(link)

    class Ask(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_, **__):
            for i in range(parts.path.steps):
                model_wrap(parts.path.latents[i], parts.path.sigmas[i].repeat(parts.path.batch), **extra_args)
            return noise

    guider = comfy.samplers.CFGGuider(parts.model)
    guider.set_conds(chain_parts.words().source, chain_parts.words().source)
    guider.set_cfg(1.0)
    picture = parts.path.latents[-1]
    with Watch(parts) as watch, torch.inference_mode():
        guider.sample(torch.zeros_like(picture), picture, Ask(), parts.path.sigmas, disable_pbar=True)
    return {key: answer for key, (answer, _) in watch.source().items()}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("edit", EDITS)
def test_both_act_and_the_source_is_left_alone(edit, link):
    parts, without = scene(link), plainly(link)
    counts = {kind: patch.rows for kind, patch in parts.notes.items()}
    with Watch(parts) as watch:
        both = parts.edit(edit)
    assert torch.isfinite(both).all()
    assert gap(both, alone(edit)[0]) > 1e-3
    assert gap(both, without) > 1e-3
    assert gap(parts.edit(edit, through="parts"), both) < 1e-4

    source, usual = watch.source(), alone(edit)[1]
    if edit == "concepts":
        assert not source
    else:
        assert source.keys() == usual.keys() and len(source) >= 3
        assert not any(controlled for _, controlled in source.values())
        expected = {key: answer for key, (answer, _) in usual.items()} if link in ON_TARGET else predictions(link)
        for key in source.keys() & expected.keys():
            assert torch.allclose(source[key][0], expected[key], atol=1e-4), key
        assert source.keys() & expected.keys()

    for kind, patch in parts.notes.items():
        layers = 1 if kind.endswith("replace") else 9
        # of MasaCtrl with masks inside and outside are two calls
        assert patch.rows - counts[kind] >= layers * len(watch.rows)


def test_a_control_net_is_on_the_target_s_rows_alone():
    parts = scene("control net")
    with Watch(parts) as watch:
        parts.edit("p2plus")
    rows = [controlled for *_, controlled in watch.rows]
    assert sum(rows) == 2 * 3 and len(rows) == 4 * 3  # steps after the skipped one


@pytest.mark.parametrize("edit", EDITS)
def test_a_lora_is_the_same_as_other_weights(edit):
    """Source and target see the model the user gave: `W + strength * up @ down`, whoever adds it."""
    with_loader = scene("lora").edit(edit)
    assert gap(plain(chain_parts.with_lora_in_its_weights(tiny.model())).edit(edit), with_loader) < 1e-4


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("link", [None, "control net", "masks", "pag"])
def test_pictures_of_a_batch_are_edited_as_each_alone(edit, link):
    links = [link] if link else []
    parts = scene(batch=2)
    whole = scene(*links, batch=2).edit(edit)
    for b in range(2):
        path = parts.path.with_parts(parts.path.latents[:, b : b + 1])
        one = linked(dataclasses.replace(parts, path=path), *links).edit(edit)
        assert gap(whole[b : b + 1], one) < 1e-4


# --- area and masked conditioning -----------------------------------------------------------------------------------

@pytest.mark.parametrize("edit", ATTENDING)
def test_an_area_s_own_rows_are_as_without_control(edit):
    parts, seen = scene("area"), []
    for name in ("plain", edit):
        with Watch(parts) as watch:
            parts.edit(name)
        first = max(t for t, *_ in watch.rows)
        seen.append([(x, c, o) for t, x, c, o, _ in watch.rows if t == first and x.shape[-1] == SIDE // 2])
    for prompt in (chain_parts.OTHER, parts.negative):  # the area's, and the negative beside it
        (x, o), (own_x, own_o) = (
            [(x, o) for x, c, o in rows if torch.equal(c, prompt[0][0][0])][0] for rows in seen
        )
        assert torch.allclose(x, own_x, atol=1e-6) and torch.allclose(o, own_o, atol=1e-5)


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_mask_or_area_of_everything_is_none(edit):
    parts = scene()
    size = SIDE * 8
    everywhere = [
        nodes.ConditioningSetMask().append(parts.positive, torch.ones(1, size, size), "default", 1.0)[0],
        nodes.ConditioningSetArea().append(parts.positive, size, size, 0, 0, 1.0)[0],
        nodes.ConditioningSetArea().append(parts.positive, 8 * size, 2 * size, 0, 0, 1.0)[0],
    ]
    for positive in everywhere:
        own = dataclasses.replace(parts, positive=positive)
        assert gap(own.edit(edit), alone(edit)[0]) < 1e-4


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_target_in_an_area_alone_is_refused(edit):
    parts = scene()
    areas = [
        nodes.ConditioningSetArea().append(parts.positive, SIDE * 4, SIDE * 8, 0, 0, 1.0)[0],
        nodes.ConditioningSetMask().append(parts.positive, chain_parts.left_half(), "mask bounds", 1.0)[0],
    ]
    for positive in areas:
        own = dataclasses.replace(parts, positive=positive)
        with Watch(own) as watch, pytest.raises(ValueError, match="limited to an area.*Set Mask"):
            own.edit(edit)
        assert not watch.rows


def in_an_area(parts, edit, **more):
    """An edit whose negative is limited to the left half."""
    negative, = nodes.ConditioningSetArea().append(parts.negative, SIDE * 4, SIDE * 8, 0, 0, 1.0)
    own = dataclasses.replace(parts, negative=negative)
    with Watch(own) as watch:
        return own.edit(edit), watch.rows


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_negative_in_an_area_leaves_the_target_s_edit_as_it_is(edit):
    """The positive's first prediction is that of an edit with a negative over the whole picture."""
    parts = scene()
    found, rows = in_an_area(parts, edit)
    assert torch.isfinite(found).all() and gap(found, in_an_area(parts, "plain")[0]) > 1e-3
    assert {x.shape[-1] for _, x, *_ in rows} == {SIDE, SIDE // 2}
    plainly, words = [], parts.positive[0][0][0]
    for given in (rows, watched(parts, edit)):
        first = max(t for t, *_ in given)
        plainly.append([o for t, x, c, o, _ in given if t == first and torch.equal(c, words)])
    for a, b in zip(*plainly):
        assert torch.allclose(a, b, atol=1e-4)


def watched(parts, edit):
    with Watch(parts) as watch:
        parts.edit(edit)
    return watch.rows


@pytest.mark.parametrize("name", ["masactrl", "pnp"])
def test_a_control_that_reads_a_negative_in_an_area_is_refused_by_its_name(name):
    """Without a source prompt the negative serves as the source."""
    parts = scene()
    own = dataclasses.replace(chain_parts.attention(name)[0], prompts=None)
    negative, = nodes.ConditioningSetArea().append(parts.negative, SIDE * 4, SIDE * 8, 0, 0, 1.0)
    with Watch(parts) as watch, pytest.raises(ValueError, match="negative conditioning is limited to an area.*Set Mask"):
        runs.edit("sd1", parts.path, pair=(parts.positive, negative), on=parts.model, cfg=CFG, attention=(own,))
    assert not watch.rows


# --- another pack's guidance and tokens -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_perturbed_attention_guidance_perturbs_edited_layers_too(kind):
    """D + scale * (D_c - D_perturbed): the perturbed prediction made by hand, with values in the place of attention."""
    model = tiny.model(kind)
    words, negative = editing.prompts(kind, chain_parts.SOURCE, chain_parts.TARGET), editing.negative(kind)
    path = editing.path(model, 3)
    control = [chain_parts.PromptToPrompt(prompts=words, cross=(0, 1), self_=(0, 1), self_blocks="middle")]
    scale = 2.0

    def by_hand(args):
        blocks = [b.attn1 for b in model.model.diffusion_model.middle_block[1].transformer_blocks]
        hooks, values = [], []
        for attn in blocks:
            hooks.append(attn.to_v.register_forward_hook(lambda m, a, out: values.append(out.clone())))
            hooks.append(attn.to_out[0].register_forward_pre_hook(lambda m, a: (values.pop(),)))
        try:
            perturbed, = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"])
        finally:
            for hook in hooks:
                hook.remove()
        return args["denoised"] + (args["cond_denoised"] - perturbed) * scale

    other = model.clone()
    other.set_model_sampler_post_cfg_function(by_hand)
    expected, _ = editing.run(other, path, words.target, negative, CFG, control)
    pag = PerturbedAttentionGuidance.execute(model=model, scale=scale)[0]
    got, _ = editing.run(pag, path, words.target, negative, CFG, control)
    without, _ = editing.run(model, path, words.target, negative, CFG, control)
    assert (got - expected).abs().max() < 1e-4
    assert (got - without).abs().max() > 1e-3


def test_perturbed_attention_guidance_does_not_move_the_local_blend():
    """Its prediction is not the edit's: with next to no weight it changes nothing."""
    parts = scene()
    own = dataclasses.replace(parts, model=PerturbedAttentionGuidance.execute(model=parts.model, scale=1e-9)[0])
    assert gap(own.edit("blend alone"), parts.edit("blend alone")) < 1e-4
    assert gap(parts.edit("blend alone"), plainly(None)) > 1e-3


@pytest.mark.parametrize("edit", ATTENDING)
def test_patches_that_tile_the_tokens_are_refused_with_a_sentence(edit):
    parts = scene()
    model = HyperTile.execute(model=parts.model, tile_size=32, swap_size=1, max_depth=3, scale_depth=False)[0]
    own = dataclasses.replace(parts, model=model)
    with pytest.raises(ValueError, match="HyperTile.*tokens.*[Bb]ypass"):
        own.edit(edit)


def coupled(model):
    """Attention couple: the words of two regions for every row, mixed afterwards."""
    own = model.clone()
    own.set_model_attn2_patch(lambda n, k, v, extra: (n.repeat(2, 1, 1), torch.cat([k, 1.1 * k]), torch.cat([v, 0.9 * v])))
    own.set_model_attn2_output_patch(lambda out, extra: sum(out.chunk(2)) / 2)
    return own


@pytest.mark.parametrize("edit", ATTENDING)
def test_regional_prompts_are_refused_as_what_they_are_or_left_to_act(edit):
    """A patch that changes the number of rows of cross-attention: controls of self-attention alone go with it."""
    parts = scene()
    own = dataclasses.replace(parts, model=coupled(parts.model))
    if edit in ("masactrl", "pnp"):
        assert gap(own.edit(edit), own.edit("plain")) > 1e-3 and gap(own.edit(edit), parts.edit(edit)) > 1e-3
        return
    with pytest.raises(ValueError, match="number of rows.*regional prompts.*[Bb]ypass"):
        own.edit(edit)


@pytest.mark.parametrize("edit", CONTROLS)
def test_a_cache_that_skips_the_u_net_is_refused_before_it_runs(edit):
    parts = scene()
    cached = EasyCacheNode.execute(model=parts.model, reuse_threshold=0.2, start_percent=0.0, end_percent=1.0,
                                   verbose=False)[0]
    own = dataclasses.replace(parts, model=cached)
    with Watch(own) as watch, pytest.raises(ValueError, match="EasyCache.*Bypass it"):
        own.edit(edit)
    assert not watch.rows


def test_a_source_that_does_not_run_is_refused_with_a_sentence():
    """What a pack's own cache does: the network is asked once, and its answer given again."""
    parts, known = scene(), []

    def remember(executor, *args, **kwargs):
        known[:] = known or [executor(*args, **kwargs)]
        return known[0][: len(args[0])]

    model = parts.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", remember)
    with pytest.raises(ValueError, match="could not be captured.*Bypass it"):
        dataclasses.replace(parts, model=model).edit("pnp")


# --- denoise masks --------------------------------------------------------------------------------------------------

def thresholds(path, start, model):
    """From which mask value on DifferentialDiffusion frees a place, at every level from `start` on (its own formula)."""
    t = model.get_model_object("model_sampling").timestep(path.sigmas[start:-1]).double()
    lowest = model.get_model_object("model_sampling").timestep(path.sigmas[-1:]).double()
    return [float(x) for x in (t - lowest) / (t[0] - lowest)]


@pytest.mark.parametrize("edit", ["plain", *EDITS])
def test_differential_diffusion_frees_places_step_by_step(edit):
    parts = scene("differential")
    steps, start = parts.path.steps, 1
    with Watch(parts) as watch:
        out = parts.edit(edit, start=start) * tiny.scale()
    mask, path = parts.mask[0], parts.path.latents
    sampling_ = parts.model.get_model_object("model_sampling")
    moments = set()
    for i, threshold in zip(range(start, steps), thresholds(parts.path, start, parts.model)):
        t = float(sampling_.timestep(parts.path.sigmas[i]))
        here = path[i, 0] / (parts.path.sigmas[i] ** 2 + 1).sqrt()
        target = [x for row_t, x, c, *_ in watch.rows if row_t == t and torch.equal(c, parts.positive[0][0][0])]
        assert target
        for value in (0.0, 0.5, 1.0):
            moved = [float((x - here)[:, mask == value].abs().amax()) for x in target]
            if value < threshold:
                assert max(moved) < 1e-5
            elif i > start:
                assert min(moved) > 1e-3
            moments.add((value, value >= threshold))
    assert {(0.5, False), (0.5, True)} <= moments
    held = mask < thresholds(parts.path, start, parts.model)[-1]
    assert held.any() and (~held).any()
    assert torch.allclose(out[0][:, held], path[-1, 0][:, held], atol=1e-5)
    assert (out[0] - path[-1, 0])[:, ~held].abs().amax() > 1e-3


def test_a_differential_mask_is_not_a_soft_mask():
    parts = scene("differential")
    soft = dataclasses.replace(scene(), mask=parts.mask)
    assert gap(soft.edit("plain"), parts.edit("plain")) > 1e-3
    # with next to no strength it is the mask as it is, in every step
    same = dataclasses.replace(soft, model=DifferentialDiffusion.execute(model=soft.model, strength=1e-9)[0])
    assert gap(same.edit("plain"), soft.edit("plain")) < 1e-4
