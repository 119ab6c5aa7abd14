"""The benchmark: its cases run, and its page says what was measured."""
import json
import re
import sys

import pytest
import torch
from comfyui_ledits.tools.benchmarks import speed, speed_checkouts, speed_models, speed_references, workbench


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """ComfyUI is prepared already, and stays as it is."""
    monkeypatch.setattr(speed.workbench, "prepare", lambda: None)


@pytest.mark.parametrize("model", ["tiny", "demo", "demo-flow"])
def test_cases_give_lines(model, tmp_path):
    cases = ["inversion", "second_edits", "growth", "attention_kinds"]
    speed.main([*cases, "--model", model, "--quick", "--steps", "2", "--json", str(tmp_path / "numbers.json")])
    written = json.loads((tmp_path / "numbers.json").read_text("utf-8"))
    assert {row["case"] for row in written["rows"]} == set(cases) and written["model"] == model
    for row in written["rows"]:
        assert row["a"] > 0 and row["b"] > 0 and row["ratio"] == row["a"] / row["b"]


def test_the_page_holds_what_was_measured(tmp_path):
    page = tmp_path / "performance.md"
    for case in ("leditspp", "records"):  # the first part stays when the second is measured
        speed.main([case, "--quick", "--report", str(page)])
    text = page.read_text("utf-8")
    assert text.count("ComfyUI 0.") == text.count(", torch ") == text.count("\n## ") == 2
    lines = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| .*\*\*\d", line)]
    assert {name.split(",")[0].split(" ")[0] for name, *_ in lines} >= {"SDXL", "Flux", "LEDITS++"}
    for name, first, a, second, b, ratio, *_ in lines:
        numbers = [float(side.removesuffix(" s").removesuffix(" MB").replace(",", "")) for side in (a, b)]
        assert float(ratio.strip("*")) == pytest.approx(numbers[0] / numbers[1], rel=0.02, abs=0.006), name


def test_what_is_no_checkout_of_a_reference_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no checkout of PnPInversion"):
        speed_references.known(tmp_path)
    (tmp_path / "masactrl").mkdir()
    (tmp_path / "masactrl" / "masactrl_utils.py").touch()
    assert speed_references.known(tmp_path) == "MasaCtrl"


def test_a_checkout_s_packages_come_first_and_go_again(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "own.py").write_text("import matplotlib.pyplot\nname = __file__\n", "utf-8")
    before = sys.modules.get("utils")
    with speed_checkouts.imported(tmp_path):
        from utils.own import name
    assert name.startswith(str(tmp_path)) and "utils.own" not in sys.modules and sys.modules.get("utils") is before
    assert str(tmp_path) not in sys.path


def test_the_authors_code_gets_the_weights_that_this_pack_runs_on():
    model = speed_models.random_model(speed_models.SMALL)
    x, t, words = torch.randn(2, 4, 16, 16), torch.tensor([20.0, 700.0]), torch.randn(2, 77, speed_models.SMALL["context_dim"])
    with torch.no_grad():
        theirs = speed_models.diffusers_unet(model)(x, t, encoder_hidden_states=words).sample
        ours = model.model.diffusion_model(x, t, context=words)
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_pytorch_s_attention_is_that_of_all_networks_meanwhile():
    from comfy.ldm.flux import math
    from comfy.ldm.modules import attention

    before = attention.optimized_attention
    with workbench.pytorch_attention():
        assert attention.optimized_attention is math.optimized_attention is attention.attention_pytorch
        assert attention.optimized_attention_masked is attention.attention_pytorch
    assert attention.optimized_attention is math.optimized_attention is attention.optimized_attention_masked is before


def test_a_part_with_pytorch_s_attention_leaves_the_next_part_its_own(monkeypatch):
    from comfy.ldm.modules import attention

    before, during = attention.optimized_attention, []
    monkeypatch.setattr(speed, "_run", lambda options: during.append(attention.optimized_attention))
    for more in (["--pytorch-attention"], []):
        speed.run(speed.parse(more))
    assert during == [attention.attention_pytorch, before]


@pytest.mark.parametrize("more", [["--model", "tiny"], ["--size", "8"], ["--steps", "3"], ["--pytorch-attention"]])
def test_what_the_parts_of_the_page_have_themselves_is_refused_with_it(more, capsys):
    with pytest.raises(SystemExit):
        speed.parse(["--report", *more])
    assert f"its own {more[0]}" in capsys.readouterr().err
