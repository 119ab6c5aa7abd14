"""Feedback of a node at work: progress and previews as of the stock samplers, and the phase in words."""

import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy_execution.utils import get_executing_context

from ..samplers import published
from ..samplers.phased import PhasedSampler


def tell(text: str):
    """Show a line on the node that is being executed, where there is a server to show it."""
    context = get_executing_context()
    if context is not None and (server := _server()) is not None:
        server.send_progress_text(text, context.node_id, server.client_id)


def show(node, text: str):
    """Show a text on the node, where there is a server and a node to show it on."""
    shown = getattr(node.hidden, "unique_id", None)
    if shown is not None and (server := _server()) is not None:
        server.send_progress_text(text, shown)


def _server():
    """The web server, or None."""
    from server import PromptServer  # the web server, which a node alone does not have

    return getattr(PromptServer, "instance", None)


class Runs:
    """One progress bar over several runs of samplers, which `sample` then counts.

    Args:
        model: MODEL, whose latents are previewed.
        steps: of each run.
    """

    def __init__(self, model: ModelPatcher, steps):
        self._show, self._steps, self._run = latent_preview.prepare_callback(model, sum(steps)), list(steps), -1

    def next(self):
        """The next run begins."""
        self._run += 1

    def callback(self, step, d, y, total):
        """As a sampler calls it in its own run, whose progress may count other things than steps."""
        before, steps = sum(self._steps[: self._run]), self._steps[self._run]
        self._show(before + round((step + 1) / total * steps) - 1, d, y, sum(self._steps))

    def tell(self, text):
        """Show a line with the number of the run before it."""
        tell(f"{self._run + 1} of {len(self._steps)}: {text}")


def sample(guider: CFGGuider, sampler: PhasedSampler, samples, sigmas, *, mask=None, seed=0, runs: Runs | None = None):
    """Run a `PhasedSampler` over a picture, with feedback on the node.

    Args:
        samples: the picture, as in a LATENT.
        mask: MASK or None.
        seed: some conditionings compute with it; no noise is drawn.
        runs: the `Runs` that this is the next of.

    Returns:
        samples as in a LATENT, from the sampler.
    """
    callback, sampler.on_phase = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1), tell
    if runs is not None:
        runs.next()
        callback, sampler.on_phase = runs.callback, runs.tell
    sampler.tell("loading the model")
    return guider.sample(
        torch.zeros_like(samples), samples, sampler, sigmas, denoise_mask=mask, seed=seed,
        callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )


def guidance_note(model: ModelPatcher, conditioning: list) -> str:
    """What is to be known of the guidance of a guidance-distilled model's prompt."""
    if not published.guidance_missing(model, conditioning):
        return ""
    return "The prompt carries no guidance, so ComfyUI's own is taken: connect FluxGuidance to choose it"


def notes(*sentences: str) -> str:
    """Several notes as one; those that are empty are left out."""
    return ". ".join(filter(None, sentences))


def words(text: str):
    """Words that stay on the node when the job is over: for `NodeOutput.ui`, which web/js/ledits.js reads."""
    return {"ledits_words": [text]}


def saved_words(node, text: str):
    """The same for a file that was saved: `text` begins with its name in the output folder. Shown at once as well."""
    text = f"saved in ComfyUI's output folder:\n{text}"
    show(node, text)
    return words(text)


def costs(rows: int, steps: int, *, level: float | None = None, note: str = "", **more):
    """The cost of a node, on the node and for the history of the queue (`NodeOutput.ui`).

    Args:
        rows: network rows (pictures x predictions) that were evaluated.
        steps: of the path that ran.
        level: the noise level that an edit began at.
        note: a sentence more for the node, where something was chosen for the user.
        more: further numbers.
    """
    begun = "" if level is None else f" from noise level {level:.3g}"
    text = f"done: {counted(steps, 'step')}{begun}, {counted(rows, 'network evaluation')}" + (f". {note}" if note else "")
    tell(text)
    return {"ledits": [{"steps": steps, "unet_rows": rows, **({"note": note} if note else {}), **more}], **words(text)}


def counted(number: int, thing: str) -> str:
    """Such as "1 step", "2 steps"."""
    return f"{number} {thing}{'s'[: number != 1]}"
