"""Editing on a flow model in a real ComfyUI server, with the stock nodes that go with it; nothing stays on the model."""
import pytest
import safetensors.torch
import torch
from comfyui_ledits.demo import flow_net
from comfyui_ledits.nodes.inversion_files import DTYPES
from support.graphs import node
from support.listening import listen
from test_server import Server, cached

STEPS = 10
LORA = "flow lora.safetensors"


def lora_tensors():
    """A LoRA for a few layers of the demo transformer, in the names that Flux LoRAs have."""
    weights, generator, out = safetensors.torch.load_file(flow_net.WEIGHTS), torch.Generator().manual_seed(1), {}
    for layer in ("double_blocks.1.img_attn.qkv", "single_blocks.3.linear2", "double_blocks.0.txt_mlp.0"):
        weight = weights[f"{layer}.weight"]
        out[f"diffusion_model.{layer}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], 2, generator=generator)
        out[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
    return out


@pytest.fixture(scope="module")
def server(server_url, server_base):
    path = server_base / "models" / "loras" / LORA
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(lora_tensors(), path)
    return Server(server_url)


def graph(model=("model", 0), inversion=None, edit=None, **more):
    """A FlowEdit-like edit of a demo picture; `model` is what the edit runs on."""
    made = {
        "model": node("LEDITS_LoadDemoModel", network="flow"),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "source": node("CLIPTextEncode", text="a red star on a grey ground", clip=["model", 1]),
        "target": node("CLIPTextEncode", text="a green star on a grey ground", clip=["model", 1]),
        "picture": node("LEDITS_LoadDemoPicture", picture="red_star"),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["model", 2]),
        "inversion": node("LEDITS_EditFriendlyInversion", model=["model", 0], positive=["source", 0], negative=["empty", 0],
                          latent=["encoded", 0], cfg=1.0, steps=STEPS, scheduler="simple", eta=1.0, seed=0,
                          **(inversion or {})),
        "edit": node("LEDITS_KSampler", model=list(model), negative=["empty", 0], inversion=["inversion", 0],
                     **{"positive": ["target", 0], "cfg": 3.0, "skip": 2, **(edit or {})}),
        "saved": node("SaveLatent", samples=["edit", 0], filename_prefix="flow"),
    }
    return made | more


@pytest.fixture(scope="module")
def latent(server):
    known = {}

    def run(prompt):
        key = repr(prompt)
        if key not in known:
            known[key] = server.latent(server.run(prompt), "saved")
            assert torch.isfinite(known[key]).all()
        return known[key]

    return run


@pytest.fixture(scope="module")
def picture(server):
    return server.latent(server.run({k: v for k, v in graph().items() if k in ("model", "picture", "encoded")} | {
        "saved": node("SaveLatent", samples=["encoded", 0], filename_prefix="flow")}), "saved")


def test_the_source_prompt_gives_the_picture_back(latent, picture):
    out = latent(graph(edit={"positive": ["source", 0], "cfg": 1.0}))
    assert float((out - picture).abs().max()) < 1e-4
    assert float((latent(graph()) - picture).abs().max()) > 0.1


def test_every_flow_node_edits(server, latent, picture):
    own = {"settings": "own", "settings.steps": STEPS, "settings.cfg": 1.0, "settings.skip": 2}
    source = {**{k: v for k, v in own.items() if k != "settings.skip"}, "scheduler": "simple", "seed": 0}
    flowedit = graph() | {
        "inversion": node("LEDITS_FlowEditSource", model=["model", 0], positive=["source", 0], negative=["empty", 0],
                          latent=["encoded", 0], **source),
        "edit": node("LEDITS_FlowEdit", model=["model", 0], positive=["target", 0], negative=["empty", 0],
                     inversion=["inversion", 0], **{k: v for k, v in own.items() if k != "settings.steps"}),
    }
    rf = graph(model=("held", 0), edit={"skip": 0}) | {
        "inversion": node("LEDITS_RFInversion", model=["model", 0], positive=["source", 0], negative=["empty", 0],
                          latent=["encoded", 0], cfg=1.0, steps=STEPS, scheduler="simple", seed=0, gamma=0.5),
        "held": node("LEDITS_HoldPicture", model=["model", 0], inversion=["inversion", 0], strength=0.9, start=0.0, stop=0.3)}
    for prompt in (flowedit, rf):
        assert float((latent(prompt) - picture).abs().max()) > 0.1
    eta = latent(graph(edit={"eta": 0.0, "cfg": 1.0}))
    assert float((eta - latent(flowedit)).abs().max()) < 1e-3  # the same noise, the same guidance, eta 0


def test_a_second_edit_costs_the_target_alone(server):
    server.run(graph())
    entry = server.run(graph(edit={"cfg": 2.0}))
    assert "inversion" in cached(entry)
    assert entry["outputs"]["edit"]["ledits"][0]["unet_rows"] == 2 * (STEPS - 2)


def test_a_lora_edits_and_leaves_the_model_as_it_was(latent, picture):
    before = latent(graph())
    lora = node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.8)
    other = latent(graph(model=("lora", 0), lora=lora))
    assert not torch.allclose(before, other, atol=1e-3)
    again = latent(graph(more=node("SaveLatent", samples=["edit", 0], filename_prefix="again")))
    assert torch.equal(again, before)
    both = graph(model=("lora", 0), lora=lora, edit={"positive": ["source", 0], "cfg": 1.0})
    both["inversion"]["inputs"]["model"] = ["lora", 0]
    assert float((latent(both) - picture).abs().max()) < 1e-4  # inverted with the LoRA, it comes back with the LoRA


def test_a_mask_and_differential_diffusion_keep_the_rest(latent, picture):
    mask = {"mask": node("SolidMask", value=1.0, width=64, height=128), "black": node("SolidMask", value=0.0, width=128, height=128),
            "half": node("MaskComposite", destination=["black", 0], source=["mask", 0], x=0, y=0, operation="add")}
    out = latent(graph(edit={"mask": ["half", 0]}, **mask))
    assert float((out - picture)[..., 9:].abs().max()) < 1e-4 < 0.1 < float((out - picture)[..., :8].abs().max())
    different = node("DifferentialDiffusion", model=["model", 0])
    out = latent(graph(model=("different", 0), different=different, edit={"mask": ["half", 0]}, **mask))
    assert float((out - picture)[..., 9:].abs().max()) < 1e-4 < 0.1 < float((out - picture)[..., :8].abs().max())


def parts(sigmas=("sampler", 1), latent_from=("inversion", 1), sampler=("sampler", 0), key="edit"):
    return {key: node("SamplerCustomAdvanced", noise=["none", 0], guider=["guider", 0], sampler=list(sampler),
                      sigmas=list(sigmas), latent_image=list(latent_from))}


def test_two_stages_in_a_graph_are_one(latent):
    shared = {"none": node("DisableNoise"), "sampler": node("LEDITS_Sampler", inversion=["inversion", 0], skip=2),
              "guider": node("LEDITS_Guider", model=["model", 0], positive=["target", 0], negative=["empty", 0], cfg=3.0),
              "split": node("SplitSigmas", sigmas=["sampler", 1], step=4)}
    one = graph() | shared | parts()
    two = graph() | shared | parts(("split", 0), key="first") | parts(("split", 1), ("first", 0))
    assert float((latent(one) - latent(graph())).abs().max()) < 1e-5
    assert float((latent(two) - latent(one)).abs().max()) < 1e-5
    # a stock sampler takes over where the first stage ends
    euler = shared | {"euler": node("KSamplerSelect", sampler_name="euler")}
    stock = graph() | euler | parts(("split", 0), key="first") | parts(("split", 1), ("first", 0), ("euler", 0))
    assert torch.isfinite(latent(stock)).all()


def test_a_stock_sampler_begins_at_x_T_by_the_noise(latent, picture):
    stock = graph() | {
        "inversion": node("LEDITS_DDIMInversion", model=["model", 0], positive=["source", 0], negative=["empty", 0],
                          latent=["encoded", 0], cfg=1.0, steps=STEPS, scheduler="simple", refinements=10, tolerance=0.0,
                          convention="A", path="inverted"),
        "guider": node("CFGGuider", model=["model", 0], positive=["source", 0], negative=["empty", 0], cfg=1.0),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "levels": node("BasicScheduler", model=["model", 0], scheduler="simple", steps=STEPS, denoise=1.0),
        "edit": node("SamplerCustomAdvanced", noise=["inversion", 2], guider=["guider", 0], sampler=["euler", 0],
                     sigmas=["levels", 0], latent_image=["inversion", 1]),
    }
    assert float((latent(stock) - picture).abs().max()) < 0.05


def test_a_saved_record_edits_the_same(server, latent):
    saved = graph() | {"kept": node("LEDITS_SaveInversion", inversion=["inversion", 0], filename_prefix="flow/kept",
                                    dtype=DTYPES[0])}
    assert server.run(saved)["status"]["completed"]
    loaded = graph() | {"inversion": node("LEDITS_LoadInversion", file="flow/kept_00001_.ledits.safetensors [output]")}
    assert torch.equal(latent(loaded), latent(graph()))


def test_progress_and_previews_come_as_with_the_stock_sampler(client):
    ((_, seen),) = listen(client, graph(edit={"cfg": 2.5}))
    assert seen.previews["edit"] == len(seen.progress["edit"]) == STEPS - 2
    assert seen.texts["edit"][-1] == f"done: {STEPS - 2} steps from noise level 0.8, {2 * (STEPS - 2)} network evaluations"


def test_interrupted_it_leaves_the_model_as_it_was(server, latent):
    before = latent(graph())
    long = graph(edit={"skip": 0})
    long["inversion"]["inputs"]["steps"] = 400
    assert server.interrupt(long)["node_type"] == "LEDITS_EditFriendlyInversion"
    again = graph(other=node("SaveLatent", samples=["edit", 0], filename_prefix="after"))
    assert torch.equal(latent(again), before)


WORDS = node("LEDITS_EditPrompts", clip=["model", 1], source="a red star on a grey ground",
             target="a green star on a grey ground", mapping="auto")


@pytest.mark.parametrize("control", [
    node("LEDITS_P2Plus", prompts=["words", 2], cross_replace_steps=0.8, self_replace_steps=0.4, uncond_self_replace_steps=0.3),
    node("LEDITS_PlugAndPlay", source=["source", 0], pnp_f_t=0.0, pnp_attn_t=0.5),
    node("LEDITS_PromptToPrompt", prompts=["words", 2], cross_replace_steps=0.8, self_replace_steps=0.4, local_blend="auto"),
    node("LEDITS_MasaCtrl", source=["source", 0], start_step=0.2),
    node("LEDITS_CopyAttention", source=["source", 0], rows="structure (q, k)", end_step=0.5, region="outside the mask"),
], ids=lambda control: control["class_type"])
def test_attention_control_acts_and_leaves_the_model_as_it_was(server, latent, control):
    before, controlled = latent(graph()), graph(edit={"attention": ["control", 0]}, words=WORDS, control=control)
    assert float((latent(controlled) - before).abs().max()) > 0.01
    assert torch.equal(latent(graph(other=node("SaveLatent", samples=["edit", 0], filename_prefix="again"))), before)


def test_a_kept_store_serves_the_next_edit_and_the_next_server(server, latent):
    control = node("LEDITS_MasaCtrl", source=["source", 0], start_step=0.2)
    live = latent(graph(edit={"attention": ["control", 0]}, control=control))
    captured = {"store": node("LEDITS_CaptureAttention", model=["model", 0], negative=["empty", 0], inversion=["inversion", 0],
                              attention=["control", 0], skip=2, precision="float32"),
                "kept": node("LEDITS_SaveAttentionStore", store=["store", 0], filename_prefix="flow/seen", dtype="as captured")}
    edit = {"attention": ["control", 0], "store": ["store", 0]}
    from_store = graph(edit=edit, control=control, **captured)
    assert float((latent(from_store) - live).abs().max()) < 1e-5
    loaded = node("LEDITS_LoadAttentionStore", file="flow/seen_00001_.ledits-store.safetensors [output]")
    entry = server.run(graph(edit=edit, control=control, store=loaded))
    assert float((server.latent(entry, "saved") - live).abs().max()) < 1e-5
    assert entry["outputs"]["edit"]["ledits"][0]["unet_rows"] == 2 * (STEPS - 2)  # no source beside the edit


def test_what_the_words_look_at_is_drawn(server):
    control = node("LEDITS_RecordAttention", prompts=["words", 2])
    drawn = node("LEDITS_PreviewAttention", latent=["edit", 0], words="star", view="average", image=["picture", 0])
    entry = server.run(graph(edit={"attention": ["control", 0]}, words=WORDS, control=control, drawn=drawn))
    assert entry["status"]["completed"] and entry["outputs"]["drawn"]["images"]
    missing = dict(drawn, inputs=drawn["inputs"] | {"words": "heart"})
    prompt = graph(edit={"attention": ["control", 0]}, words=WORDS, control=control, drawn=missing)
    assert "heart" in server.messages(server.queue(prompt))["execution_error"]["exception_message"]


def test_what_learns_is_refused_in_words(server):
    prompt = graph()
    prompt["inversion"] = node("LEDITS_NullTextInversion", model=["model", 0], positive=["source", 0], negative=["empty", 0],
                               latent=["encoded", 0], cfg=3.0, steps=STEPS, scheduler="simple", inner_steps=2,
                               learning_rate=0.01, early_stop=1e-5, on_interrupt="discard")
    message = server.messages(server.queue(prompt))["execution_error"]["exception_message"]
    assert "need one: SD 1.x, SD 2.x, SDXL" in message
