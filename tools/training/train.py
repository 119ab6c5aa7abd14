"""Train the demo model from a seed: autoencoder, then text encoder and U-Net together.

    python tools/run.py training.train --comfyui PATH [--work .dev/train] [--seed 0] [--begin FILE]

Two CPU cores take about three hours; a GPU is used where there is one. Interrupt it at will: the same command resumes.
Sample grids and logs go to the work folder, the weights (float16 safetensors) to demo/weights.safetensors.
Every random draw is made from (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

import argparse
import functools
import multiprocessing
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...demo import nets
from . import train_autoencoder, train_unet
from .training import DEVICE, draw_pictures

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI folder (its CLIP tokenizer is used)")
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path,
                        help="stored weights to begin with (--vae-whole-steps 0 keeps the autoencoder)")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--vae-whole-steps", type=int, default=1500)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--pool", type=int, default=16_000, help="training pictures")
    parser.add_argument("--unet-steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument(
        "--workers", type=int, default=1 if DEVICE == "cuda" else 2, help="processes that share the U-Net's batch"
    )
    parser.add_argument("--compile", action="store_true",
                        help="compile the U-Net (a quarter faster; needs a C++ compiler)")
    return parser.parse_args(arguments)


def main(arguments):
    args = parse(arguments)
    sys.path.insert(0, str(args.comfyui))
    args.work.mkdir(parents=True, exist_ok=True)
    pictures = functools.cache(lambda: draw_pictures(6000, args.seed))
    if args.begin:
        vae = nets.load_diffusers(args.begin)[0].to(DEVICE, memory_format=torch.channels_last)
    else:
        vae = train_autoencoder.train(args, pictures, train_autoencoder.CROPS, args.vae_steps)
    vae = train_autoencoder.train(args, pictures, train_autoencoder.WHOLE, args.vae_whole_steps, vae)
    latents = train_autoencoder.encode_pool(args, vae)
    factors = train_autoencoder.preview_factors(latents, draw_pictures(min(1000, args.pool), args.seed))
    (args.work / "meeting").unlink(missing_ok=True)
    for rank in range(1, args.workers):
        multiprocessing.get_context("spawn").Process(target=train_unet.follow, args=(args, rank), daemon=True).start()
    unet, text, tokens = train_unet.train(args, vae, latents, factors)
    # The latents are fixed now, the decoder may still improve.
    vae = train_autoencoder.train(args, pictures, train_autoencoder.DECODER, args.decoder_steps, vae)
    save_file(nets.checkpoint(vae, unet, text, tokens.ids, factors), nets.WEIGHTS)
    print(f"{nets.WEIGHTS}: {nets.WEIGHTS.stat().st_size / 2**20:.1f} MiB")
