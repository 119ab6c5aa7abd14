"""Stock nodes chained with the LEDITS KSampler in a real ComfyUI server, over HTTP, files loaded by the stock loaders.

That the source sees only what is its own, and every pair of edit and link, is tests/test_chaining.py's.
"""

import itertools

import comfy.cldm.cldm
import pytest
import safetensors.torch
import torch
from comfyui_ledits.demo import nets
from support import tiny
from support.graphs import node
from test_controls_server import edit
from test_server import Plain, Server

STEPS, SIDE = 4, 128  # steps of the path; pixels
LORA, CONTROL_NET = "chained lora.safetensors", "chained control net.safetensors"
LORA_RANK = 2


def lora_tensors():
    """A LoRA of the usual names for a few layers of the demo model's U-Net and one of its text encoder."""
    weights, generator, out = safetensors.torch.load_file(nets.WEIGHTS), torch.Generator().manual_seed(1), {}
    block = "output_blocks.{}.1.transformer_blocks.0."
    unet = [block.format(2) + "attn1.to_q", block.format(4) + "attn2.to_v", "output_blocks.3.0.out_layers.3"]
    layers = {"lora_unet_" + name.replace(".", "_"): f"model.diffusion_model.{name}" for name in unet}
    name = "text_model.encoder.layers.1.mlp.fc1"
    layers["lora_te_" + name.replace(".", "_")] = f"cond_stage_model.transformer.{name}"
    for key, layer in layers.items():
        weight = weights[f"{layer}.weight"]
        up = torch.randn(weight.shape[0], LORA_RANK, *[1] * (weight.ndim - 2), generator=generator)
        down = torch.randn(LORA_RANK, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        out |= {f"{key}.lora_up.weight": 0.3 * up, f"{key}.lora_down.weight": down,
                f"{key}.alpha": torch.tensor(float(LORA_RANK))}
    return out


def control_net_tensors():
    """A random ControlNet of the demo U-Net's widths, in the layout of the published ones."""
    own = {k: v for k, v in nets.UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**own, hint_channels=3)
    tiny.fill(network, seed=3)
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def server(server_url, server_base):
    for folder, name, tensors in (("loras", LORA, lora_tensors()), ("controlnet", CONTROL_NET, control_net_tensors())):
        path = server_base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, path)
    return Server(server_url)


@pytest.fixture(scope="module", autouse=True)
def plain_picture(server):
    """ComfyUI's own picture on the same model, before everything here."""
    sampler = Plain(server)
    return sampler, sampler.sample()


@pytest.fixture(scope="module")
def latent(server):
    """(graph) -> latent [B, 4, H, W] that it saves; run once for one graph."""
    known = {}

    def run(graph):
        key = repr(graph)
        if key not in known:
            known[key] = server.latent(server.run(graph), "saved")
            assert torch.isfinite(known[key]).all()
        return known[key]

    return run


# --- edits ----------------------------------------------------------------------------------------------------------

CONCEPT = {"prompt": "a green star", "direction": "towards", "scale": 7.0, "threshold": 0.5, "warmup": 0, "cooldown": 0,
           "momentum_scale": 0.0, "momentum_beta": 0.6, "weight": 1.0}
WORDS, FEATURES = "LEDITS_PromptToPrompt", "LEDITS_PlugAndPlay"  # what they read of the source
EDITS = ("concepts", WORDS, FEATURES)


PICTURE = node("LEDITS_LoadDemoPicture", picture="blue_moon")


def graph_of(name):
    """An edit of EDITS with nothing connected; None is the sampler with neither concepts nor attention."""
    other = node("CLIPTextEncode", text="a green circle on a purple ground", clip=["model", 1])
    graph = edit(name if name in EDITS[1:] else WORDS, STEPS, 1, picture=PICTURE, other=other)
    if name in EDITS[1:]:
        return graph
    del graph["control"], graph["edit"]["inputs"]["attention"]
    if name:
        graph["concept"] = node("LEDITS_SemanticConcept", clip=["model", 1], **CONCEPT)
        graph["edit"]["inputs"]["concepts"] = ["concept", 0]
    return graph


def rewired(graph, old, new):
    """The graph with everything that came from output `old` coming from `new`."""
    return {
        key: node(made["class_type"], **{k: new if v == old else v for k, v in made["inputs"].items()})
        for key, made in graph.items()
    }


def through_parts(graph):
    """The same edit by GUIDER, SAMPLER and SamplerCustomAdvanced."""
    inputs = dict(graph["edit"]["inputs"])
    parts = {kind: {k: inputs.pop(k) for k in names if k in inputs} for kind, names in {
        "guider": ("model", "positive", "negative", "cfg", "concepts"), "sampler": ("inversion", "skip", "attention"),
    }.items()}
    start = ["start", 0] if "mask" in inputs else ["inversion", 1]
    return graph | {
        "guider": node("LEDITS_Guider", **parts["guider"]),
        "sampler": node("LEDITS_Sampler", **parts["sampler"]),
        "noise": node("DisableNoise"),
        **({"start": node("SetLatentNoiseMask", samples=["inversion", 1], mask=inputs["mask"])} if "mask" in inputs else {}),
        "edit": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                     sigmas=["sampler", 1], latent_image=start),
    }


# --- what is connected ----------------------------------------------------------------------------------------------


def on_model(kind, **inputs):
    """A stock node between the model loader and everything that takes its model."""
    return lambda graph: rewired(graph, ["model", 0], ["link", 0]) | {"link": node(kind, model=["model", 0], **inputs)}


def on_edit(kind, **inputs):
    """A stock node on the MODEL of the sampler alone: the inversion is made without."""
    return lambda graph: with_inputs(graph, model=["link", 0]) | {"link": node(kind, model=["model", 0], **inputs)}


def with_inputs(graph, **inputs):
    """The graph with inputs of its sampler changed."""
    return graph | {"edit": node("LEDITS_KSampler", **graph["edit"]["inputs"] | inputs)}


def lora(graph):
    both = rewired(rewired(graph, ["model", 0], ["link", 0]), ["model", 1], ["link", 1])
    return both | {"link": node("LoraLoader", model=["model", 0], clip=["model", 1], lora_name=LORA, strength_model=0.8,
                                strength_clip=0.8)}


def control_net(graph):
    return with_inputs(graph, positive=["link", 0], negative=["link", 1]) | {
        "control net": node("ControlNetLoader", control_net_name=CONTROL_NET),
        "link": node("ControlNetApplyAdvanced", positive=["words", 1], negative=["empty", 0], image=["picture", 0],
                     control_net=["control net", 0], strength=0.3, start_percent=0.0, end_percent=1.0),
    }


def area(graph):
    """Another prompt in the right half, over the target everywhere."""
    return with_inputs(graph, positive=["link", 0]) | {
        "right": node("ConditioningSetArea", conditioning=["other", 0], width=SIDE // 2, height=SIDE, x=SIDE // 2,
                      y=0, strength=1.0),
        "link": node("ConditioningCombine", conditioning_1=["words", 1], conditioning_2=["right", 0]),
    }


def masks(graph):
    """The target in the left half, another prompt in the right."""
    graph = graph | {"none": node("SolidMask", value=0.0, width=SIDE, height=SIDE),
                     "half": node("SolidMask", value=1.0, width=SIDE // 2, height=SIDE)}
    for side, x, prompt in (("left", 0, ["words", 1]), ("right", SIDE // 2, ["other", 0])):
        graph |= {
            f"{side} mask": node("MaskComposite", destination=["none", 0], source=["half", 0], x=x, y=0, operation="add"),
            side: node("ConditioningSetMask", conditioning=prompt, mask=[f"{side} mask", 0], strength=1.0,
                       set_cond_area="default"),
        }
    combined = node("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0])
    return with_inputs(graph, positive=["link", 0]) | {"link": combined}


def differential(graph):
    """Half the picture is free in later steps only."""
    return with_inputs(on_edit("DifferentialDiffusion", strength=1.0)(graph), mask=["free", 0]) | {
        "late": node("SolidMask", value=0.5, width=SIDE, height=SIDE),
        "all": node("SolidMask", value=1.0, width=SIDE // 2, height=SIDE),
        "free": node("MaskComposite", destination=["late", 0], source=["all", 0], x=0, y=0, operation="add"),
    }


def window(graph):
    """Target and another prompt, one after the other."""
    ranged = {name: node("ConditioningSetTimestepRange", conditioning=prompt, start=start, end=start + 0.5)
              for name, prompt, start in (("first", ["words", 1], 0.0), ("then", ["other", 0], 0.5))}
    combined = node("ConditioningCombine", conditioning_1=["first", 0], conditioning_2=["then", 0])
    return with_inputs(graph, positive=["link", 0]) | ranged | {"link": combined}


# What the nodes of the package ask for, by every edit; then others that change what the sampler or the U-Net does.
LINKS = {
    "LoraLoader": lora,
    "ControlNetApplyAdvanced": control_net,
    "ConditioningSetArea": area,
    "ConditioningSetMask": masks,
    "DifferentialDiffusion": differential,
    "FreeU_V2": on_model("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "PerturbedAttentionGuidance": on_edit("PerturbedAttentionGuidance", scale=8.0),
}
MORE = {
    "ConditioningSetTimestepRange": window,
    "SelfAttentionGuidance": on_edit("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "RescaleCFG": on_edit("RescaleCFG", multiplier=0.7),
    "PatchModelAddDownscale": on_model("PatchModelAddDownscale", block_number=3, downscale_factor=2.0, start_percent=0.0,
                                       end_percent=1.0, downscale_after_skip=True, downscale_method="bicubic",
                                       upscale_method="bicubic"),
    "UNetCrossAttentionMultiply": on_model("UNetCrossAttentionMultiply", q=1.1, k=1.0, v=1.0, out=1.1),
}
PAIRS = [*itertools.product(LINKS, EDITS), *itertools.product(MORE, [FEATURES])]


def gap(a, b):
    """Largest difference of two latents; they are of about unit variance."""
    return float((a - b).abs().max())


@pytest.mark.parametrize(("link", "name"), PAIRS)
def test_both_act(latent, link, name):
    connect = (LINKS | MORE)[link]
    both = latent(connect(graph_of(name)))
    assert gap(both, latent(graph_of(name))) > 1e-2
    assert gap(both, latent(connect(graph_of(None)))) > 1e-2


@pytest.mark.parametrize("link", LINKS)
def test_sampler_custom_advanced_gives_the_same(latent, link):
    graph = LINKS[link](graph_of(WORDS))
    assert gap(latent(through_parts(graph)), latent(graph)) < 1e-4


@pytest.mark.parametrize("name", EDITS)
def test_a_batch_is_edited_as_each_picture_alone(latent, name):
    """With LoRA, ControlNet, FreeU and PerturbedAttentionGuidance at once."""
    pictures = [PICTURE, node("LEDITS_LoadDemoPicture", picture="red_star")]

    def chained(**more):
        graph = graph_of(name) | more
        for number, link in enumerate((lora, LINKS["FreeU_V2"], LINKS["PerturbedAttentionGuidance"], control_net)):
            graph = {f"link {number}" if k == "link" else k: v for k, v in link(graph).items()}
            graph = rewired(rewired(graph, ["link", 0], [f"link {number}", 0]), ["link", 1], [f"link {number}", 1])
        return latent(graph)

    both = chained(one=pictures[0], two=pictures[1], picture=node("ImageBatch", image1=["one", 0], image2=["two", 0]))
    assert both.shape == (2, 4, 16, 16)
    for picture, got in zip(pictures, both):
        assert gap(got, chained(picture=picture)[0]) < 1e-3


@pytest.mark.parametrize(("kind", "words", "inputs"), [
    ("HyperTile", "HyperTile", dict(tile_size=64, swap_size=2, max_depth=2, scale_depth=False)),
    ("TomePatchModel", "Token Merging", dict(ratio=0.3)),
    ("EasyCache", "EasyCache", dict(reuse_threshold=0.2, start_percent=0.0, end_percent=1.0, verbose=False)),
])
def test_what_cannot_go_with_attention_control_is_refused_with_a_sentence(server, latent, kind, words, inputs):
    """Tokens that move within a layer that the edit acts on (here the largest), and a source that is not evaluated."""
    connect = on_edit(kind, **inputs)
    error = server.messages(server.queue(connect(graph_of(FEATURES))))["execution_error"]
    assert error["node_id"] == "edit" and error["exception_type"] == "ValueError"
    assert words in error["exception_message"] and "Bypass it" in error["exception_message"]
    assert torch.isfinite(latent(connect(graph_of("concepts")))).all()


def test_nothing_of_all_that_stays_on_the_model(latent, plain_picture):
    sampler, before = plain_picture
    for connect in LINKS.values():
        latent(connect(graph_of(WORDS)))
    assert torch.equal(sampler.sample(), before)
