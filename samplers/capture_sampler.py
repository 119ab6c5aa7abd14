"""The SAMPLER object that captures a source's attention into a store to keep."""

import logging
from collections.abc import Sequence

import comfy.model_management
import torch
from tqdm.auto import trange

from ..attention_hooks.edits import Control
from ..attention_hooks.run import open_source
from ..attention_hooks.store import AttentionStore
from . import models
from .inverters import can_batch_levels
from .methods.record import Inversion
from .overrides import Overrides
from .phased import PhasedSampler, Run


class CaptureSampler(PhasedSampler):
    """Runs the source pass of attention controls along a path; `store` then holds what they read, in host memory.

    Run it with a guider whose negative is the edit's; the positive is not evaluated.

    Args:
        inversion: the path.
        controls: `edits.Control`s.
        dtype: of the kept tensors.
        all_steps: whether every step holds what any step reads, so that windows may be changed later.
    """

    phase = "capturing"

    def __init__(self, inversion: Inversion, controls: Sequence[Control], dtype=torch.float16, all_steps=False):
        self.inversion, self.controls, self.dtype, self.all_steps = inversion, tuple(controls), dtype, all_steps
        self.store = None

    def run(self, run: Run) -> torch.Tensor:
        path, steps = self.inversion, run.steps
        models.check(run.model, path)
        prescribed = Overrides(run, path)
        source = open_source(
            controls=self.controls, guider=run.guider, path=path, start=path.start_of(run.sigmas), steps=steps,
            options=prescribed.extra_args["model_options"], store=AttentionStore("cpu", self.dtype),
            batch_levels=can_batch_levels({}, run.options), **run.encoding,
        )
        wanted = [source.needs(step) for step in range(steps)]
        if self.all_steps:
            wanted = [set().union(*wanted)] * steps
        self._check_size(sum(source.nbytes(slots, self.dtype.itemsize) for slots in wanted), steps)
        bar, step = trange(steps, disable=run.quiet), 0
        with bar:
            while step < steps:
                comfy.model_management.throw_exception_if_processing_interrupted()
                prescribed.apply(source.start + step)
                together = source.ahead(step, wanted.__getitem__)
                source.fill(together)
                step += len(together)
                bar.update(len(together))
                here = path.latents[source.start + step - 1].to(run.device)
                run.show(step - 1, path.latents[-1].to(run.device), here, steps)
                self.tell(f"{self.phase} {step}/{steps}")
        source.store.origin = source.origin(range(steps))
        self.store = source.store
        return path.latents[-1].to(run.device)

    @staticmethod
    def _check_size(needed, steps):
        """Tell the size beforehand, and refuse what does not fit into half of the free host memory.

        Raises:
            ValueError: with the numbers.
        """
        free = comfy.model_management.get_free_memory(torch.device("cpu"))
        told = f"{needed / 2**30:.2f} GB of host memory for {steps} steps"
        logging.info("LEDITS: Capture Attention keeps %s.", told)
        if needed == 0:
            raise ValueError(
                "The connected attention controls read nothing of the source in these steps: check windows."
            )
        if needed > free / 2:
            raise ValueError(
                f"Capture Attention would keep {told}, but only {free / 2**30:.2f} GB are free (half of it may be "
                "used). Choose float16, fewer blocks, shorter windows, or skip more steps; without a store the sampler "
                "needs a few steps' worth only."
            )
