"""What a SAMPLER object says of its run, beside the progress and previews of ComfyUI's callback."""

import comfy.samplers


class PhasedSampler(comfy.samplers.Sampler):
    """A SAMPLER that names what it is doing: "inverting 12/50".

    Attributes:
        phase: what it does, in a word or two.
    """

    phase = ""

    def tell(self, text):
        """Says it to nobody. Whoever runs the sampler sets `tell` to its own `(text) -> None`."""
