"""The picture comes back with weights of every dtype, on the CPU and on a GPU.

Residuals hold what the network lacks of the path, whatever it says. A replay that makes the calls of the inversion meets the
same predictions, however coarse the network's dtype, as long as it stands exactly where the path does; the sampler puts it
back there after the rounding of float32. Without that, or where calls have another number of rows than the inversion's, a
prediction is off by what the network's dtype rounds.
"""
import itertools

import pytest
from comfyui_ledits.nodes.ddim_inversions import DDIMInversion, DirectInversion
from comfyui_ledits.nodes.edit_friendly_inversion import EditFriendlyInversion
from comfyui_ledits.samplers import ledits
from support import runs
from support.devices import ROUNDING, on_each, placed

pytestmark = pytest.mark.usefixtures("inference_mode", "full_precision")
EXACT = 1e-5  # of the picture's standard deviation: the last addition in float32, of latents not far from it in size
# Times the rounding of one number: the last steps weigh most, and their predictions each round once (measured on a CPU: up to 3).
ROUNDED = 8
AT_LEAST = 1e-4  # what float32 may be off by over all steps, as in test_reconstruction
KINDS = ("sd1", "sdxl_v", "flux", "sd3")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")
WAYS = {
    "edit-friendly, one by one": (EditFriendlyInversion, {"steps_at_once": 1}),
    "edit-friendly, batched": (EditFriendlyInversion, {"steps_at_once": 0}),
    "DDIM, noise maps": (DDIMInversion, {"replay": "noise maps"}),
    "DDIM, input shift": (DDIMInversion, {"replay": "input shift"}),
    "Direct, target side": (DirectInversion, {"ablation": {"ablation": "target side", "edit_cfg": 1.0}}),
}


@on_each("kind dtype", cpu=[("sd1", "float16"), ("sdxl_v", "float8_e4m3fn"), ("flux", "bfloat16")],
         cuda=itertools.product(KINDS, DTYPES))
def test_the_picture_comes_back(device, kind, dtype, monkeypatch):
    half = dtype in ("float16", "bfloat16")
    model = placed(runs.model(kind), device, dtype, native=half and device == "cpu")
    latent, computed = runs.parts_of(kind).latent(kind), model.model.get_dtype_inference()
    rounded = max(AT_LEAST, ROUNDED * ROUNDING[computed])

    def off(inversion, **inputs):
        return runs.error(kind, runs.edit(kind, inversion, on=model, **inputs), latent)

    for way, (node, inputs) in WAYS.items():
        inversion = runs.invert(node, kind, latent, on=model, steps=6, scheduler="simple", **inputs)[0]
        settled = off(inversion, cfg=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(ledits, "_ROUNDING", 0.0)
            free = off(inversion, cfg=1.0)
        print(f"{device:4} {kind:6} {dtype:13} in {str(computed)[6:]:8} {way:25} off by {settled:.1e}, not put back {free:.1e}")
        assert settled < (EXACT if way == "edit-friendly, one by one" else rounded), way
        assert free < rounded, way
    assert off(inversion, cfg=3.0, prompt=runs.TARGET) > 0.1
