"""The gradient of a loss by the latent, in the middle of a run and of inference mode: guidance while sampling.

Only the network itself leaves inference mode. What comes before it (prompts, hooks, ControlNet) is made as ever and
counts as constant, so a run's MODEL, its patches and its GUIDER need not know.
"""

import contextlib

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy.samplers import CFGGuider
from einops import rearrange

from ..attention_hooks.conditioning import in_range
from .gradients import checkpointed, torch_attention
from .methods.fit import scaled_gradient
from .out_of_place import out_of_place, told_in_words

# Gradients are small for a float16 network; powers of two change nothing in float32.
_LOSS_SCALE = 2.0**7
_MISSING = object()


def latent_gradient(guider: CFGGuider, entries: list[dict], y: torch.Tensor, sigma: float, options: dict,
                    loss) -> torch.Tensor:
    """`dL/dx` of one prediction, x being what the network is given: `y / sqrt(1 + sigma^2)`.

    Args:
        guider: the running CFGGuider; its `rows`, if any, count the prediction, and once more the backward pass.
        entries: encoded conditionings (`guider.conds[...]`) to evaluate, all over the whole picture.
        y: [B, C, H, W].
        sigma: its noise level.
        options: the run's `model_options`, with patches that show `loss` what it is made of.
        loss: `begin()` is called before the network runs, `end() -> scalar` behind it. Blocks run once more in the
            backward pass; what the patches do must not depend on that.

    Returns:
        float32 [B, C, H, W]; zeros where no entry is active at this noise level.

    Raises:
        ValueError: another pack's patch cannot be differentiated, or the gradient is not finite.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    options = comfy.model_patcher.create_model_options_clone(options)
    options.pop("multigpu_clones", None)
    inner = options.setdefault("transformer_options", {})
    inner["optimized_attention_override"] = torch_attention
    inner.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop("torch.compile", None)
    derive = _Derive(y.shape, loss)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "ledits_gradient", derive, options, is_model_options=True)
    if hasattr(guider, "rows"):
        guider.rows += 2 * len(y) * sum(in_range(c, sigma) for c in entries)
    level = torch.full((len(y),), float(sigma), device=y.device)
    comfy.samplers.calc_cond_batch(guider.inner_model, [entries, None], y, level, options)
    return torch.zeros_like(y, dtype=torch.float32) if derive.gradient is None else derive.gradient.to(y.device)


class _Derive:
    """A DIFFUSION_MODEL wrapper: a forward and a backward pass.

    It must be the innermost wrapper, because the others remove their weight hooks on return.
    """

    def __init__(self, shape, loss):
        self.shape, self.loss, self.gradient = shape, loss, None

    def __call__(self, executor, x, timesteps, *args, **kwargs):
        if x.shape[-2:] != self.shape[-2:] or len(x) % self.shape[0]:
            raise ValueError(
                "A patch on the model cuts the picture into parts, which gradients through the model do not allow: "
                "remove it, or remove pix2pix-zero."
            )
        with torch.inference_mode(False), torch.enable_grad(), differentiable_now(executor.class_obj):

            def evaluate(scale):
                leaf = x.detach().float().clone().requires_grad_()
                out, gradient = self._evaluate(executor, leaf, x.dtype, scale, timesteps, args, kwargs)
                return out, [gradient]

            out, (gradient,) = scaled_gradient(evaluate, _LOSS_SCALE)
        of_entries = rearrange(gradient[:, : self.shape[1]], "(entries b) ... -> entries b ...", b=self.shape[0])
        gradient = of_entries.sum(0)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        return out

    def _evaluate(self, executor, leaf, dtype, scale, timesteps, args, kwargs):
        args, kwargs = _copied([timesteps, *args]), _copied(kwargs)
        # the sixth of UNetModel.forward's arguments (x, timesteps, context, y, control, transformer_options)
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[4]
        before = {name: options.get(name, {}) for name in ("patches", "patches_replace")}
        self.loss.begin()
        try:
            options.update(out_of_place(options))
            with told_in_words("pix2pix-zero", "another attention control (Prompt-to-Prompt, for example)"):
                out = executor(leaf.to(dtype), *args, **kwargs)
                (gradient,) = torch.autograd.grad(self.loss.end() * scale, leaf)
        finally:
            options.update(before)
        return out.detach(), gradient


def _copied(value):
    """A copy of tensors that autograd may keep. The options of the call stay what they are: hooks read them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict) and "cond_or_uncond" not in value:
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _on_a_copy(forward):
    """ControlNet is added in place to skip connections, which are the inputs of other blocks."""
    return lambda x, *args, **kwargs: forward(x.clone(), *args, **kwargs)


@contextlib.contextmanager
def differentiable_now(unet: torch.nn.Module):
    """Makes a U-Net differentiable while the context lasts, as ComfyUI has loaded it; then everything is as it was.

    As in `gradients.differentiable`, every layer works on a copy of its weights, made when it is used, and residual and
    transformer blocks run under gradient checkpointing. Call it outside inference mode.

    This sets attributes on modules that are in use, which nothing else here does. In the middle of a run a clone of the
    MODEL would have to be loaded in its place, and copies of the modules would hold what ComfyUI notes on them while it
    moves their weights (pinned memory, dynamic VRAM).
    """
    before = []

    def put(module, name, value):
        before.append((module, name, vars(module).get(name, _MISSING)))
        setattr(module, name, value)

    try:
        for module in unet.modules():
            if hasattr(module, "weight_function"):
                for name in ("weight_function", "bias_function"):
                    put(module, name, [*getattr(module, name), _copied])
            if isinstance(module, BasicTransformerBlock):
                put(module, "forward", checkpointed(module.forward))
            elif isinstance(module, ResBlock):
                put(module, "forward", _on_a_copy(checkpointed(module.forward)))
            elif isinstance(module, Downsample):
                put(module, "forward", _on_a_copy(module.forward))
        yield
    finally:
        for module, name, value in reversed(before):
            if value is _MISSING:
                delattr(module, name)
            else:
                setattr(module, name, value)
