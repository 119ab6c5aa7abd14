"""A real server in which runs are interrupted, fail, run out of memory or of disk, or which is killed while it saves.

Afterwards the same server gives the same results to the bit, and no file is left that nobody asked for.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_ledits.files import inversion_file, latent_formats
from comfyui_ledits.nodes import demo  # noqa: F401  it registers the demo model's latents
from conftest import COMFYUI
from support import faults
from support.graphs import node
from test_server import Server

import dev

pytestmark = [pytest.mark.standing, pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")]
STEPS = 5
TRIALS = 3  # of every end, at a place by chance
CONTROLS = {
    "concepts": {},
    "p2p": {"control": node("LEDITS_PromptToPrompt", prompts=["prompts", 2], cross_replace_steps=0.8, self_replace_steps=0.6)},
    "masactrl": {"control": node("LEDITS_MasaCtrl", prompts=["prompts", 2], start_step=0.2)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("faults")
    dev.link_pack(base)
    faults.install(base)
    return base


def started(base):
    device = [] if os.environ.get("LEDITS_TEST_DEVICE") == "cuda" else ["--cpu"]
    return dev.start_server(dev.Home(Path(sys.executable), COMFYUI, base), *device, log=base / "server.log")


@pytest.fixture(scope="module")
def server(base):
    with started(base) as (url, _):
        yield Server(url)


TURNS = iter(range(1, 10**6))


def graph(control="concepts", inverted="LEDITS_EditFriendlyInversion", end="error", invert_at=0, edit_at=0, operation=0):
    """Inversion and edit on a model that fails at a call of either; run anew every time it is asked for."""
    def fault(at):
        return node("TestFault", model=["model", 0], end=end, call=at, operation=operation, turn=next(TURNS))

    own = {"LEDITS_EditFriendlyInversion": {"eta": 1.0, "seed": 0, "steps_at_once": 1},
           "LEDITS_NullTextInversion": {"inner_steps": 2, "learning_rate": 0.01, "early_stop": 1e-5, "on_interrupt": "discard"}}
    edit = {"concepts": ["concept", 0]} if control == "concepts" else {"attention": ["control", 0]}
    return {
        "model": node("LEDITS_LoadDemoModel"),
        "to invert": fault(invert_at),
        "to edit": fault(edit_at),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "prompts": node("LEDITS_EditPrompts", clip=["model", 1], source="a red star on a grey ground",
                        target="a blue star on a grey ground"),
        "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0x3070C0),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
        "inversion": node(inverted, model=["to invert", 0], positive=["prompts", 0], negative=["empty", 0],
                          latent=["encoded", 0], cfg=2.0, steps=STEPS, scheduler="simple", **own[inverted]),
        "concept": node("LEDITS_SemanticConcept", clip=["model", 1], prompt="circle", direction="towards", scale=5.0,
                        threshold=0.9, warmup=1, cooldown=0, momentum_scale=0.3, momentum_beta=0.6, weight=1.0),
        **CONTROLS[control],
        "edit": node("LEDITS_KSampler", model=["to edit", 0], positive=["prompts", 1], negative=["empty", 0],
                     inversion=["inversion", 0], cfg=5.0, skip=1, **edit),
        "saved": node("SaveLatent", samples=["edit", 0], filename_prefix="kept"),
    }


def files(base):
    """Everything in the server's output folder, and what it holds for a moment."""
    return sorted(path.relative_to(base).as_posix() for path in (base / "output").rglob("*") if path.is_file())


class Watched:
    """A server whose results are compared with those of its first run."""

    def __init__(self, server, base):
        self.server, self.base, self.first = server, base, {}

    def result(self, control):
        entry = self.server.run(graph(control))
        latent = self.server.latent(entry, "saved")
        for file in (self.base / "output").glob("kept_*"):
            file.unlink()
        return latent

    def check(self, control):
        now = self.result(control)
        assert torch.equal(now, self.first.setdefault(control, now)), control


@pytest.fixture(scope="module")
def watched(server, base):
    watched = Watched(server, base)
    for control in CONTROLS:
        watched.check(control)
        watched.check(control)  # two runs are equal to the bit to begin with
    return watched


@pytest.mark.parametrize("end", faults.ENDS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_run_that_ends_anywhere_leaves_nothing(watched, control, end):
    rng, before, seen = random.Random(f"{end} {control}"), files(watched.base), set()
    for _ in range(TRIALS):
        at = {rng.choice(["invert_at", "edit_at"]): rng.randint(1, STEPS - 1)}
        messages = watched.server.messages(watched.server.queue(graph(control, end=end, operation=rng.randint(0, 400), **at)))
        if end == "interrupt":
            assert "execution_interrupted" in messages, messages
        else:
            seen.add(messages["execution_error"]["exception_message"].strip().split("\n")[0] if "execution_error" in messages
                     else "survived")
        assert files(watched.base) == [f for f in before if "kept" not in f] or "survived" in seen
        watched.check(control)
    if end == "error":
        assert seen == {"the model fails"}
    elif end == "error in a block":
        assert seen == {"the block fails"}
    elif end == "out of memory":
        assert len(seen - {"survived"}) >= 1


@pytest.mark.parametrize("end", faults.ENDS)
def test_learning_that_ends_anywhere_leaves_nothing(watched, end):
    rng = random.Random(end)
    for _ in range(2):
        at = rng.randint(1, 3 * STEPS)
        prompt = graph(inverted="LEDITS_NullTextInversion", end=end, invert_at=at, operation=rng.randint(0, 300))
        messages = watched.server.messages(watched.server.queue(prompt))
        assert {"execution_interrupted", "execution_error"} & messages.keys()
        watched.check("concepts")


def test_interrupts_at_any_moment(watched):
    """From outside, as the Cancel button: whenever it comes, the next result is the same."""
    rng = random.Random(3)
    for _ in range(TRIALS):
        control = rng.choice(sorted(CONTROLS))
        queued = watched.server.queue(graph(control))
        time.sleep(rng.uniform(0, 1.5))
        watched.server.ask("/interrupt", b"")
        watched.server.messages(queued)
        for file in (watched.base / "output").glob("kept_*"):
            file.unlink()
        watched.check(control)
    assert files(watched.base) == []


# --- files --------------------------------------------------------------------------------------------------------------

def saving(prefix):
    prompt = graph()
    return {name: prompt[name] for name in ("model", "to invert", "empty", "prompts", "picture", "encoded", "inversion")} | {
        "kept": node("LEDITS_SaveInversion", inversion=["inversion", 0], filename_prefix=prefix, dtype="float32")}


def test_a_disk_that_is_full(watched, base):
    """A disk of its own, of 8 kB, in the output folder."""
    small = base / "output" / "small"
    small.mkdir(parents=True, exist_ok=True)
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=8k", "none", small], stderr=subprocess.DEVNULL):
        pytest.skip("nothing can be mounted here")
    try:
        messages = watched.server.messages(watched.server.queue(saving("small/x")))
        said = messages["execution_error"]["exception_message"]
        assert "could not be written to 'small/x' (No space left on device): make room on the disk." in said
        assert not list(small.iterdir())
        watched.check("concepts")
    finally:
        subprocess.check_call(["umount", small])
    watched.server.run(saving("small/x"))
    (path,) = small.iterdir()
    inversion_file.load(path, latent_formats.make)
    path.unlink()


def test_a_server_that_is_killed_while_it_saves(tmp_path):
    """The files that are there are whole; another server goes on in the same folder."""
    dev.link_pack(tmp_path)
    faults.install(tmp_path)
    out = tmp_path / "output" / "x"
    with started(tmp_path) as (url, process):
        for _ in range(30):
            Server(url).queue(saving("x/y"))
        end = time.monotonic() + 120
        while len(list(out.glob("*.safetensors"))) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = sorted(path.name for path in out.iterdir())
    for name in left:
        if not name.endswith(".part"):
            inversion_file.load(out / name, latent_formats.make)
    assert sum(name.endswith(".part") for name in left) <= 1
    for name in left:
        if name.endswith(".part"):
            os.utime(out / name, (1, 1))
    with started(tmp_path) as (url, _):
        server = Server(url)
        entry = server.run(saving("x/y"))
        name = entry["outputs"]["kept"]["inversions"][0]["filename"]
        assert name not in left
        listed = server.object_info()["LEDITS_LoadInversion"]["input"]["required"]["file"][1]["options"]
        assert sorted(listed) == sorted(f"x/{n} [output]" for n in [*left, name] if not n.endswith(".part"))
    assert sorted(path.name for path in out.iterdir()) == sorted([n for n in left if not n.endswith(".part")] + [name])
