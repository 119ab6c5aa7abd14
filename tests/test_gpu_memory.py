"""Where tensors live, what a run leaves behind, and what learning takes, on the CPU and on a GPU."""
import gc

import comfy.model_management
import pytest
import torch
from comfyui_ledits.attention_hooks.store import AttentionStore
from comfyui_ledits.nodes.capture_attention import CaptureAttention
from comfyui_ledits.nodes.ddim_inversions import DirectInversion
from comfyui_ledits.nodes.learned_inversions import NullTextInversion, StyleDiffusionInversion
from comfyui_ledits.samplers import gradients
from support import chain_parts, runs, tiny, whole_edits
from support.devices import on_each, placed

pytestmark = pytest.mark.usefixtures("inference_mode", "full_precision")
# Bytes. Numbers that stay alive take blocks of 512 bytes on a GPU; what a store keeps of these edits takes many times this.
LEFT = 16 * 2**10


def held(device):
    """Bytes of live tensors: on a GPU by its allocator, on the CPU by Python's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device}.values())


@on_each("name", cpu=[["p2p"], ["flow masactrl"], ["null-text"]], cuda=[[name] for name in whole_edits.EDITS])
def test_a_run_leaves_nothing_on_the_device(device, name):
    """A first run does: weights, cuBLAS's workspace, buffers that ComfyUI and the tests keep."""
    model = placed(whole_edits.model(name), device)
    whole_edits.run(name, model)
    before = held(device)
    assert whole_edits.run(name, model).device.type == "cpu"
    print(f"{device:4} {name:13} holds {held(device) - before} bytes more")
    assert held(device) - before < LEFT


# --- attention stores -----------------------------------------------------------------------------------------------

@pytest.fixture
def kept(monkeypatch):
    """(where it is, where the store was told to keep it, bytes) of every tensor that an attention store takes."""
    seen, put = [], AttentionStore.put

    def watched(self, step, slot, tensor):
        put(self, step, slot, tensor)
        now = self._steps[step][slot]
        seen.append((now.device.type, self.device, now.nbytes))

    monkeypatch.setattr(AttentionStore, "put", watched)
    return seen


@on_each("name", cpu=[["p2p"], ["flow masactrl"]], cuda=[["p2p"], ["masactrl"], ["pnp"], ["flow p2p"], ["flow masactrl"]])
def test_a_live_store_is_on_the_device_or_where_that_is_short_of_memory_on_the_host(device, name, kept, monkeypatch):
    model = placed(whole_edits.model(name), device)
    live = whole_edits.run(name, model)
    assert {(there, told) for there, told, _ in kept} == {(device, None)}
    assert sum(size for *_, size in kept) > 4 * LEFT
    kept.clear()
    few = 2**14  # bytes that are free, of which a step's tensors are more than a third
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda device=None, torch_free_too=False: (few, few) if torch_free_too else few)
    short = whole_edits.run(name, model)
    assert {(there, told) for there, told, _ in kept} == {("cpu", "cpu")}
    assert (short - live).abs().max() < 1e-4 * live.std()


@on_each()
def test_a_captured_store_is_on_the_host_and_edits_as_the_live_one(device):
    model, words, empty = placed(runs.model("sd1"), device), chain_parts.words(), chain_parts.empty()
    path = runs.invert(DirectInversion, latent=tiny.latent(height=16, width=16), pair=(words.source, empty), on=model, steps=4)[0]
    control = tuple(chain_parts.attention("p2p"))
    store = CaptureAttention.execute(model=model, negative=empty, inversion=path, attention=control, skip=0)[0]
    assert {(t.device.type, t.dtype) for t in store.tensors().values()} == {("cpu", torch.float16)}
    live, stored = (runs.edit("sd1", path, pair=(words.target, empty), on=model, cfg=5.0, attention=control, store=s)
                    for s in (None, store))
    assert (live - stored).abs().max() < 1e-2 * live.std()  # float16, over four steps


# --- learning -------------------------------------------------------------------------------------------------------

@on_each("node", cpu=[[NullTextInversion]], cuda=[[NullTextInversion], [StyleDiffusionInversion]])
def test_learning_with_and_without_checkpointing_is_one_and_takes_less_memory_with(device, node, monkeypatch):
    model, side = placed(runs.model("sd1"), device), 64 if device == "cuda" else 16
    latent, learned, peaks = tiny.latent(height=side, width=side), [], []

    def learn():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = held(device)
        inversion = runs.invert(node, latent=latent, on=model, cfg=7.5, steps=2, early_stop=0.0)[0]
        learned.append(next(iter(inversion.overrides.values())))
        peaks.append((torch.cuda.max_memory_allocated() if device == "cuda" else before) - before)

    if device == "cuda":
        learn()  # a first run leaves weights and workspaces there
    learn()
    monkeypatch.setattr(gradients, "checkpointed", lambda forward: forward)
    learn()
    checkpointed, plain = learned[-2:]
    assert (checkpointed[-1] - checkpointed[0]).abs().max() > 1e-3
    # Adam's first steps are the sign of the gradient: an element whose gradient is 0 but for rounding may differ
    assert (checkpointed - plain).abs().mean() < 0.01 * (plain - plain[0]).abs().mean()
    if device == "cuda":
        print(f"{node.__name__}: peak {peaks[-2] / 2**20:.1f} MiB with checkpointing, {peaks[-1] / 2**20:.1f} MiB without")
        assert peaks[-2] < 0.8 * peaks[-1]
