"""Measure the demo model on held-out captions and pictures, through ComfyUI's own nodes.

    python tools/run.py training.evaluate --comfyui PATH [--network flow] [--weights FILE] [--captions 200]

Prints a table, and writes it and a sample grid to the model card (demo/README.md, demo/samples.jpg; of the flow network
demo/flow_samples.jpg).
What a sample shows is read by `tools/measure.py`, which is itself measured on the true pictures.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...demo import captions, pictures, scenes
from .. import contact_sheet, measure
from ..benchmarks import workbench

FOLDER = Path(__file__).resolve().parents[2] / "demo"
CARD = FOLDER / "README.md"
BEGIN = "<!-- measured: tools/training/evaluate.py writes what is between these marks -->"
FLOW_BEGIN = "<!-- measured, flow: tools/training/evaluate.py writes what is between these marks -->"
END = "<!-- end of measured -->"
FIRST_CAPTION, FIRST_PICTURE = 800_000, 850_000  # seeds of the scenes; training's begin at 10,000,000
SAMPLER = "euler"


@dataclass(frozen=True)
class Network:
    """How one of the demo networks is sampled and where its numbers go.

    Attributes:
        aims: colour and ground, and kind, of one thing.
    """

    weights: Path
    steps: int
    cfg: float
    scheduler: str
    begin: str
    grid: Path
    aims: tuple[int, int]


NETWORKS = {
    "U-Net": Network(FOLDER / "weights.safetensors", 30, 3.5, "normal", BEGIN, FOLDER / "samples.jpg", (90, 80)),
    "flow": Network(FOLDER / "flow.safetensors", 28, 3.0, "simple", FLOW_BEGIN, FOLDER / "flow_samples.jpg", (95, 85)),
}
AT_ONCE = 20  # samples in one batch


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI folder")
    parser.add_argument("--network", choices=list(NETWORKS), default="U-Net")
    parser.add_argument("--weights", type=Path, help="other weights of that network")
    parser.add_argument("--captions", type=int, default=200, help="how many of one thing; a quarter more of two")
    parser.add_argument("--pictures", type=int, default=100, help="how many the autoencoder is measured on")
    parser.add_argument("--no-card", action="store_true", help="only print")
    options = parser.parse_args(arguments)
    if options.comfyui is None or not (Path(options.comfyui) / "main.py").is_file():
        parser.error("give the folder of a ComfyUI with --comfyui")
    return options


def prompts(clip, texts):
    """CONDITIONING of one prompt for each picture of a batch."""
    import torch

    made = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
    pooled = torch.cat([more["pooled_output"] for _, more in made])
    return [[torch.cat([words for words, _ in made]), {"pooled_output": pooled}]]


def autoencoder(vae, count):
    """PSNR in dB of `count` held-out pictures after VAE Encode and VAE Decode."""
    import torch

    found = []
    for scene in pictures.held_out(FIRST_PICTURE, count):
        picture = scenes.render(scene)[0]
        rebuilt = vae.decode(vae.encode(torch.from_numpy(picture)[None]))[0].float().cpu().numpy()
        found.append(measure.psnr(picture, rebuilt))
    return np.array(found)


def samples(model, clip, vae, texts, network, progress):
    """What the model draws for texts, with KSampler: float32 [count, H, W, 3] in 0..1."""
    import torch

    import nodes

    drawn = []
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        empty = {"samples": torch.zeros(len(some), 4, 16, 16)}
        latent = nodes.common_ksampler(model, start, network.steps, network.cfg, SAMPLER, network.scheduler,
                                       prompts(clip, some), prompts(clip, [""]), empty)[0]
        drawn += list(vae.decode(latent["samples"]).float().cpu().clamp(0, 1).numpy())
        progress(f"{len(drawn)} of {len(texts)} samples")
    return drawn


def shares(drawn, wanted):
    """Shares of pictures that show what their scenes say: by feature, and "colour and ground"."""
    found = [measure.compare(measure.read(picture), scene) for picture, scene in zip(drawn, wanted)]
    found = [f | {"colour and ground": f["colour"] and f["ground"]} for f in found]
    return {key: float(np.mean([f[key] for f in found])) for key in found[0]}


def table(psnr, one, two, check, count, network):
    """The measured block of the card, in Markdown."""

    def line(what, found):
        return f"| {what} | " + " | ".join(
            f"{100 * found[key]:.1f} %" for key in ("colour and ground", "kind", "colour", "ground", "count")
        ) + " |"

    return "\n".join([
        f"Autoencoder, {len(psnr)} held-out pictures through VAE Encode and VAE Decode: PSNR {psnr.mean():.1f} dB on "
        f"average, {psnr.min():.1f} dB at worst (aim: 28 dB).",
        "",
        f"Samples for held-out captions: KSampler, {SAMPLER}, {network.steps} steps, cfg {network.cfg}. A feature is right when it is "
        "right for every thing of the caption, and a sample with a thing too many or too few has kind and colour "
        "wrong.",
        "",
        "| | colour and ground | kind | colour | ground | number of things |",
        "|---|---|---|---|---|---|",
        "| aim, one thing | {} % | {} % | | | |".format(*network.aims),
        line(f"{count} captions of one thing", one),
        line(f"{count // 4} captions of two things", two),
        line("the measuring itself, on the true pictures of the first", check),
    ])


def write_card(block, begin):
    text = CARD.read_text("utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{CARD} lacks the marks between which the numbers go: bring them back from git.")
    CARD.write_text(f"{before}{begin}\n{block}\n{END}{after}", "utf-8")


def main(arguments):
    options = parse(arguments)
    network = NETWORKS[options.network]
    os.environ["COMFYUI_PATH"] = str(options.comfyui)
    workbench.prepare()
    import torch

    from ...demo import loader

    def progress(text):
        print(text, flush=True)

    ones = pictures.held_out(FIRST_CAPTION, options.captions, things=1)
    twos = pictures.held_out(FIRST_CAPTION, options.captions // 4, things=2)
    texts = [captions.sentence(scene) for scene in ones + twos]
    with torch.inference_mode():
        load = loader.load_flow if options.network == "flow" else loader.load
        model, clip, vae = load(options.weights or network.weights)
        psnr = autoencoder(vae, options.pictures)
        progress(f"autoencoder: {psnr.mean():.1f} dB")
        drawn = samples(model, clip, vae, texts, network, progress)
    progress("looking at the samples ...")
    one, two = shares(drawn[: len(ones)], ones), shares(drawn[len(ones) :], twos)
    check = shares([scenes.render(scene)[0] for scene in ones], ones)
    block = table(psnr, one, two, check, options.captions, network)
    progress("\n" + block)
    if not options.no_card:
        write_card(block, network.begin)
        cells = list(zip(texts, drawn))[:14] + list(zip(texts, drawn))[len(ones) : len(ones) + 4]
        lines = [cells[i : i + 6] for i in range(0, len(cells), 6)]
        contact_sheet.draw([], lines).save(network.grid, quality=85)
        progress(f"\nwritten to {CARD} and {network.grid.name}")
    return 0
