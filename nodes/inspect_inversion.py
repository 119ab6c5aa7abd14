"""A look at an inversion: pictures along its path, its noise against theory, its errors."""

import comfy.model_management
import latent_preview
import numpy
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..samplers.methods import inversion_statistics
from . import sockets
from .drawing.card import MEASURED, THEORY, Card, Chart, Series
from .feedback import show

CATEGORY = "LEDITS/inversion"
COLUMNS = 8
CARDS = 16  # pictures of a batch that are drawn


class InspectInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LEDITS_InspectInversion",
            display_name="Inspect Inversion",
            category=CATEGORY,
            description="Shows an inversion: its path from noise to picture, what each step predicts, whether its "
            "noise is what theory expects, and how exactly it gives the picture back.",
            search_aliases=["preview inversion", "plot inversion", "noise maps"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                sockets.Inversion.Input("inversion", tooltip="The inversion to look at."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes the thumbnails truly. Without it they are the sampler's rough previews."),
                io.Latent.Input("reconstruction", optional=True,
                                tooltip="A latent to compare with the picture, such as an edit with the source prompt "
                                "at the inversion's guidance. Its error is shown."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="What the node shows, one for each picture of a batch."),
                io.String.Output(display_name="summary", tooltip="The numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, inversion, vae=None, reconstruction=None):
        decode = _with_vae(inversion, vae) if vae is not None else _preview(inversion)
        noise, replays = inversion_statistics.noise(inversion), inversion_statistics.replay_errors(inversion)
        against = None if reconstruction is None else _compared(inversion, reconstruction, vae)
        summary = _summary(inversion, noise, replays, against)
        cards = [_card(inversion, b, decode, noise, replays, against) for b in range(min(inversion.batch, CARDS))]
        picture = torch.stack([torch.from_numpy(numpy.asarray(card, numpy.float32) / 255) for card in cards])
        show(cls, summary)
        return io.NodeOutput(
            picture.to(comfy.model_management.intermediate_device()), summary,
            ui=ui.PreviewImage(picture, cls=cls).as_dict() | {"text": [summary]},
        )


def _preview(inversion):
    """The preview decoder: latent [1, C, H, W] in the model's space to a PIL picture."""
    own = inversion.latent_format
    chosen = latent_preview.get_previewer(comfy.model_management.get_torch_device(), own)
    if chosen is None and own.latent_rgb_factors is not None:  # previews are switched off
        chosen = latent_preview.Latent2RGBPreviewer(
            own.latent_rgb_factors, own.latent_rgb_factors_bias, own.latent_rgb_factors_reshape
        )
    if chosen is None:  # a format without colours: the mean of its channels
        return lambda latent: latent_preview.preview_to_image(latent[0].mean(0)[..., None].expand(-1, -1, 3) / 2)
    device = comfy.model_management.get_torch_device()
    return lambda latent: chosen.decode_latent_to_preview(latent.to(device))


def _with_vae(inversion, vae):
    """As `_preview`, by the VAE."""

    def decode(latent):
        pixels = vae.decode(inversion.latent_format.process_out(latent))[0, ..., :3]
        return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())

    return decode


def _compared(inversion, reconstruction, vae):
    """(values [B], name of the number) of a reconstruction against the encoded picture."""
    samples, picture = reconstruction["samples"].float().cpu(), inversion.latents[-1]
    if samples.shape != picture.shape:
        raise ValueError(
            f"The reconstruction has the shape {list(samples.shape)}, the inverted picture {list(picture.shape)}: "
            "connect the latent that an edit of this inversion gives."
        )
    if vae is None:
        error = inversion_statistics.rms(inversion.latent_format.process_in(samples) - picture) / inversion_statistics.rms(picture)
        return [f"{100 * float(e):.2g} %" for e in error], "picture error"
    a, b = (vae.decode(x)[..., :3].double().cpu() for x in (samples, inversion.latent_format.process_out(picture)))
    mse = (a - b).square().flatten(1).mean(1)
    return [f"{float(-10 * e.clamp(min=1e-12).log10()):.1f} dB" for e in mse], "PSNR to picture"


def _card(inversion, b, decode, noise, replays, against):
    """The picture for picture b of the batch."""
    n = inversion.steps
    levels = sorted({round(k * n / (COLUMNS - 1)) for k in range(COLUMNS)})
    columns = max(len(levels), 6)
    card = Card()
    card.title(
        inversion.method[:1].upper() + inversion.method[1:], f"{_size(inversion)}   {inversion.model}",
        f"picture {b + 1} of {inversion.batch}" if inversion.batch > 1 else "",
    )
    card.numbers(_numbers(inversion, b, noise, replays, against))
    path = [inversion.latents[i][b : b + 1] / inversion.kind.power(float(inversion.sigmas[i])) ** 0.5 for i in levels]
    sigmas = [f"sigma {float(inversion.sigmas[i]):.3g}" for i in levels]
    card.strip("Path", [decode(y) for y in path], sigmas, "the latent at each noise level, brought to equal contrast", columns)
    ahead = [inversion_statistics.predictions(inversion, i)[b : b + 1] if i < n else path[-1] for i in levels]
    card.strip("Prediction", [decode(d) for d in ahead], line="the picture that each step heads for", columns=columns)
    if noise.what == "noise maps":
        rough = _preview(inversion)
        shown = [inversion.residuals[i][b : b + 1] for i in levels if i in noise.steps]
        card.strip("Noise maps", [rough(z / z.std()) for z in shown],
                   line="structure of the picture shows where predictions miss it", columns=columns)
    theory = noise.expected.tolist()
    charts = [
        Chart(f"Variance of the {noise.what}", noise.steps, [
            Series(noise.variances[:, b].tolist(), "measured", MEASURED),
            Series(theory, "theory", THEORY, dashed=True),
        ], log=noise.what == "noise maps"),
        Chart(f"Norm of the {noise.what}", noise.steps, [
            Series(noise.norms[:, b].tolist(), "measured", MEASURED),
            Series(noise.expected_norms.tolist(), "theory", THEORY, dashed=True),
        ]),
    ]
    if inversion.residuals is not None:
        errors = [float(e) if e > 0 else None for e in replays[:, b]]
        if any(errors):
            charts.append(Chart("Replay error", list(range(n)), [Series(errors, "share of the picture", MEASURED)], log=True))
    card.charts(charts)
    return card.image()


def _size(inversion):
    return " x ".join(str(k) for k in inversion.latents.shape[2:])


def _numbers(inversion, b, noise, replays, against):
    ratio = float((noise.variances[:, b] / noise.expected).mean())
    items = [(str(inversion.steps), "steps"), (f"{ratio:.2f} x", "noise / theory")]
    cfg = inversion.settings.get("cfg")
    if isinstance(cfg, (int, float)):
        items.insert(1, (f"{cfg:g}", "guidance (cfg)"))
    if inversion.residuals is not None:
        items.append((f"{float(replays[:, b].max()):.1e}", "replay error"))
    if against is not None:
        items.append((against[0][b], against[1]))
    return items


def _summary(inversion, noise, replays, against):
    """The numbers as text."""
    settings = ", ".join(f"{k} {v}" for k, v in inversion.settings.items() if not isinstance(v, (dict, list)))
    lines = [
        f"{inversion.method}: {inversion.steps} steps, sigma {float(inversion.sigmas[0]):.4g} to "
        f"{float(inversion.sigmas[-1]):.4g}, {inversion.batch} x {_size(inversion)}",
        f"model: {inversion.model}",
        f"settings: {settings or 'none noted'}",
    ]
    if inversion.overrides:
        lines.append("per-step embeddings: " + ", ".join(f"{k} {list(v.shape)}" for k, v in inversion.overrides.items()))
    for b in range(inversion.batch):
        of = f"picture {b + 1}: " if inversion.batch > 1 else ""
        ratio = (noise.variances[:, b] / noise.expected).tolist()
        error = "exact by definition (the path is the source)" if inversion.residuals is None else f"{replays[:, b].max():.1e}"
        line = f"{of}variance of the {noise.what} / theory {min(ratio):.3g} to {max(ratio):.3g}; replay error {error}"
        lines.append(line if against is None else f"{line}; {against[1]} {against[0][b]}")
    return "\n".join(lines)


NODES = [InspectInversion]
