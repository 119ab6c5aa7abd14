"""SAMPLER objects that name their phase, beside the progress and previews of ComfyUI's callback."""

import comfy.samplers


class PhasedSampler(comfy.samplers.Sampler):
    """A SAMPLER that names what it is doing: "inverting 12/50".

    Attributes:
        phase: what it does, in a word or two.
    """

    phase = ""

    def tell(self, text):
        """Does nothing; the caller may replace it with a function `(text) -> None` that displays the text."""
