"""A full-size flow model with random weights, edited in a real ComfyUI server: does it run, and what memory does it take.

    python tools/run.py benchmarks.full_size --comfyui PATH [--side 512] [--steps 4]

SD3.5-medium's transformer (2.5 billion parameters, float16) and a CLIP-L are written with random numbers into a folder of
their own, loaded by the stock loaders of a server on the CPU, and removed afterwards. Printed is the peak memory of the
server's process while it samples with the stock KSampler, and while it inverts and edits a picture with the same steps.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from .. import inside_comfyui
from ..api.client import ComfyClient
from ..server import free_port
from ..setup import link_pack

MODEL, TEXT = "random sd3.5 medium.safetensors", "random clip l.safetensors"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI folder")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args(arguments)


def random_weights(module, seed):
    """float16 tensors of a module made on the meta device, of sizes that keep what passes through finite."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            made = torch.empty(value.shape, dtype=torch.float16)
            for row in made.view(made.shape[0], -1).split(1024):
                row.copy_(torch.randn(row.shape, generator=generator) * value[0].numel() ** -0.5)
        else:
            made = torch.ones(value.shape, dtype=torch.float16) if name.endswith("weight") else torch.zeros(
                value.shape, dtype=torch.float16)
        out[name] = made
    return out


def write(models: Path):
    """The two files, in ComfyUI's own folders."""
    import comfy.ops
    import transformers
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    with torch.device("meta"):
        network = OpenAISignatureMMDITWrapper(
            input_size=None, pos_embed_scaling_factor=None, pos_embed_max_size=384, patch_size=2, in_channels=16,
            depth=24, num_patches=384**2, adm_in_channels=2048, qk_norm="rms", x_block_self_attn_layers=list(range(13)),
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    for folder, name, module, seed in (("diffusion_models", MODEL, network, 0), ("text_encoders", TEXT, text, 1)):
        (models / folder).mkdir(parents=True, exist_ok=True)
        weights = random_weights(module, seed)
        if module is text:
            weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in weights.items()}
        save_file(weights, models / folder / name)
        print(f"{name}: {sum(v.numel() for v in weights.values()) / 1e9:.2f} billion parameters", flush=True)


@contextlib.contextmanager
def server(comfyui: Path, base: Path, log: Path):
    """(client, process id) of a server on the CPU."""
    port = free_port()
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", base, "--disable-auto-launch"]
    with log.open("w") as out, subprocess.Popen(command, cwd=comfyui, stdout=out, stderr=out) as process:
        try:
            client, end = ComfyClient(f"http://127.0.0.1:{port}"), time.monotonic() + 300
            while True:
                try:
                    client.ask_json("/queue")
                    break
                except Exception:
                    if process.poll() is not None or time.monotonic() > end:
                        raise
                    time.sleep(1)
            yield client, process.pid
        finally:
            process.terminate()


def memory(pid, name):
    """A line of /proc/<pid>/status in GiB: VmHWM is the peak since `forget`, VmRSS what is used now."""
    return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)) / 2**20


def forget(pid):
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graphs(side, steps):
    """{what: prompt}, each with all of the one before, so that only what is new runs."""
    base = {
        "model": node("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name=TEXT, type="sd3"),
        "source": node("CLIPTextEncode", text="a cat on a bench", clip=["clip", 0]),
        "target": node("CLIPTextEncode", text="a dog on a bench", clip=["clip", 0]),
        "latent": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
    }
    sampled = base | {
        "sampled": node("KSampler", model=["model", 0], positive=["target", 0], negative=["source", 0], seed=0, steps=steps,
                        cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0, latent_image=["latent", 0]),
        "saved": node("SaveLatent", samples=["sampled", 0], filename_prefix="plain"),
    }
    inverted = sampled | {
        "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["source", 0], negative=["source", 0],
                          latent=["sampled", 0], cfg=1.0, steps=steps, scheduler="simple", eta=1.0, seed=0),
        "inspect": node("LEDITS_InspectInversion", inversion=["inversion", 0]),
    }
    edited = inverted | {
        "again": node("LEDITS_KSampler", model=["model", 0], positive=["source", 0], negative=["source", 0],
                      inversion=["inversion", 0], cfg=1.0, skip=0),
        "back": node("SaveLatent", samples=["again", 0], filename_prefix="back"),
        "edit": node("LEDITS_KSampler", model=["model", 0], positive=["target", 0], negative=["source", 0],
                     inversion=["inversion", 0], cfg=1.0, skip=0),
        "kept": node("SaveLatent", samples=["edit", 0], filename_prefix="edit"),
    }
    return {"stock KSampler": sampled, "inversion": inverted, "reconstruction and edit": edited}


def main(arguments):
    args = parse(arguments)
    comfyui = Path(args.comfyui).resolve()
    sys.path.insert(0, str(comfyui))
    inside_comfyui.prepare(comfyui, cpu=True)

    with tempfile.TemporaryDirectory(prefix="full-size-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        write(base / "models")
        link_pack(base)
        with server(comfyui, base, base / "server.log") as (client, pid):
            latents = {}
            print(f"{args.side} x {args.side} px, {args.steps} steps, one thread count of {torch.get_num_threads()}")
            print(f"{'':24s} {'seconds':>8s} {'peak GiB':>9s} {'after GiB':>9s}")
            for what, prompt in graphs(args.side, args.steps).items():
                forget(pid)
                begun = time.monotonic()
                entry = client.run(prompt)
                print(f"{what:24s} {time.monotonic() - begun:8.1f} {memory(pid, 'VmHWM'):9.2f} {memory(pid, 'VmRSS'):9.2f}",
                      flush=True)
                for key in ("saved", "back", "kept"):
                    for file in entry["outputs"].get(key, {}).get("latents", []):
                        latents[key] = load(client.fetch(file))["latent_tensor"]
            error = (latents["back"] - latents["saved"]).abs().max() / latents["saved"].std()
            moved = (latents["kept"] - latents["saved"]).abs().max() / latents["saved"].std()
            print(f"reconstruction off by {float(error):.1e} of the latent's deviation at most, the edit moves {float(moved):.1e}")
    return 0
