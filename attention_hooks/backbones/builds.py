"""How transformers of flow models lay out their attention: blocks, picture and word tokens, by the network's class."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.ldm.aura.mmdit
import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.hidream.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.model_base
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

JOINT, SELF, CROSS, PICTURE = "joint", "attn1", "attn2", "picture"


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a network lays out its attention.

    Attributes:
        name: of the family, for presets.
        width: channels of q, k and v.
        patch: latent pixels of a token, (frames, height, width).
        blocks: ((part, how many), ...) in order of execution.
        picture: where the picture's tokens lie among all: "last" or "first".
        registers: tokens of the network's own before the words.
        padded: words and picture are each padded to a multiple of this at their end; 1 for no padding.
        sites: the attention calls of a block, in order; a PICTURE one has nothing to edit.
        marks: who tells the block: "network", "dit" (a patch of ours), or "count" (calls are counted).
        words_twice: the last of two text encoders' words come once more, by layer (HiDream).
        padded_in_front: whether core puts empty words before a short prompt's (Flux.2).
        turned: (width, base) of the rotary part whose positions depend on how many words there are, or None.
    """

    name: str
    width: int
    patch: tuple[int, int, int]
    blocks: tuple[tuple[str, int], ...]
    picture: str = "last"
    registers: int = 0
    padded: int = 1
    sites: tuple[str, ...] = (JOINT,)
    marks: str = "network"
    words_twice: bool = False
    padded_in_front: bool = False
    turned: tuple[int, float] | None = None


def _two_streams(network, name):
    patch = network.patch_size if isinstance(network.patch_size, (list, tuple)) else [network.patch_size] * 2
    return Build(name=name, width=network.hidden_size, patch=(1, *patch)[-3:],
                 blocks=(("double", len(network.double_blocks)), ("single", len(network.single_blocks))))


def _sd3(network):
    more = any(block.x_block.x_block_self_attn for block in network.joint_blocks)
    return Build(name="SD3.5" if more else "SD3", width=network.hidden_size, patch=_square(network),
                 blocks=(("double", len(network.joint_blocks)),), sites=(JOINT, PICTURE), marks="dit")


def _lumina(network):
    axes, many = network.rope_embedder, network.pad_tokens_multiple or 1
    return Build(name="Z-Image" if many > 1 else "Lumina", width=network.dim, patch=_square(network),
                 blocks=(("double", len(network.layers)),), padded=many, turned=(axes.axes_dim[0], axes.theta))


def _aura(network):
    _, registers, width = network.register_tokens.shape
    return Build(name="AuraFlow", width=width, patch=_square(network), registers=registers, marks="dit",
                 blocks=(("double", len(network.double_layers)), ("single", len(network.single_layers))))


def _hidream(network):
    return Build(name="HiDream", width=network.inner_dim, patch=_square(network), picture="first", marks="count",
                 blocks=(("double", network.num_layers), ("single", network.num_single_layers)), words_twice=True)


def _qwen(network):
    blocks = (("double", len(network.transformer_blocks)),)
    return Build(name="Qwen-Image", width=network.inner_dim, patch=_square(network), blocks=blocks)


def _wan(network):
    return Build(name="Wan", width=network.dim, patch=tuple(network.patch_size), blocks=(("double", len(network.blocks)),),
                 sites=(SELF, CROSS))


def _square(network):
    return 1, network.patch_size, network.patch_size


_BUILDS: dict[type, Callable] = {
    comfy.ldm.flux.model.Flux: functools.partial(_two_streams, name="Flux"),
    comfy.ldm.chroma.model.Chroma: functools.partial(_two_streams, name="Chroma"),
    comfy.ldm.hunyuan_video.model.HunyuanVideo: functools.partial(_two_streams, name="HunyuanVideo"),
    OpenAISignatureMMDITWrapper: _sd3,
    comfy.ldm.qwen_image.model.QwenImageTransformer2DModel: _qwen,
    comfy.ldm.lumina.model.NextDiT: _lumina,
    comfy.ldm.aura.mmdit.MMDiT: _aura,
    comfy.ldm.hidream.model.HiDreamImageTransformer2DModel: _hidream,
    comfy.ldm.wan.model.WanModel: _wan,
}
_FLUX2 = getattr(comfy.model_base, "Flux2", ())
# Their networks are of these classes, but lay out their tokens otherwise.
_OTHERWISE = tuple(filter(None, (getattr(comfy.model_base, name, None) for name in ("LongCatImage",))))


def known(model) -> bool:
    """Whether a `BaseModel`'s network is one of those that `Joint` serves, and no variant of it."""
    network = model.diffusion_model
    variant = type(network) is comfy.ldm.wan.model.WanModel and network.model_type != "t2v"
    return type(network) in _BUILDS and not isinstance(model, _OTHERWISE) and not variant


def build_of(model) -> Build:
    """Of a `BaseModel` that is `known`."""
    build = _BUILDS[type(model.diffusion_model)](model.diffusion_model)
    return replace(build, padded_in_front=isinstance(model, _FLUX2))
