"""What other packs do around an edit: they wrap the network and its attention, look at rows and guidance, bring GUIDERs of
their own and read the fields of SAMPLERs. Each stand-in does what such packs do and changes nothing, so neither may it here.
"""
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch
from comfyui_ledits.nodes.sampling import LeditsSamplerNode
from comfyui_ledits.samplers.capture_sampler import CaptureSampler
from comfyui_ledits.samplers.ledits import LeditsSampler
from support import chain_parts, runs

pytestmark = pytest.mark.usefixtures("inference_mode")
EDITS = ("plain", *chain_parts.EDITS)
CLOSE = 1e-4


class Neighbour:
    """Something on a MODEL; `seen` holds what it was shown."""

    def __init__(self, model):
        self.model, self.seen = model.clone(), []


class Override(Neighbour):
    """As packs with an attention of their own do: it calls what was there before, or the function that it is given."""

    factor = 1.0

    def __init__(self, model):
        super().__init__(model)
        options = self.model.model_options.setdefault("transformer_options", {})
        self.before = options.get("optimized_attention_override")
        options["optimized_attention_override"] = self

    def __call__(self, func, *args, **kwargs):
        self.seen.append(len(args[0]))
        out = func(*args, **kwargs) if self.before is None else self.before(func, *args, **kwargs)
        return out * self.factor


class TwoOverrides(Override):
    def __init__(self, model):
        super().__init__(Override(model).model)


class Wrapper(Neighbour):
    """As caches and tilings do: it stands around the whole network and looks at the rows."""

    def __init__(self, model):
        super().__init__(model)
        self.model.set_model_unet_function_wrapper(self)

    def __call__(self, apply_model, args):
        rows = args["input"].shape[0]
        assert rows == args["timestep"].shape[0] and rows % len(args["cond_or_uncond"]) == 0
        assert set(args["cond_or_uncond"]) <= set(range(9))
        self.seen.append(rows)
        return apply_model(args["input"], args["timestep"], **args["c"])


class CfgFunction(Neighbour):
    """As RescaleCFG and dynamic thresholding do, with plain guidance: of `x - D`."""

    def __init__(self, model):
        super().__init__(model)
        self.model.set_model_sampler_cfg_function(self)

    def __call__(self, args):
        for name in ("cond", "uncond", "cond_denoised", "uncond_denoised", "input"):
            assert args[name].shape == args["input"].shape and args[name].isfinite().all()
        assert torch.equal(args["cond"], args["input"] - args["cond_denoised"])
        self.seen.append(len(args["input"]))
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])


class PreAndPostCfg(Neighbour):
    """As adaptive projection and the like do: before guidance and after it."""

    def __init__(self, model):
        super().__init__(model)
        self.model.set_model_sampler_pre_cfg_function(self.before)
        self.model.set_model_sampler_post_cfg_function(self.after)

    def before(self, args):
        cond, uncond = args["conds_out"]
        assert cond.shape == uncond.shape == args["input"].shape
        self.seen.append(len(cond))
        return args["conds_out"]

    def after(self, args):
        plain = args["uncond_denoised"] + args["cond_scale"] * (args["cond_denoised"] - args["uncond_denoised"])
        torch.testing.assert_close(args["denoised"], plain, rtol=1e-4, atol=1e-4)
        return args["denoised"]


NEIGHBOURS = (Override, TwoOverrides, Wrapper, CfgFunction, PreAndPostCfg)


def beside(neighbour, name, batch=1):
    """An edit with a neighbour and without: (latents, latents, neighbour)."""
    scene = chain_parts.scene(batch=batch)
    other = neighbour(scene.model)
    with_it = chain_parts.replace(scene, model=other.model).edit(name)
    return with_it, scene.edit(name), other


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda n: n.__name__)
def test_a_neighbour_that_changes_nothing_changes_nothing(neighbour, name, batch):
    with_it, without, other = beside(neighbour, name, batch)
    assert other.seen
    assert float((with_it - without).abs().max()) < CLOSE


@pytest.mark.parametrize("name", EDITS)
def test_an_attention_of_another_pack_acts(name):
    class Louder(Override):
        factor = 1.1

    with_it, without, _ = beside(Louder, name)
    assert float((with_it - without).abs().max()) > 100 * CLOSE


@pytest.mark.parametrize("name", EDITS)
def test_the_rows_that_a_wrapper_counts_are_those_that_the_node_tells(name):
    scene = chain_parts.scene(batch=2)
    other = Wrapper(scene.model)
    told = runs.edit_node("sd1", scene.path, pair=(scene.positive, scene.negative), on=other.model, cfg=chain_parts.CFG, skip=1,
                          **chain_parts.inputs(name)).ui["ledits"][0]["unet_rows"]
    backward = 2 * (scene.path.steps - 1) if name == "pix2pix" else 0  # counted as rows, seen by no wrapper
    assert sum(other.seen) == told - backward


# --- SAMPLERs and GUIDERs -----------------------------------------------------------------------------------------------

def test_the_fields_of_samplers_can_be_read_and_copied():
    """As Detail Daemon and its like do before anything runs."""
    path = chain_parts.plain().path
    for sampler in (LeditsSampler(path), CaptureSampler(path, tuple(chain_parts.attention("masactrl")))):
        copied = comfy.samplers.KSAMPLER(sampler.sampler_function, extra_options=dict(sampler.extra_options),
                                         inpaint_options=dict(sampler.inpaint_options))
        assert copied.extra_options == {} and callable(copied.sampler_function)
        assert isinstance(sampler.max_denoise(_Wrap(), path.sigmas), bool)


class _Wrap:
    class inner_model:
        class model_sampling:
            sigma_max = 10.0


class ThreeConds(comfy.samplers.CFGGuider):
    """A GUIDER of another pack: three conditionings in an order and under names of its own, the third without weight."""

    def __init__(self, model, positive, negative, other, cfg):
        super().__init__(model)
        self.inner_set_conds({"style": other, "negative": negative, "positive": positive})
        self.set_cfg(cfg)

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        conds = [self.conds[name] for name in ("style", "negative", "positive")]
        style, negative, positive = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return negative + self.cfg * (positive - negative) + 0.0 * style


def perp_neg(scene):
    """The negative as the empty prompt, no weight on what is left of it: plain guidance."""
    return perpneg.PerpNegGuider.execute(model=scene.model, positive=scene.positive, negative=scene.negative,
                                         empty_conditioning=scene.negative, cfg=chain_parts.CFG, neg_scale=0.0)[0]


def three(scene):
    return ThreeConds(scene.model, scene.positive, scene.negative, chain_parts.OTHER, chain_parts.CFG)


def plain(scene):
    return custom.CFGGuider.execute(model=scene.model, positive=scene.positive, negative=scene.negative, cfg=chain_parts.CFG)[0]


@pytest.mark.parametrize("name", [name for name in EDITS if name != "concepts"])  # which belong to LEDITS Guider
@pytest.mark.parametrize("guider", [perp_neg, three], ids=lambda g: g.__name__)
def test_a_guider_with_three_conditionings_edits_as_the_plain_one(guider, name):
    scene = chain_parts.scene()
    found = []
    for make in (plain, guider):
        sampler, sigmas = LeditsSamplerNode.execute(inversion=scene.path, skip=1, **chain_parts.inputs(name)).result
        latent = {"samples": scene.path.latent_format.process_out(scene.path.latents[0])}
        found.append(runs.in_parts(make(scene), sampler, sigmas, latent))
    assert float((found[0] - found[1]).abs().max()) < CLOSE
