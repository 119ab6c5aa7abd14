"""Transformers of flow models: where their picture and word tokens lie, and how their attention is reached during one call.

Three hooks of ComfyUI serve, all in the `model_options` of one call:
    APPLY_MODEL wrapper             gives every call of the network a count of its own, and the latent's size
    patches_replace["dit"]          tells the block, where the network does not (SD3, AuraFlow)
    optimized_attention_override    sees every attention; another pack's is called
"""

import functools
import math

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..blocks import Layer, Layout
from .builds import CROSS, JOINT, SELF, Build, build_of, known
from .calls import AttentionCall, JointCall

__all__ = ["Joint", "known"]

_KEY = "ledits_joint"


class Joint:
    """A transformer of a flow model as attention control sees it.

    Args:
        model: a `BaseModel` that is `known`.

    Attributes:
        layout: its blocks, parts "double" and "single"; it has no residual blocks.
    """

    def __init__(self, model):
        self.build = build_of(model)
        level, joint = int(math.log2(self.build.patch[-1])), JOINT in self.build.sites
        places = [(part, n) for part, count in self.build.blocks for n in range(count)]
        layers = (Layer(part=part, number=n, index=0, level=level, width=self.build.width, order=order, joint=joint)
                  for order, (part, n) in enumerate(places))
        self.layout = Layout(tuple(layers), (), name=self.build.name)

    def frames(self, latent_frames: int) -> int:
        """Frames of tokens."""
        return -(-latent_frames // self.build.patch[0])

    def beside(self, conds: dict) -> int:
        """Tokens of words, and of the network's own, that an encoded conditioning makes: before the picture where that comes
        last, behind it where it comes first.

        Args:
            conds: the entry's `model_conds`.
        """
        words = conds["c_crossattn"].cond.shape[1]
        if self.build.words_twice:
            return words + 2 * conds["encoder_hidden_states_llama3"].cond.shape[2]
        return self.build.registers - (-words // self.build.padded) * self.build.padded

    def check(self, call: JointCall, conds: dict):
        """Refuse a call whose tokens do not lie as the conditioning of its rows makes them.

        Raises:
            ValueError: more or fewer of them: what to do.
        """
        there = call.others if self.build.picture == "first" else call.image.start
        if there != self.beside(conds):
            raise ValueError(
                f"The model has {there} tokens beside the picture where its prompt makes {self.beside(conds)}: a patch on the "
                "model (merged tokens, for instance), or pictures given with the prompt, add to them or take some away, so "
                "the source's cannot be put in their places. Remove them while attention control is connected."
            )

    def positions(self, words: int, encoded: int, others: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of a layer's tokens beside the picture are which of a prompt's.

        Args:
            words: of the prompt, as `Tokens` counts them.
            encoded: of the encoded conditioning, which core may have padded in front (Flux.2).
            others: tokens of the layer beside the picture.

        Returns:
            of every such token its word or -1, and the number of the copy, int64 [others] each.

        Raises:
            ValueError: the conditioning is not the prompt's.
        """
        b = self.build
        again = words - encoded if b.words_twice else 0
        before = 0 if b.words_twice else encoded - words
        first = b.registers + before
        if min(before, again) < 0 or before and not b.padded_in_front or first + words + again > others:
            raise ValueError(
                f"The prompt has {words} tokens and its conditioning {encoded}, of which the model sees {others} beside the "
                "picture: its words cannot be told apart. Connect what Edit Prompts gives, without another text added to it."
            )
        at, copy = torch.full((others,), -1), torch.zeros(others, dtype=torch.long)
        at[first : first + words] = torch.arange(words)
        if again:
            at[first + words : first + words + again] = torch.arange(encoded, words)
            copy[first + words : first + words + again] = 1
        return at, copy

    def turn(self, tensor: torch.Tensor, by: int) -> torch.Tensor:
        """Picture tokens' q or k as they would be with `by` more tokens before the picture.

        Args:
            tensor: [rows, tokens, heads, width of a head], rotary positions applied.
        """
        if self.build.turned is None or by == 0:  # elsewhere the picture's positions are its own
            return tensor
        width, base = self.build.turned
        omega = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        cos, sin = ((by * omega).cos().to(tensor), (by * omega).sin().to(tensor))
        a, b = tensor[..., 0:width:2], tensor[..., 1:width:2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([turned, tensor[..., width:]], -1)

    def install(self, options: dict, self_attention=((), None), cross_attention=((), None), features=((), None),
                joint_attention=((), None)) -> dict:
        """A copy of `model_options` with hooks on the attention of layers.

        Args:
            self_attention, cross_attention: as `UNet.install`, for layers whose words have an attention of their own.
            joint_attention: (layers, work), `work(layer, q, k, v, call: JointCall) -> out` on [rows, tokens, heads, width].
            features: nothing; these networks have none.
        """
        options = comfy.model_patcher.create_model_options_clone(options)
        inner = options.setdefault("transformer_options", {})
        work = {(layer.key, site): (layer, do) for site, (layers, do) in
                ((SELF, self_attention), (CROSS, cross_attention), (JOINT, joint_attention)) for layer in layers}
        hook = _Hook(self.build, work, inner.get("optimized_attention_override"))
        inner["optimized_attention_override"] = hook
        if self.build.marks == "dit":
            replaced = inner.setdefault("patches_replace", {}).setdefault("dit", {})
            for part, count in self.build.blocks:
                for n in range(count):
                    replaced[f"{part}_block", n] = _Mark(part, n, replaced.get((f"{part}_block", n)))
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, hook.network_call, options, is_model_options=True)
        return options


class _Mark:
    """A `patches_replace["dit"]` patch that says which block runs."""

    def __init__(self, part, number, previous):
        self.part, self.number, self.previous = part, number, previous

    def __call__(self, args, extra):
        options = args["transformer_options"] | {"block_type": self.part, "block_index": self.number}
        args = args | {"transformer_options": options}
        return self.previous(args, extra) if self.previous is not None else extra["original_block"](args)


class _Hook:
    """An `optimized_attention_override`, and the APPLY_MODEL wrapper that gives it a fresh count for every call."""

    def __init__(self, build: Build, work: dict, previous):
        self.build, self.work, self.previous = build, work, previous

    def network_call(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        space = tuple(x.shape[2:])
        grid = tuple(-(-side // patch) for side, patch in zip(((1,) * (3 - len(space)) + space), self.build.patch))
        count = {"size": space[-2:], "grid": grid, "calls": 0, "sites": {}}
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options | {_KEY: count}, **kwargs)
        layers = sum(n for _, n in self.build.blocks)
        if self.build.marks == "count" and count["calls"] != layers:
            raise ValueError(
                f"{count['calls']} attentions ran where this model has {layers}: a patch on the model skips blocks or adds "
                "to them, so they cannot be told apart. Bypass it while attention control is connected."
            )
        return out

    def __call__(self, func, *args, **kwargs):
        given = _Given(func, self.previous, args, kwargs)
        options = kwargs.get("transformer_options") or {}
        found = self._find(options)
        if found is None:
            return given.run()
        (layer, work), site = found
        frames, *grid = options[_KEY]["grid"]
        where = {"options": options, "size": options[_KEY]["size"], "grid": tuple(grid)}
        q, k, v = map(given.inside, (given.q, given.k, given.v))
        if site != JOINT:
            q, k, v = (t.flatten(2) for t in (q, k, v))
            previous = None if self.previous is None else functools.partial(given.flat, False)
            call = AttentionCall(**where, heads=given.heads, rows=len(q), frames=frames, model=functools.partial(given.flat, True),
                                 previous=previous)
            return given.outside(work(layer, q, k, v, call).unflatten(-1, (given.heads, -1)))
        tokens = frames * math.prod(grid)
        first = 0 if self.build.picture == "first" else self._first(q.shape[1], tokens, options)
        call = JointCall(**where, k=k, v=v, mask=given.mask, run=given.attention, image=slice(first, first + tokens))
        return given.outside(work(layer, q, k, v, call))

    def _first(self, tokens, picture, options):
        """Where the picture begins: before the references and its own padding."""
        behind = sum(options.get("reference_image_num_tokens", ())) + -picture % self.build.padded
        return tokens - picture - behind

    def _find(self, options):
        """((layer, work), site) of this call, or None where nothing is to be done."""
        count = options.get(_KEY)
        if count is None:
            return None
        number, count["calls"] = count["calls"], count["calls"] + 1
        if self.build.marks == "count":
            place = _nth(self.build.blocks, number)
        else:
            place = options.get("block_type") or self.build.blocks[0][0], options.get("block_index")
            if place[1] is None:
                return None
        nth = count["sites"].get(place, 0)
        count["sites"][place] = nth + 1
        if place is None or nth >= len(self.build.sites):
            return None
        site = self.build.sites[nth]
        do = self.work.get(((*place, 0), site))
        return None if do is None else (do, site)


def _nth(blocks, number):
    for part, count in blocks:
        if 0 <= number < count:
            return part, number
        number -= count
    return None


class _Given:
    """One call of attention as the network made it, and how to make another like it. Inside, tensors are [rows, tokens,
    heads, width of a head].
    """

    _NAMES = ("q", "k", "v", "heads", "mask")

    def __init__(self, func, previous, args, kwargs):
        self._func, self._previous, self._args, self._kwargs = func, previous, args, kwargs
        self.q, self.k, self.v, self.heads, self.mask = (
            args[n] if n < len(args) else kwargs.get(name) for n, name in enumerate(self._NAMES))
        self._by_head, self._out_by_head = (kwargs.get(f"skip_{part}reshape", False) for part in ("", "output_"))

    def run(self, plain=False, **changed):
        """On the network's own shapes; `plain` without another pack's attention.

        Args:
            changed: other values of arguments, each given as the network gave it (other packs may look for one by name).
        """
        args, more = list(self._args), dict(self._kwargs)
        for name, value in changed.items():
            at = self._NAMES.index(name) if name in self._NAMES else len(args)
            if at < len(args):
                args[at] = value
            elif name in more or value is not None:
                more[name] = value
        call = self._func if plain or self._previous is None else functools.partial(self._previous, self._func)
        return call(*args, **more)

    def inside(self, tensor):
        if tensor.ndim == 4 and not self._by_head:  # SD3 leaves its values by head
            return tensor
        return tensor.transpose(1, 2) if self._by_head else tensor.unflatten(-1, (self.heads, -1))

    def outside(self, out):
        return out.transpose(1, 2) if self._out_by_head else out.flatten(2)

    def attention(self, q, k, v, mask, options, plain):
        q, k, v = (t.transpose(1, 2) if self._by_head else t.flatten(2) for t in (q, k, v))
        out = self.run(plain, q=q, k=k, v=v, mask=mask, transformer_options=options)
        return out.transpose(1, 2) if self._out_by_head else out.unflatten(-1, (self.heads, -1))

    def flat(self, plain, q, k, v, options):
        """On [rows, tokens, width], with the mask that was given."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        return self.attention(q, k, v, self.mask, options, plain).flatten(2)
