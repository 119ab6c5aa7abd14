"""Edits on a GPU: as on the CPU, with all weights loaded or a part of them, and in batches of any size."""
import comfy.model_management
import pytest
import torch
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from support import runs, whole_edits
from support.devices import ROUNDING, Partly, on_each, placed

pytestmark = pytest.mark.usefixtures("inference_mode", "full_precision")
# Of the picture's standard deviation. A device sums in another order, so predictions differ by some 1e-6; guidance and
# four steps enlarge that, null-text's Adam most, whose first step is the sign of a gradient.
LIKE_THE_CPU = 1e-3
ALIKE = 1e-5  # on one device: the same kernels on the same weights
EDITS = [[name] for name in whole_edits.EDITS]


def far(a, b):
    """Largest difference, in standard deviations of the second."""
    return float((a - b).abs().max() / b.std())


def edited(name, model, by=0.05):
    """The edit of a MODEL, which must have changed the picture."""
    made = whole_edits.run(name, model)
    kind = whole_edits.EDITS[name][0]
    assert far(made, runs.in_model_space(kind, whole_edits.latent(name)["samples"])) > by
    return made


@on_each("name", cpu=[["sega"], ["flow p2p"]], cuda=EDITS)
def test_an_edit_is_that_of_the_cpu(device, name):
    off = far(edited(name, placed(whole_edits.model(name), device)), edited(name, whole_edits.model(name)))
    print(f"{device:4} {name:13} off by {off:.1e}")
    assert off < LIKE_THE_CPU


# --- a part of the weights loaded -----------------------------------------------------------------------------------

def with_lora(model):
    """A clone with patches on every linear weight of attention, which a loaded layer has in its weights and an offloaded
    one adds when it runs. On a GPU ComfyUI adds the first in float16 and the second in the weights' dtype: multiples of
    1/256 are exact in both."""
    g, weights = torch.Generator().manual_seed(4), dict(model.model.named_parameters())
    patches = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and ("attn" in name or "qkv" in name):
            weight.mul_(256).round_().div_(256)
            patches[name] = ("diff", ((25 * torch.randn(weight.shape, generator=g)).round() / 256,))
    assert len(patches) > 3
    patched = model.clone()
    patched.add_patches(patches)
    return patched


@on_each("name share", cpu=[("p2p", 0.5), ("null-text", 0.5), ("flow masactrl", 0.0)],
         cuda=[(name, share) for name in whole_edits.EDITS for share in (0.5, 0.0)])
def test_an_edit_with_a_part_of_the_weights_loaded_is_that_with_all(device, name, share):
    plain = whole_edits.model(name)
    whole = edited(name, with_lora(placed(plain, device)))
    assert far(whole, edited(name, placed(plain, device))) > 0.01  # the patches matter
    size = placed(plain, device).model_size()
    model = with_lora(placed(plain, device, patcher=Partly, room=int(share * size)))
    part = edited(name, model)
    assert model.model.model_lowvram and model.lowvram_patch_counter() > 0
    assert (0 if share == 0 else 0.2 * size) <= model.loaded_size() < 0.8 * size
    assert far(part, whole) < ALIKE


@on_each("name", cpu=[], cuda=EDITS)
def test_an_edit_without_vram_for_weights_is_that_with_all(device, name, monkeypatch):
    """ComfyUI's state under --novram."""
    whole = edited(name, with_lora(placed(whole_edits.model(name), device)))
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    model = with_lora(placed(whole_edits.model(name), device))
    assert far(edited(name, model), whole) < ALIKE
    assert model.model.model_lowvram


# --- steps in one call ----------------------------------------------------------------------------------------------

@on_each("kind dtype", cpu=[("sd1", "float32"), ("flux", "bfloat16")],
         cuda=[(kind, dtype) for kind in ("sd1", "sdxl", "flux") for dtype in ("float32", "float16", "bfloat16")])
def test_inversion_in_batches_of_any_size_makes_one_record(device, kind, dtype):
    model = placed(runs.model(kind), device, dtype, native=device == "cpu")
    rounding = ROUNDING[model.model.get_dtype_inference()]
    network, records = model.model.diffusion_model, {}
    for at_once in (1, 2, 4, 8, 16, 32):
        calls = []
        with_rows = network.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
        records[at_once] = runs.invert(EditFriendlyInversion, kind, on=model, steps=32, steps_at_once=at_once,
                                       scheduler="simple")[0]
        with_rows.remove()
        assert calls == [at_once] * (32 // at_once)
    one = records.pop(1)
    # A residual is off by what the network rounds of the noise that a step takes out, and by what float32 rounds of latents.
    noise = torch.tensor([one.step(i).take * float(one.sigmas[i]) for i in range(32)])
    size = one.latents[:-1].flatten(1).abs().amax(1)
    for at_once, many in records.items():
        assert torch.equal(many.latents, one.latents)
        off = (many.residuals - one.residuals).flatten(1).abs().amax(1)
        print(f"{device:4} {kind:5} {dtype:8} {at_once:2} at once: off by {float((off / noise).max()):.1e} of the noise")
        assert (off < 16 * (rounding * noise + ROUNDING[torch.float32] * size)).all()
