"""An inversion taken apart into stock sockets, and put together again."""

from comfy_api.latest import io
from einops import rearrange

from ..samplers.methods.record import check_sigmas
from . import sockets
from .inversion_inputs import CATEGORY


def _flat(batch):
    """[N, B, ...] to one LATENT batch [N * B, ...]: level by level, the pictures of a level together."""
    return rearrange(batch, "n b ... -> (n b) ...")


class UnpackInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_UnpackInversion",
            display_name="Unpack Inversion",
            category=CATEGORY,
            description="Gives the latents and noise maps of an inversion as LATENT batches, so that any node can read "
            "or change them. Pack Inversion puts them back.",
            inputs=[sockets.Inversion.Input("inversion", tooltip="The inversion to take apart.")],
            outputs=[
                io.Latent.Output(display_name="path", tooltip="The latent at every noise level, noisiest first; the "
                                 "last is the picture. N + 1 levels, the pictures of a level together."),
                io.Latent.Output(display_name="noise_maps", tooltip="Noise map z of every step, noisiest first. Where "
                                 "a step adds no noise (the last), the map is the step's residual itself. Empty where "
                                 "the method has none."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels, N + 1."),
            ],
        )

    @classmethod
    def execute(cls, inversion):
        path = {"samples": _flat(inversion.latent_format.process_out(inversion.latents))}
        empty = inversion.latents[:0]
        maps = {"samples": _flat(empty if inversion.residuals is None else inversion.noise_maps())}
        return io.NodeOutput(path, maps, inversion.sigmas.clone())


class PackInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_PackInversion",
            display_name="Pack Inversion",
            category=CATEGORY,
            description="Puts changed latents, noise maps or noise levels back into an inversion. What is not "
            "connected stays as it was.",
            inputs=[
                sockets.Inversion.Input("inversion", tooltip="The inversion the parts come from."),
                io.Latent.Input("path", optional=True, tooltip="Latents in the order Unpack Inversion gives them."),
                io.Latent.Input("noise_maps", optional=True, tooltip="Noise maps in the order Unpack gives them."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels, as many as the inversion has."),
            ],
            outputs=[sockets.Inversion.Output(display_name="inversion", tooltip="The changed inversion.")],
        )

    @classmethod
    def execute(cls, inversion, path=None, noise_maps=None, sigmas=None):
        latents, maps = inversion.latents, None if inversion.residuals is None else inversion.noise_maps()
        if path is not None:
            samples = cls._shaped(path, inversion.latents.shape, "path")
            latents = inversion.latent_format.process_in(samples)
        if noise_maps is not None and noise_maps["samples"].numel():
            shape = (inversion.steps, *inversion.latents.shape[1:])
            maps = cls._shaped(noise_maps, shape, "noise_maps")
        if sigmas is not None:
            check_sigmas(sigmas, inversion.kind)
            if sigmas.shape != inversion.sigmas.shape:
                raise ValueError(f"SIGMAS hold {len(sigmas)} levels; this inversion has {len(inversion.sigmas)}.")
        return io.NodeOutput(inversion.with_parts(latents, maps, sigmas))

    @staticmethod
    def _shaped(latent, shape, name):
        """A LATENT batch as [levels, B, ...]."""
        samples = latent["samples"].float().cpu()
        if samples.shape != (shape[0] * shape[1], *shape[2:]):
            raise ValueError(
                f"{name} has shape {list(samples.shape)}; this inversion needs {[shape[0] * shape[1], *shape[2:]]} "
                f"({shape[0]} levels of {shape[1]} picture{'s' * (shape[1] > 1)})."
            )
        if not samples.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers: look at the node that changed it.")
        return samples.view(shape)


NODES = [UnpackInversion, PackInversion]
