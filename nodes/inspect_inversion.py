"""A look at an inversion: pictures along its path, its noise against theory, its errors."""

from dataclasses import dataclass

import comfy.model_management
import latent_preview
import torch
from comfy_api.latest import io, ui
from einops import repeat

from ..samplers.methods import inversion_statistics
from ..samplers.methods.record import Inversion
from . import sockets
from .drawing.card import MEASURED, THEORY, Card, Chart, Series
from .drawing.pixels import decoded, to_batch, to_image
from .feedback import show
from .inversion_inputs import CATEGORY, latent_size

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
                io.Image.Output(display_name="picture", tooltip="What the node shows, one for each picture of a "
                                "batch."),
                io.String.Output(display_name="summary", tooltip="The numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, inversion, vae=None, reconstruction=None):
        decode = _with_vae(inversion, vae) if vae is not None else _preview(inversion)
        findings = _Findings(
            noise=inversion_statistics.noise(inversion),
            replays=inversion_statistics.replay_errors(inversion),
            compared=None if reconstruction is None else _compared(inversion, reconstruction, vae),
        )
        summary = _summary(inversion, findings)
        picture = to_batch([_card(inversion, b, decode, findings) for b in range(min(inversion.batch, CARDS))])
        show(cls, summary)
        return io.NodeOutput(
            picture.to(comfy.model_management.intermediate_device()), summary,
            ui=ui.PreviewImage(picture, cls=cls).as_dict() | {"text": [summary]},
        )


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """The numbers of an inversion.

    Attributes:
        noise: `inversion_statistics.noise`.
        replays: `inversion_statistics.replay_errors`.
        compared: `_compared` with a reconstruction, or None.
    """

    noise: inversion_statistics.Noise
    replays: torch.Tensor | None
    compared: tuple[list[str], str] | None


def _preview(inversion: Inversion):
    """The preview decoder: latent [1, C, H, W] in the model's space to a PIL picture."""
    latent_format, device = inversion.latent_format, comfy.model_management.get_torch_device()
    previewer = latent_preview.get_previewer(device, latent_format)
    if previewer is None and latent_format.latent_rgb_factors is not None:  # previews are switched off
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape,
        )
    if previewer is None:  # a format without colours: the mean of its channels
        return lambda latent: latent_preview.preview_to_image(repeat(_first_frame(latent).mean(0) / 2, "h w -> h w c", c=3))
    return lambda latent: previewer.decode_latent_to_preview(latent.to(device))


def _first_frame(latent):
    """[C, H, W] of [1, C, H, W], or of a video's [1, C, T, H, W]."""
    return latent[0, :, 0] if latent.ndim == 5 else latent[0]


def _with_vae(inversion: Inversion, vae):
    """As `_preview`, by the VAE."""

    def decode(latent):
        return to_image(decoded(vae, inversion.latent_format.process_out(latent))[0, ..., :3])

    return decode


def _compared(inversion: Inversion, reconstruction, vae):
    """(values [B], name of the number) of a reconstruction against the encoded picture."""
    samples, picture = reconstruction["samples"].float().cpu(), inversion.latents[-1][: inversion.pictures]
    if samples.shape != picture.shape:
        raise ValueError(
            f"The reconstruction has the shape {list(samples.shape)}, the inverted picture {list(picture.shape)}: "
            "connect the latent that an edit of this inversion gives."
        )
    if vae is None:
        difference = inversion.latent_format.process_in(samples) - picture
        error = inversion_statistics.rms(difference) / inversion_statistics.rms(picture)
        return [f"{100 * float(e):.2g} %" for e in error] * inversion.draws, "picture error"
    a, b = (decoded(vae, x)[..., :3].double().cpu() for x in (samples, inversion.latent_format.process_out(picture)))
    mse = (a - b).square().reshape(len(samples), -1).mean(1)
    return [f"{float(-10 * e.clamp(min=1e-12).log10()):.1f} dB" for e in mse] * inversion.draws, "PSNR to picture"


def _card(inversion: Inversion, b, decode, findings: _Findings):
    """The picture for picture b of the batch."""
    n, noise = inversion.steps, findings.noise
    levels = sorted({round(k * n / (COLUMNS - 1)) for k in range(COLUMNS)})
    columns = max(len(levels), 6)
    card = Card()
    card.title(
        inversion.method[:1].upper() + inversion.method[1:], f"{latent_size(inversion)}   {inversion.model}",
        f"picture {b + 1} of {inversion.batch}" if inversion.batch > 1 else "",
    )
    card.numbers(_numbers(inversion, b, findings))
    path = [inversion.latents[i][b : b + 1] / inversion.kind.power(float(inversion.sigmas[i])) ** 0.5 for i in levels]
    sigmas = [f"sigma {float(inversion.sigmas[i]):.3g}" for i in levels]
    card.strip("Path", [decode(y) for y in path], captions=sigmas,
               line="the latent at each noise level, brought to equal contrast", columns=columns)
    ahead = [inversion_statistics.predictions(inversion, i)[b : b + 1] if i < n else path[-1] for i in levels]
    card.strip("Prediction", [decode(d) for d in ahead], line="the picture that each step heads for", columns=columns)
    if noise.what == "noise maps":
        rough = _preview(inversion)
        shown = [inversion.residuals[i][b : b + 1] for i in levels if i in noise.steps]
        card.strip("Noise maps", [rough(z / z.std()) for z in shown],
                   line="structure of the picture shows where predictions miss it", columns=columns)
    charts = [
        Chart(title=f"Variance of the {noise.what}", steps=noise.steps, log=noise.what == "noise maps",
              series=_against_theory(noise.variances[:, b], noise.expected)),
        Chart(title=f"Norm of the {noise.what}", steps=noise.steps,
              series=_against_theory(noise.norms[:, b], noise.expected_norms)),
    ]
    if inversion.residuals is not None:
        errors = [float(e) if e > 0 else None for e in findings.replays[:, b]]
        if any(errors):
            series = [Series(values=errors, name="share of the picture", colour=MEASURED)]
            charts.append(Chart(title="Replay error", steps=list(range(n)), series=series, log=True))
    card.charts(charts)
    return card.image()


def _against_theory(measured, expected):
    """Two lines of a chart."""
    return [
        Series(values=measured.tolist(), name="measured", colour=MEASURED),
        Series(values=expected.tolist(), name="theory", colour=THEORY, dashed=True),
    ]


def _numbers(inversion: Inversion, b, findings: _Findings):
    """(value, name) of the numbers of picture b."""
    ratio = float((findings.noise.variances[:, b] / findings.noise.expected).mean())
    items = [(str(inversion.steps), "steps"), (f"{ratio:.2f} x", "noise / theory")]
    cfg = inversion.settings.get("cfg")
    if isinstance(cfg, (int, float)):
        items.insert(1, (f"{cfg:g}", "guidance (cfg)"))
    if inversion.residuals is not None:
        items.append((f"{float(findings.replays[:, b].max()):.1e}", "replay error"))
    if findings.compared is not None:
        values, name = findings.compared
        items.append((values[b], name))
    return items


def _summary(inversion: Inversion, findings: _Findings):
    """The numbers as text."""
    noise, compared = findings.noise, findings.compared
    settings = ", ".join(f"{k} {v}" for k, v in inversion.settings.items() if not isinstance(v, (dict, list)))
    lines = [
        f"{inversion.method}: {inversion.steps} steps, sigma {float(inversion.sigmas[0]):.4g} to "
        f"{float(inversion.sigmas[-1]):.4g}, {inversion.batch} x {latent_size(inversion)}",
        f"model: {inversion.model}",
        f"settings: {settings or 'none noted'}",
    ]
    if inversion.overrides:
        embeddings = [f"{k} {list(v.shape)}" for k, v in inversion.overrides.items()]
        lines.append(f"per-step embeddings: {', '.join(embeddings)}")
    for b in range(inversion.batch):
        of = f"picture {b + 1}: " if inversion.batch > 1 else ""
        ratio = (noise.variances[:, b] / noise.expected).tolist()
        error = "exact by definition (the path is the source)"
        if inversion.residuals is not None:
            error = f"{findings.replays[:, b].max():.1e}"
        line = f"{of}variance of the {noise.what} / theory {min(ratio):.3g} to {max(ratio):.3g}; replay error {error}"
        lines.append(line if compared is None else f"{line}; {compared[1]} {compared[0][b]}")
    return "\n".join(lines)


NODES = [InspectInversion]
