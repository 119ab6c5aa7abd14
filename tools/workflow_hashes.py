"""Prints a hash of every latent that the example workflows of the demo model make: two versions that agree edit alike.

    python dev.py hashes                          # a server of this clone, with one thread
    python dev.py hashes --server http://...      # another version's server

Start the server with OMP_NUM_THREADS=1: sums over several threads are not the same from machine to machine.
"""
import argparse
import hashlib
import json
import struct
from pathlib import Path

from .api import workflow
from .api.client import ComfyClient

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
PICKERS = {"LEDITS_LoadInversion", "LEDITS_LoadAttentionStore"}  # their files are those that an earlier workflow saved


def with_latents_saved(prompt, info):
    """The prompt with a Save Latent behind every LATENT output, and {its id: name of the output}."""
    prompt, names = dict(prompt), {}
    for key in list(prompt):
        kind = prompt[key]["class_type"]
        for slot, wire in enumerate(info[kind]["output"]):
            if wire == "LATENT":
                saver = f"hash:{key}:{slot}"
                prompt[saver] = {"class_type": "SaveLatent", "_meta": {"title": saver},
                                 "inputs": {"samples": [key, slot], "filename_prefix": "hashes/latent"}}
                names[saver] = f"{prompt[key]['_meta']['title']}, {info[kind]['output_name'][slot]}"
    return prompt, names


def hash_of(data):
    """Of the tensor in the bytes of a saved latent; the header holds the workflow, which may be worded anew."""
    (length,) = struct.unpack("<Q", data[:8])
    place = json.loads(data[8 : 8 + length])["latent_tensor"]
    begin, end = place["data_offsets"]
    about = f"{place['dtype']} {place['shape']}".encode()
    return hashlib.sha256(about + data[8 + length + begin : 8 + length + end]).hexdigest()[:32]


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", required=True, help="a ComfyUI with this pack")
    parser.add_argument("--only", default="", help="number of one workflow, such as 07")
    chosen = parser.parse_args(arguments)
    client = ComfyClient(chosen.server)
    client.check()
    for path in sorted(FOLDER.glob(f"{chosen.only}* (demo model).json")):
        info = client.object_info()
        prompt = workflow.to_prompt(workflow.read(path), info)
        for node in prompt.values():
            if node["class_type"] in PICKERS:
                node["inputs"]["file"] = info[node["class_type"]]["input"]["required"]["file"][1]["options"][0]
        prompt, names = with_latents_saved(prompt, info)
        outputs = client.run(prompt)["outputs"]
        for saver, name in sorted(names.items()):
            for image in outputs.get(saver, {}).get("latents", ()):
                print(f"{hash_of(client.fetch(image))}  {path.stem[:2]}  {name}", flush=True)
