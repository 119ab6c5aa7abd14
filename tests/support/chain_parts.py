"""An edit and what a workflow may connect to it: every EDIT of the pack, and stock nodes and other packs' patches (LINKS).

    parts = scene("lora", "area")                    # model, prompts, path, with both connected
    one = parts.edit("p2p")                          # LEDITS KSampler
    two = parts.edit("p2p", through="parts")         # GUIDER + SAMPLER in SamplerCustomAdvanced
    with Watch(parts) as watch:                      # what the U-Net was asked and answered
        ...
"""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import folder_paths
import safetensors.torch
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfyui_ledits.attention_hooks.controls.local_blend import LocalBlend
from comfyui_ledits.attention_hooks.controls.masactrl import MasaCtrl
from comfyui_ledits.attention_hooks.controls.p2p import PromptToPrompt
from comfyui_ledits.attention_hooks.controls.pix2pix_zero import Pix2PixZero
from comfyui_ledits.attention_hooks.controls.pnp import PlugAndPlay
from comfyui_ledits.nodes.sampling import LeditsGuiderNode, LeditsSamplerNode
from comfyui_ledits.samplers.methods.sega import Concept

import nodes
from support import editing, runs, tiny

SOURCE, TARGET = "a cat sits on a sofa", "a dog sits on a sofa"
STEPS, CFG, SIDE = 4, 5.0, 16
PAG_SCALE = 2.0


@functools.cache
def words():
    """Source and target prompt of Edit Prompts, of a random CLIP."""
    return editing.prompts("sd1", SOURCE, TARGET)


@functools.cache
def empty():
    return editing.negative("sd1")


def attention(name):
    """Attention controls by name, acting in every step."""
    blocks = {"blocks": "output.1-", "window": (0, 1)}
    blend = LocalBlend(words=("cat", "dog"), start=0.0, threshold=0.9, blocks="@1/2")
    return {
        "p2p": [PromptToPrompt(prompts=words(), cross=(0, 1), self_=(0, 1))],
        "blend": [PromptToPrompt(prompts=words(), cross=(0, 0.5), self_=(0, 1), blend=blend)],
        "blend alone": [PromptToPrompt(prompts=words(), cross=(0, 0), self_=(0, 0), blend=blend)],
        "p2plus": [PromptToPrompt(prompts=words(), cross=(0, 1), self_=(0, 1), uncond_self=(0, 1))],
        "masactrl": [MasaCtrl(prompts=words(), **blocks)],
        "masactrl words": [MasaCtrl(prompts=words(), **blocks, source_words=("cat",), target_words=("dog",), threshold=0.5,
                                    map_blocks="@1/2")],
        "pnp": [PlugAndPlay(prompts=words(), features=(0, 1), attention=(0, 1), feature_blocks="output.1.0",
                            attention_blocks="output.1-")],
        "pix2pix": [Pix2PixZero(prompts=words(), xa_guidance=1.0)],
    }[name]


CONTROLS = ("p2p", "blend", "p2plus", "masactrl", "masactrl words", "pnp", "pix2pix")


def inputs(name):
    """Inputs of a sampler node for an edit: "plain", "concepts", or an attention control."""
    if name == "plain":
        return {}
    if name == "concepts":
        return {"concepts": (Concept(conditioning=tiny.conditioning(seed=5), warmup=0, scale=3.0, threshold=0.5),)}
    return {"attention": tuple(attention(name))}


EDITS = ("concepts", *CONTROLS)


@dataclass(frozen=True)
class Parts:
    """What is connected to the sampler."""

    model: Any
    path: Any
    positive: Any
    negative: Any
    mask: Any = None
    notes: dict = field(default_factory=dict)

    def edit(self, name, through="node", start=1):
        """Latent [B, 4, SIDE, SIDE] of an edit, as the nodes give it."""
        more = inputs(name)
        with torch.inference_mode():
            if through == "node":
                pair = self.positive, self.negative
                return runs.edit("sd1", self.path, pair=pair, on=self.model, cfg=CFG, skip=start, mask=self.mask,
                                 **more)
            guider = LeditsGuiderNode.execute(model=self.model, positive=self.positive, negative=self.negative,
                cfg=CFG, concepts=more.pop("concepts", None))[0]
            sampler, sigmas = LeditsSamplerNode.execute(inversion=self.path, skip=start, **more)
            latent = {"samples": self.path.latent_format.process_out(self.path.latents[0])}
            if self.mask is not None:
                latent["noise_mask"] = self.mask
            return runs.in_parts(guider, sampler, sigmas, latent)


@functools.cache
def scene(*names, batch=1):
    """The tiny model with LINKS connected, made once."""
    return linked(plain(batch=batch), *names)


def plain(model=None, batch=1):
    """Nothing connected."""
    model = model or tiny.model()
    return Parts(model, editing.path(model, STEPS, batch, SIDE, SIDE), words().target, empty())


def linked(parts, *names):
    """The same with LINKS connected."""
    for name in names:
        parts = replace(parts, **LINKS[name](parts))
    return parts


# --- what may be connected ------------------------------------------------------------------------------------------

LORA_RANK, LORA_STRENGTH = 2, 0.8
LORA_LAYERS = ("output_blocks.2.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.attn2.to_v",
               "output_blocks.1.0.out_layers.3")


def lora_file():
    """A LoRA file of the usual names for the tiny "sd1" model: its name among ComfyUI's, and its tensors."""
    generator, tensors = torch.Generator().manual_seed(11), {}
    weights = dict(tiny.model().model.diffusion_model.named_parameters())
    for layer in LORA_LAYERS:
        shape = weights[f"{layer}.weight"].shape
        name = "lora_unet_" + layer.replace(".", "_")
        up = torch.randn(shape[0], LORA_RANK, *[1] * (len(shape) - 2), generator=generator)
        down = torch.randn(LORA_RANK, *shape[1:], generator=generator)
        tensors |= {f"{name}.lora_up.weight": 0.2 * up, f"{name}.lora_down.weight": 0.2 * down,
                    f"{name}.alpha": torch.tensor(float(LORA_RANK))}
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "chained.safetensors")
    folder_paths.filename_list_cache.clear()
    return "chained.safetensors", tensors


def _lora(parts):
    model, _ = nodes.LoraLoader().load_lora(parts.model, None, lora_file()[0], LORA_STRENGTH, 0.0)
    return {"model": model}


def with_lora_in_its_weights(model):
    """The LoRA as plain numbers: W + strength * up @ down."""
    weights, tensors = dict(model.model.diffusion_model.named_parameters()), lora_file()[1]
    with torch.no_grad():
        for layer in LORA_LAYERS:
            name, weight = "lora_unet_" + layer.replace(".", "_"), weights[f"{layer}.weight"]
            up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
            weight += LORA_STRENGTH * (up @ down).view(weight.shape)
    return model


def _hook_lora(parts):
    """A LoRA on the target prompt alone."""
    hooks, = CreateHookLora().create_hook(lora_file()[0], LORA_STRENGTH, 0.0)
    return {"positive": ConditioningSetProperties().set_properties(parts.positive, 1.0, "default", hooks=hooks)[0]}


def _control_net(parts):
    image = torch.rand(1, SIDE * 8, SIDE * 8, 3, generator=torch.Generator().manual_seed(0))
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(parts.positive, parts.negative, tiny.control_net(), image, 0.1, 0.0, 1.0)
    return {"positive": positive, "negative": negative}


OTHER = tiny.conditioning(seed=8)


def _area(parts):
    """Another prompt in the right half, over the target everywhere."""
    right, = nodes.ConditioningSetArea().append(OTHER, SIDE * 4, SIDE * 8, SIDE * 4, 0, 1.0)
    return {"positive": [*parts.positive, *right]}


def left_half():
    mask = torch.zeros(1, SIDE * 8, SIDE * 8)
    mask[..., : SIDE * 4] = 1
    return mask


def _masks(parts):
    """The target in the left half, another prompt in the right."""
    set_mask = nodes.ConditioningSetMask().append
    return {"positive": [*set_mask(parts.positive, left_half(), "default", 1.0)[0],
                         *set_mask(OTHER, 1 - left_half(), "default", 1.0)[0]]}


def steps_mask():
    """0, 1/2 and 1 in three upright stripes, at the latent's resolution."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., 5:] = 0.5
    mask[..., 10:] = 1
    return mask


def _differential(parts):
    return {"model": DifferentialDiffusion.execute(model=parts.model)[0], "mask": steps_mask()}


def _freeu(parts):
    return {"model": FreeU.execute(model=parts.model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]}


def _pag(parts):
    return {"model": PerturbedAttentionGuidance.execute(model=parts.model, scale=PAG_SCALE)[0]}


class Patch:
    """Another pack's patch: counts the rows it was given, which must be whole chunks of pictures."""

    def __init__(self, batch):
        self.rows, self.batch = 0, batch

    def saw(self, tensor, extra):
        assert len(tensor) % (self.batch * len(extra["cond_or_uncond"])) == 0
        assert len(extra["uuids"]) == len(extra["cond_or_uncond"])
        self.rows += len(tensor)


class Inputs(Patch):
    """`attn1_patch`, `attn2_patch`"""

    def __call__(self, n, context, value, extra):
        self.saw(n, extra)
        return n, context, value * 1.3


class Replaced(Patch):
    """`attn1_replace`, `attn2_replace`: adds something of its own, as IP-Adapter does."""

    def __call__(self, q, k, v, extra):
        self.saw(q, extra)
        assert len(q) == len(k) == len(v)
        out = optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"])
        return out + 0.3 * q


BLOCK = ("output", 1)  # where Replaced acts: every control edits it


def _patched(kind):
    def link(parts):
        model, patch = parts.model.clone(), (Inputs if kind.endswith("patch") else Replaced)(parts.path.batch)
        getattr(model, f"set_model_{kind}")(patch, *(() if kind.endswith("patch") else BLOCK))
        return {"model": model, "notes": parts.notes | {kind: patch}}

    return link


PATCHES = ("attn1_patch", "attn2_patch", "attn1_replace", "attn2_replace")
LINKS = {
    "lora": _lora, "hook lora": _hook_lora, "control net": _control_net, "area": _area, "masks": _masks,
    "differential": _differential, "freeu": _freeu, "pag": _pag, **{kind: _patched(kind) for kind in PATCHES},
}
# What belongs to the target: the source must be as it is without. The rest belongs to the MODEL, and so to both.
ON_TARGET = ("hook lora", "control net", "area", "masks", "differential", "pag")


# --- what the U-Net does --------------------------------------------------------------------------------------------


class Watch:
    """The U-Net's rows while it is open: (timestep, latent, words, answer, whether a ControlNet took part) each."""

    def __init__(self, parts):
        self.parts, self.rows = parts, []

    def __enter__(self):
        network = self.parts.model.model.diffusion_model
        self.handle = network.register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def _see(self, module, args, kwargs, out):
        controlled = kwargs.get("control") is not None
        for x, t, c, o in zip(args[0], args[1], kwargs["context"], out):
            self.rows.append((float(t), x.clone(), c.clone(), o.clone(), controlled))

    def source(self, start=1):
        """The source pass: {(prompt, timestep, picture): (answer, controlled)} of the rows that are on the path.

        A target begins on the path, so the negative's first step is left out.
        """
        path, out = self.parts.path, {}
        sampling = self.parts.model.get_model_object("model_sampling")
        known = {"source": words().source[0][0][0], "negative": empty()[0][0][0]}
        for i in range(start, path.steps):
            t = float(sampling.timestep(path.sigmas[i]))
            latents = path.latents[i] / (path.sigmas[i] ** 2 + 1).sqrt()
            for row_t, x, context, answer, controlled in self.rows:
                for name, prompt in known.items():
                    if row_t == t and torch.equal(context, prompt) and (name == "source" or i > start):
                        for b, latent in enumerate(latents):
                            if x.shape == latent.shape and torch.allclose(x, latent, rtol=0, atol=1e-5):
                                out[name, t, b] = answer, controlled
        return out

