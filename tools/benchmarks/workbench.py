"""What the benchmark measures with: a model and its runs in this process, and the clock."""

import contextlib
import logging
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from .. import inside_comfyui
from .speed_models import FLUX, SD15, SMALL, TINY, RandomText, random_flux, random_model

ROOT = Path(__file__).resolve().parents[2]
CONCEPTS = ("star", "red")
RANDOM = {"tiny": (TINY, 16), "small": (SMALL, 64), "sd15": (SD15, 64)}  # U-Nets, and the side of their latents
SOURCE, TARGET = "a blue circle on a grey ground", "a blue heart on a grey ground"


def prepare():
    """ComfyUI can be imported, and is quiet."""
    inside_comfyui.prepare()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    logging.disable(logging.WARNING)


def environment(**more):
    """The environment of a process like this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


class Bench:
    """A model, what the cases run on it, and the clock."""

    SOURCE, TARGET = SOURCE, TARGET

    def __init__(self, options):
        import comfy.sd
        import torch

        from ...demo import loader

        self.options, self.steps, self.skip = options, options.steps, round(0.36 * options.steps)
        self.clip = self.vae = None
        self.wide = options.model in ("sd15", "flux")  # seconds a row on a CPU
        self.conds = {}  # prompts that are encoded already
        if options.model in RANDOM:
            unet, side = RANDOM[options.model]
            self.model, self.clip = random_model(unet), RandomText(unet["context_dim"])
            if options.model == "small":  # whose pictures are real ones
                self.vae = loader.load()[2]
        elif options.model == "flux":
            self.model, self.clip, side = random_flux(), RandomText(FLUX["context_in_dim"], FLUX["vec_in_dim"]), 64
        elif options.model in ("demo", "demo-flow"):
            (self.model, self.clip, self.vae), side = (loader.load if options.model == "demo" else loader.load_flow)(), 16
        else:
            self.model, self.clip, self.vae, *_ = comfy.sd.load_checkpoint_guess_config(options.model)
            side = 64
        side = options.size or side
        self.shape = (self.model.model.latent_format.latent_channels, side, side)
        self.cuda, self.device = torch.cuda.is_available(), self.model.load_device

    def cond(self, text):
        """CONDITIONING of a prompt; encoded once, as in a graph."""
        if text not in self.conds:
            self.conds[text] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        return self.conds[text]

    def latent(self, pictures):
        import torch

        generator = torch.Generator().manual_seed(7)
        picture = torch.randn(pictures, *self.shape, generator=generator)
        return {"samples": self.model.model.latent_format.process_out(picture)}

    def invert(self, pictures=1, source=SOURCE, cfg=3.5, steps_at_once=0, sigmas=None, latent=None):
        """The NodeOutput of an inversion."""
        from ...nodes.edit_friendly_inversion import EditFriendlyInversion

        return EditFriendlyInversion.execute(
            model=self.model, positive=self.cond(source), negative=self.cond(""),
            latent=latent or self.latent(pictures), cfg=cfg, steps=self.steps, scheduler="ddim_uniform", eta=1.0,
            seed=0, sigmas=sigmas, steps_at_once=steps_at_once)

    def concepts(self, words=CONCEPTS, warmup=2, momentum=0.3):
        from ...samplers.methods.sega import Concept

        return tuple(Concept(conditioning=self.cond(word), direction=1, scale=7.0, threshold=0.9, warmup=warmup,
                             momentum_scale=momentum, momentum_beta=0.6) for word in words)

    @contextlib.contextmanager
    def larger(self):
        """Latents of twice the height and width meanwhile."""
        before = self.shape
        self.shape = (before[0], 2 * before[1], 2 * before[2])
        try:
            yield
        finally:
            self.shape = before

    def methods(self, latent=None):
        """{name: a function that gives the NodeOutput of an inversion}, one for each method."""
        from ...nodes import ddim_inversions, learned_inversions

        most = 2 if self.options.quick else None
        own = {"model": self.model, "positive": self.cond(SOURCE), "negative": self.cond(""), "latent": latent or self.latent(1),
               "steps": self.steps, "scheduler": "ddim_uniform"}
        exact = own | {"cfg": 1.0, "tolerance": 0.0, "convention": "A"}
        inverted = exact | {"path": {"path": "inverted"}}
        learned = own | {"cfg": 7.5, "learning_rate": 0.01, "early_stop": 1e-5,
                         "on_interrupt": learned_inversions.ON_INTERRUPT[0]}
        return {
            "DDIM": lambda: ddim_inversions.DDIMInversion.execute(**inverted, refinements=0),
            "refined DDIM": lambda: ddim_inversions.DDIMInversion.execute(**inverted, refinements=1),
            "edit-friendly": lambda: self.invert(),
            "Direct": lambda: ddim_inversions.DirectInversion.execute(
                **exact, refinements=0, ablation={"ablation": "none"}),
            "negative-prompt": lambda: ddim_inversions.NegativePromptInversion.execute(
                **inverted, refinements=0, interpolation=0.0),
            "null-text": lambda: learned_inversions.NullTextInversion.execute(**learned, inner_steps=most or 10),
            "StyleDiffusion": lambda: learned_inversions.StyleDiffusionInversion.execute(
                **learned, first_steps=most or 100, attention_loss=1.0, tau_v=0.5),
        }

    def noise_path(self, pictures=1, steps=None):
        """A path that is made without the network."""
        from ...nodes.sdedit import SDEditPath

        return SDEditPath.execute(model=self.model, latent=self.latent(pictures), steps=steps or self.steps,
                                  scheduler="ddim_uniform", seed=0)[0]

    def prompts(self):
        """`EditPrompts` of source and target."""
        from ...attention_hooks.text.prompts import edit_prompts

        return edit_prompts(self.clip, SOURCE, TARGET)

    def prompt_to_prompt(self, cross=0.8, layout=0.4):
        from ...attention_hooks.controls.p2p import PromptToPrompt

        return PromptToPrompt(prompts=self.prompts(), cross=(0.0, cross), self_=(0.0, layout))

    def masactrl(self):
        from ...attention_hooks.controls.masactrl import MasaCtrl

        return MasaCtrl(prompts=self.prompts())

    def plug_and_play(self):
        from ...attention_hooks.controls.pnp import PlugAndPlay

        return PlugAndPlay(prompts=self.prompts())

    def capture(self, inversion, controls):
        """The NodeOutput of Capture Attention for an edit without skip."""
        from ...nodes.capture_attention import CaptureAttention

        return CaptureAttention.execute(
            model=self.model, negative=self.cond(""), inversion=inversion, attention=controls, skip=0)

    def edit(self, inversion, target=TARGET, cfg=7.5, skip=None, concepts=None, solver="ddpm", attention=None,
             store=None):
        """The NodeOutput of an edit."""
        from ...nodes.sampling import LeditsKSampler

        return LeditsKSampler.execute(
            model=self.model, positive=self.cond(target), negative=self.cond(""), inversion=inversion, cfg=cfg,
            skip=self.skip if skip is None else skip, concepts=self.concepts() if concepts is None else concepts,
            solver=solver, attention=attention, store=store)

    def ksampler(self, pictures=1, steps=None):
        """ComfyUI's own KSampler with a prompt and cfg."""
        import nodes

        return nodes.common_ksampler(self.model, 0, steps or self.steps, 7.5, "euler", "ddim_uniform",
                                     self.cond(TARGET), self.cond(""), self.latent(pictures))

    def times(self, **sides):
        """Median seconds of each function; they run in turns, after one run of each to warm up."""
        import torch

        found = {name: [] for name in sides}
        for repetition in range(-1, self.options.repeat):
            for name, function in sides.items():
                start = time.perf_counter()
                function()
                if self.cuda:
                    torch.cuda.synchronize()
                if repetition >= 0:
                    found[name].append(time.perf_counter() - start)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def bare(self, run):
        """A function that repeats the network's calls of `run()` and does nothing else; and the rows of those calls."""
        calls, network = [], self.model.model.diffusion_model

        def watch(args, kwargs):
            options = kwargs.get("transformer_options", {})
            plain = {name: value for name, value in options.items() if not name.startswith("patches")}
            calls.append((args, {**kwargs, "transformer_options": plain}))

        self._watched(watch, run)

        def again():
            for args, kwargs in calls:
                network(*args, **kwargs)

        return again, sum(len(args[0]) for args, _ in calls)

    def counted(self, run):
        """U-Net rows forward and backward of `run()`, and its seconds."""
        import torch

        calls = []
        start = time.perf_counter()
        self._watched(lambda args, kwargs: calls.append((len(args[0]), torch.is_grad_enabled())), run)
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return sum(rows for rows, _ in calls), sum(rows for rows, differentiated in calls if differentiated), seconds

    def _watched(self, watch, run):
        network = self.model.model.diffusion_model
        hook = network.register_forward_pre_hook(lambda module, args, kwargs: watch(args, kwargs), with_kwargs=True)
        try:
            run()
        finally:
            hook.remove()


@contextlib.contextmanager
def pytorch_attention(wanted=True):
    """PyTorch's attention meanwhile: ComfyUI's on an NVIDIA card, and elsewhere with --use-pytorch-cross-attention."""
    if not wanted:
        yield
        return
    before = _use_attention("attention_pytorch")
    try:
        yield
    finally:
        _use_attention(before)


def _use_attention(name):
    """Let ComfyUI's networks use one of its attention functions, and return the name of what they used before.

    (Not by an `optimized_attention_override`: who edits must be ready for one that compares rows, and evaluates more.)
    """
    from comfy.ldm.modules import attention

    before, after = attention.optimized_attention, getattr(attention, name)
    for module in list(sys.modules.values()):
        for own in ("optimized_attention", "optimized_attention_masked"):
            if getattr(module, "__dict__", {}).get(own) is before:
                setattr(module, own, after)
    return before.__name__


def forget_peak():
    """Start `peak_memory` anew, where the system can: loading the weights peaks higher than using them."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Bytes at the peak: of the GPU's tensors, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if platform.system() == "Windows":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    if sys.platform == "linux":  # ru_maxrss is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
