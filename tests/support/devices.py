"""Tests that run on the CPU and on a CUDA GPU, and models as ComfyUI loads them there.

    @on_each("dtype", cpu=[["float16"]], cuda=[["float16"], ["bfloat16"]])
    def test_...(device, dtype):                     # on "cuda" it belongs to the GPU group: `python dev.py test --gpu`
        model = placed(tiny.model(), device, dtype)
"""
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher

# Relative rounding of a number, by the dtype that a network computes in.
ROUNDING = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def on_each(names="", cpu=((),), cuda=None):
    """Parametrises a test by `device` and `names`: the cases of `cpu` among the ordinary tests, those of `cuda` (the same
    where left out) in the GPU group."""
    cases = [pytest.param("cpu", *case) for case in cpu]
    cases += [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in (cpu if cuda is None else cuda)]
    return pytest.mark.parametrize(["device", *names.split()], cases)


def device_of(name):
    """The torch.device, as ComfyUI names it."""
    return comfy.model_management.get_torch_device() if name == "cuda" else torch.device(name)


def placed(model, device, dtype="float32", native=False, patcher=ModelPatcher, **settings):
    """A MODEL with the same weights, made as core's UNETLoader does with a `weight_dtype`, and offloaded to the CPU.

    Args:
        model: float32, on the CPU.
        device: its name.
        dtype: name of the weights' dtype. What it is computed in is ComfyUI's choice for the device (`manual_cast`).
        native: compute in the weights' dtype whatever ComfyUI prefers; a CPU does not by itself.
        patcher, settings: class of the MODEL, and more arguments of it.
    """
    old, device, dtype = model.model, device_of(device), getattr(torch, dtype)
    config = type(old.model_config)({})
    config.unet_config |= old.model_config.unet_config
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, None if native else cast)
    with torch.inference_mode():  # as core's loaders
        inner = type(old)(config, model_type=old.model_type)
        inner.diffusion_model.load_state_dict(old.diffusion_model.state_dict())
    return patcher(inner, device, torch.device("cpu"), **settings)


class Partly(ModelPatcher):
    """A MODEL of which so many bytes of weights fit on its device, however much is free: the rest stays where it is
    offloaded, and every layer fetches it when it runs (ComfyUI's low-VRAM loading).

    Args:
        room: bytes.
    """

    def __init__(self, *args, room=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.room = room

    def clone(self, *args, **kwargs):
        made = super().clone(*args, **kwargs)
        made.room = self.room
        return made

    def partially_load(self, device_to, extra_memory=0, **kwargs):
        """As core calls it where memory is short."""
        return super().partially_load(device_to, min(extra_memory, self.room - self.loaded_size()), **kwargs)
