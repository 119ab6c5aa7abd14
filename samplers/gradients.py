"""Gradients through ComfyUI's U-Nets as users run them: inside inference mode, with weights that are inference tensors.

Autograd cannot save an inference tensor for its backward pass, so every layer must work on a copy of its weights, made
outside inference mode. ComfyUI's way to have that is a weight wrapper on a clone of the MODEL.
"""

import contextlib
import copy
import functools
from collections.abc import Callable

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import torch
import torch.utils.checkpoint
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider

from . import models
from .guider import guided, predicted
from .out_of_place import copies_saved, out_of_place

# Memory of a backward pass in terms of the estimate for a prediction with cond and uncond.
_MEMORY = 4
# Conditioning features that learning cannot handle: they bring weights without a derivative, or switch the prompt off
# for some steps or areas.
_MORE_THAN_WORDS = ("control", "gligen", "hooks", "area", "mask", "start_percent", "end_percent")


def check(model: ModelPatcher):
    """Refuse a MODEL that is not a U-Net of a diffusion model.

    Raises:
        ValueError: what it is.
    """
    if models.family(model).bounded or not isinstance(model.get_model_object("diffusion_model"), UNetModel):
        raise ValueError(
            f"{type(model.model).__name__} is not a U-Net of Stable Diffusion's kind (flow models are not). Inversions "
            "that learn need one: SD 1.x, SD 2.x, SDXL and checkpoints made from them. Use an inversion without learning "
            "(Direct Inversion, or Edit-Friendly DDPM Inversion)."
        )


def check_prompt(conditioning: list, name: str):
    """Refuse a CONDITIONING that is more than one prompt's words.

    Raises:
        ValueError: what to remove.
    """
    if len(conditioning) != 1 or any(key in conditioning[0][1] for key in _MORE_THAN_WORDS):
        raise ValueError(
            f"Inversions that learn need plain words as the {name} prompt: remove ControlNet, GLIGEN, hooks, areas, "
            f"masks, ranges and Conditioning Combine from it. They may be added for the edit."
        )


@contextlib.contextmanager
def differentiable(model: ModelPatcher):
    """A clone of a MODEL whose predictions can be differentiated outside inference mode; nothing stays on `model`.

    Every weight is copied when its layer uses it. Residual and transformer blocks run under gradient checkpointing:
    a backward pass evaluates each block once more and keeps the activations of one at a time (for a float16 SD 1.5 at
    512 x 512, 0.6 GB on top of the weights instead of 3.3 GB). Attention is torch's own, which has a derivative.
    A MODEL under dynamic VRAM is loaded a second time, without it, and unloaded in the end.

    Raises:
        ValueError: the MODEL is no U-Net, or is under dynamic VRAM and cannot be loaded again.
    """
    check(model)
    clone = _clone(model)
    shared = clone.model is model.model
    unet = clone.get_model_object("diffusion_model")
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, (ResBlock, BasicTransformerBlock))}
    forwards = [block for block in blocks.values() if "forward" not in vars(block)]
    for name, module in unet.named_modules():
        if hasattr(module, "weight_function"):
            for parameter in ("weight", "bias"):
                if getattr(module, parameter, None) is not None:
                    clone.add_weight_wrapper(f"diffusion_model.{name}.{parameter}", torch.clone)
    for name in blocks:
        key = f"diffusion_model.{name}.forward"
        clone.add_object_patch(key, checkpointed(clone.get_model_object(key)))
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = torch_attention
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "ledits_gradients", _more_memory)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")
    clone.remove_additional_models("multigpu")
    try:
        yield clone
    finally:
        if shared:  # ComfyUI takes wrappers and patches off when it loads the MODEL that has none
            comfy.model_management.load_models_gpu([model])
            for block in forwards:  # ...but puts a method back as an attribute of the object
                vars(block).pop("forward", None)
        else:
            _unload(clone)


def _clone(model: ModelPatcher) -> ModelPatcher:
    if not model.is_dynamic():
        return model.clone()
    if model.cached_patcher_init is None:
        raise ValueError(
            "This model was loaded in a way that cannot be repeated, which inversions that learn need while ComfyUI's "
            "dynamic VRAM is on. Start ComfyUI with --disable-dynamic-vram, or load the model with a stock loader."
        )
    # from a clone: the delegate is remembered by the MODEL it is asked of
    return model.clone().get_non_dynamic_delegate()


def _unload(model: ModelPatcher):
    """Unload a MODEL and its clones, as `unload_model_and_clones` does, which ComfyUI 0.18 does not have."""
    management = comfy.model_management
    loaded = management.current_loaded_models
    others = [other for other in loaded if other.model is None or other.model.model is not model.model]
    management.free_memory(1e30, model.load_device, others)


def checkpointed(forward: Callable) -> Callable:
    """A block's `forward` that keeps no activations for a backward pass, but runs once more in it."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if "transformer_options" in kwargs:  # ComfyUI goes on writing the position of the block into it
            kwargs["transformer_options"] = kwargs["transformer_options"].copy()
        return torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return run


def torch_attention(function, *args, **kwargs):
    """An `optimized_attention_override`: torch's own attention, which has a derivative."""
    return attention_pytorch(*args, **kwargs)


def left_out(model: ModelPatcher) -> str:
    """What of a MODEL does not act while an inversion learns on it, in words; "" for nothing."""
    if model.model_options.get("transformer_options", {}).get("optimized_attention_override") is None:
        return ""
    return "Another pack's attention on the model did not act: while learning torch's own, which has a derivative, stands in"


def as_given(options: dict) -> dict:
    """`model_options` of a `differentiable` MODEL without the attention that was put there."""
    inner = options.get("transformer_options", {})
    if inner.get("optimized_attention_override") is not torch_attention:
        return options
    return {**options, "transformer_options": {k: v for k, v in inner.items() if k != "optimized_attention_override"}}


def _more_memory(executor, model, noise_shape, *args, **kwargs):
    return executor(model, [noise_shape[0] * _MEMORY, *noise_shape[1:]], *args, **kwargs)


class Predictor:
    """Predictions of a running guider's model, outside inference mode: make and use it under `inference_mode(False)`.

    Args:
        guider: a running `LeditsGuider`; its `rows` count every prediction, and once more the backward pass of one.
        model_options: of the run. They are copied; `options` may be changed.

    Attributes:
        tick: called before every prediction that is to be differentiated.
    """

    tick = None

    def __init__(self, guider: CFGGuider, model_options: dict):
        self._guider, self._model = guider, guider.inner_model
        self.options = comfy.model_patcher.create_model_options_clone(model_options)
        inner = self.options.setdefault("transformer_options", {})
        inner.update(out_of_place(inner))
        self.conds = {name: [_thawed(c) for c in guider.conds[name]] for name in ("positive", "negative")}

    @property
    def network(self) -> torch.nn.Module:
        """The model's U-Net."""
        return self._model.diffusion_model

    def words(self, name: str, pictures: int) -> torch.Tensor:
        """The embedding of a prompt for every picture, float32 [pictures, tokens, width].

        Raises:
            ValueError: the model takes none.
        """
        cross = self.conds[name][0]["model_conds"].get("c_crossattn")
        if cross is None:
            raise ValueError("This model has no cross-attention to a prompt: there is nothing that could be learned.")
        return cross.process_cond(batch_size=pictures).cond.float()

    def __call__(self, name: str, y: torch.Tensor, sigma, words: torch.Tensor | None = None) -> torch.Tensor:
        """D of the prompt `name`, with other `words` than its own where given."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.tick is not None and torch.is_grad_enabled():
            self.tick()
        cond = self.conds[name][0]
        if words is not None:
            encoded = cond["model_conds"] | {"c_crossattn": comfy.conds.CONDCrossAttn(words)}
            cond = {**cond, "model_conds": encoded}
        self._guider.rows += len(y) * (2 if torch.is_grad_enabled() else 1)
        pair = [[cond], None] if name == "positive" else [None, [cond]]
        out = predicted(self._model, pair, y, self.level(y, sigma), self.options)
        return out[0] if name == "positive" else out[1]

    def combine(self, y: torch.Tensor, sigma, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Guidance as the run has it: the guider's cfg, or other packs' functions, which may change what they are given."""
        with copies_saved():
            return guided(
                self._model, [self.conds["positive"], self.conds["negative"]], [positive.clone(), negative.clone()],
                self._guider.cfg, y.clone(), self.level(y, sigma), self.options,
            )

    @staticmethod
    def level(y: torch.Tensor, sigma) -> torch.Tensor:
        """A noise level for every picture, [B]."""
        return torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))


def _thawed(cond: dict) -> dict:
    """A processed conditioning whose tensors may take part in gradients."""

    def thaw(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    model_conds = {}
    for name, value in cond["model_conds"].items():
        model_conds[name] = thawed = copy.copy(value)
        thawed.cond = [thaw(v) for v in thawed.cond] if isinstance(thawed.cond, list) else thaw(thawed.cond)
    return {**cond, "model_conds": model_conds}
