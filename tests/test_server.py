"""The pack in a real ComfyUI server, over HTTP: it loads, edits, reuses inversions, and leaves nothing behind."""
import asyncio
import io
import time

import pytest
import safetensors.torch
import torch
from comfyui_ledits.nodes.extension import LeditsExtension
from comfyui_ledits.tools.api.client import ComfyClient
from PIL import Image
from support.graphs import node

STEPS = 40


class Server(ComfyClient):
    """A ComfyUI server."""

    def running(self):
        return [entry[1] for entry in self.ask_json("/queue")["queue_running"]]

    def interrupt(self, prompt):
        """Queue a prompt, interrupt it soon after it has begun; the message that says where it was."""
        queued = self.queue(prompt)
        while queued not in self.running():
            time.sleep(0.02)
        time.sleep(0.3)
        self.ask("/interrupt", b"")
        return self.messages(queued)["execution_interrupted"]

    def messages(self, prompt):
        """The messages of a prompt that has ended, however it did: {name: data}."""
        end = time.monotonic() + 600
        while time.monotonic() < end:
            found = self.ask_json(f"/history/{prompt}")
            if prompt in found:
                return dict(found[prompt]["status"]["messages"])
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt} did not end")

    def latent(self, entry, node):
        """What a SaveLatent node saved."""
        return safetensors.torch.load(self.fetch(entry["outputs"][node]["latents"][0]))["latent_tensor"]


@pytest.fixture(scope="module")
def server(server_url):
    return Server(server_url)


def base():
    """The demo model, prompts and a picture."""
    return {
        "model": node("LEDITS_LoadDemoModel"),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "target": node("CLIPTextEncode", text="a red star on a grey ground", clip=["model", 1]),
        "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
    }


def edit(skip=30, **concept):
    """Picture, inversion, concept, edit, decoded picture."""
    settings = {"prompt": "star", "direction": "towards", "scale": 7.0, "threshold": 0.9, "warmup": 0, "cooldown": 0,
                "momentum_scale": 0.0, "momentum_beta": 0.6, "weight": 1.0}
    return base() | {
        "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["empty", 0],
                          negative=["empty", 0], latent=["encoded", 0], cfg=1.0, steps=STEPS, scheduler="ddim_uniform",
                          eta=1.0, seed=0),
        "concept": node("LEDITS_SemanticConcept", clip=["model", 1], **settings | concept),
        "edit": node("LEDITS_KSampler", model=["model", 0], positive=["target", 0], negative=["empty", 0],
                     inversion=["inversion", 0], concepts=["concept", 0], cfg=5.0, skip=skip),
        "saved": node("SaveLatent", samples=["edit", 0], filename_prefix="edit"),
        "decoded": node("VAEDecode", samples=["edit", 0], vae=["model", 2]),
        "shown": node("SaveImage", images=["decoded", 0], filename_prefix="edit"),
    }


def plain(turns):
    """ComfyUI's own KSampler. It runs anew for every number of `turns`, with equal inputs and on the same model."""
    graph = base() | {"latent 0": node("EmptyLatentImage", width=128, height=128, batch_size=1)}
    for i in range(turns):
        graph[f"latent {i + 1}"] = node("LatentMultiply", samples=[f"latent {i}", 0], multiplier=1.0)
    return graph | {
        "sampler": node("KSampler", model=["model", 0], positive=["target", 0], negative=["empty", 0], seed=5, steps=4,
                        cfg=5.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                        latent_image=[f"latent {turns}", 0]),
        "saved": node("SaveLatent", samples=["sampler", 0], filename_prefix="plain"),
    }


class Plain:
    """The picture of ComfyUI's own KSampler, to be sampled again and again on one and the same model."""

    def __init__(self, server):
        self.server, self.turns = server, 0

    def sample(self):
        self.turns += 1
        entry = self.server.run(plain(self.turns))
        assert "sampler" not in cached(entry)
        if self.turns > 1:
            assert "model" in cached(entry)
        return self.server.latent(entry, "saved")


@pytest.fixture(scope="module")
def plain_picture(server):
    sampler = Plain(server)
    return sampler, sampler.sample()


def cached(entry):
    return dict(entry["status"]["messages"])["execution_cached"]["nodes"]


def test_the_pack_loads_and_every_socket_is_described(server, server_log):
    own = {cls.GET_SCHEMA().node_id for cls in asyncio.run(LeditsExtension().get_node_list())}
    info = {k: v for k, v in server.object_info().items() if k.startswith("LEDITS_")}
    assert own and set(info) == own
    silent = []
    for name, about in info.items():
        assert about["category"].startswith("LEDITS") and about["description"], name
        inputs = about["input"].get("required", {}) | about["input"].get("optional", {})
        silent += [f"{name}: input {key}" for key, spec in inputs.items()
                   if len(spec) < 2 or not spec[1].get("tooltip")]
        texts = about["output_tooltips"] or [None] * len(about["output"])
        silent += [f"{name}: output {key}" for key, text in zip(about["output_name"], texts) if not text]
    assert not silent
    log = server_log.read_text("utf-8", "replace")
    assert "Import times for custom nodes" in log and "IMPORT FAILED" not in log


def test_a_whole_graph_edits_a_picture(server):
    entry = server.run(edit())
    picture = Image.open(io.BytesIO(server.fetch(entry["outputs"]["shown"]["images"][0])))
    assert picture.size == (128, 128)
    steps, rows = STEPS, STEPS  # cfg 1 with an empty prompt on both sides: one prediction for every step
    assert entry["outputs"]["inversion"]["ledits"] == [{"steps": steps, "unet_rows": rows}]
    # target prompt, negative and concept
    assert entry["outputs"]["edit"]["ledits"] == [{"steps": STEPS - 30, "unet_rows": 3 * (STEPS - 30)}]


def test_a_changed_edit_does_not_invert_again(server):
    first = server.run(edit(scale=6.0))
    second = server.run(edit(scale=8.0))
    assert {"model", "encoded", "inversion"} <= set(cached(second))
    assert not {"concept", "edit"} & set(cached(second))
    assert not torch.equal(server.latent(first, "saved"), server.latent(second, "saved"))


def test_an_interrupted_edit_leaves_the_model_as_it_was(server, plain_picture):
    sampler, before = plain_picture
    graph = edit(skip=STEPS - 1)
    for i in range(5):  # many concepts make a slow edit
        graph[f"concept {i}"] = graph["concept"] | {"inputs": graph["concept"]["inputs"] | {"prompt": f"star {i}"}}
        if i:
            graph[f"concept {i}"]["inputs"]["concepts"] = [f"concept {i - 1}", 0]
    graph["edit"]["inputs"]["concepts"] = ["concept 4", 0]
    expected = server.latent(server.run(graph), "saved")  # only the edit is left to run in the next prompt

    slow = graph | {"edit": node("LEDITS_KSampler", **graph["edit"]["inputs"] | {"skip": 0})}
    assert server.interrupt(slow)["node_type"] == "LEDITS_KSampler"

    assert torch.equal(sampler.sample(), before)
    again = server.run(graph)
    assert "edit" not in cached(again)
    assert torch.equal(server.latent(again, "saved"), expected)


@pytest.mark.parametrize("case", ["before the model runs", "inside the sampler"])
def test_a_failing_node_says_why_and_leaves_nothing(server, plain_picture, case):
    sampler, before = plain_picture
    graph = edit(skip=STEPS)
    culprit, sentence = "edit", f"skip is {STEPS}, but the inversion has {STEPS} steps: nothing is left to run."
    if case == "inside the sampler":  # the noise levels of another number of steps
        graph |= {
            "guider": node("LEDITS_Guider", model=["model", 0], positive=["target", 0], negative=["empty", 0],
                           concepts=["concept", 0], cfg=5.0),
            "path sampler": node("LEDITS_Sampler", inversion=["inversion", 0], skip=0),
            "levels": node("BasicScheduler", model=["model", 0], scheduler="normal", steps=3, denoise=1.0),
            "noise": node("DisableNoise"),
            "edit": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
                         sampler=["path sampler", 0], sigmas=["levels", 0], latent_image=["inversion", 1]),
        }
        sentence = "These SIGMAS are not the inversion's own"
    error = server.messages(server.queue(graph))["execution_error"]
    assert error["node_id"] == culprit
    assert error["exception_type"] == "ValueError"
    assert error["exception_message"].startswith(sentence)
    assert torch.equal(sampler.sample(), before)
