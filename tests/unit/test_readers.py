"""Loaders of other programs that install: what they read of files written here; docs/readers.md has the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from benchmarks.readers import language, libraries, lycoris_lora
from benchmarks.readers.__main__ import judged
from benchmarks.readers.job import Job
from benchmarks.readers.page import END, START, Row, page, put
from mmpeft.formats.exchange import export
from mmpeft.formats.merged import merged_copy
from tests.unit.toy import Toy

AT = "attn.q|mlp.*"
METHODS = {
    "LoRA": mmpeft.LoRA(at=AT, rank=2, alpha=3),
    "DoRA": mmpeft.DoRA(at=AT, rank=2),
    "LoHa": mmpeft.LoHa(at=AT, rank=2),
    "LoKr": mmpeft.LoKr(at=AT, rank=2),
    "norms": mmpeft.NormTuning(),
    "full": mmpeft.Full(at="mlp.up"),
}


@pytest.mark.parametrize("method", METHODS)
def test_lycoris_reads_what_trained(method: str, tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    tuning = mmpeft.attach(Toy(), METHODS[method])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    file = export(tuning, tmp_path / "a.safetensors", "kohya", verify=False, prefix="unet").path
    base = {f"unet.{name}": tensor for name, tensor in Toy().state_dict().items()}
    wanted = {f"unet.{name}": tensor for name, tensor in merged_copy(tuning).state_dict().items()}
    job = Job("SD 1.5", "kohya", method, str(file), "", {"unet": {}}, "")
    assert judged(wanted, base, lycoris_lora.read(job, base, load_file(file))) == "exact"
    assert judged(wanted, base, {}) == "*nothing*"


def test_lycoris_wraps_any_model_by_its_own_names(tmp_path: Path) -> None:
    wrapper = pytest.importorskip("lycoris.wrapper")
    tuning = mmpeft.attach(Toy(), METHODS["LoKr"])
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += 0.1
    file = export(tuning, tmp_path / "a.safetensors", "kohya").path
    model = Toy().requires_grad_(False)
    network, _ = wrapper.create_lycoris_from_weights(1.0, None, model, weights_sd=load_file(file))
    for module in network.loras:
        module.merge_to(1.0)
    for name, tensor in merged_copy(tuning).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_onnxruntime_runs_what_cannot_be_merged(tmp_path: Path) -> None:
    """A tower with the adapter in place; of UNets and texts, merged and not, the table has all."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pair = libraries.kinds(tmp_path)["CLIP"]
    tower = replace(pair, answers={"images": pair.answers["images"]})
    found = libraries.row(tower, libraries.METHODS["AdaptFormer"], tmp_path)
    assert found.pop(libraries.IN_PLACE) == "exact"
    assert all(said.startswith("not written: Branch at visual.") for said in found.values())
    one, none = torch.ones(2), torch.zeros(2)
    assert libraries.judged({"": none}, {"": one}, lambda: {"": none}) == "1"


def test_onnxruntime_runs_a_merged_unet(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    kind = libraries.kinds(tmp_path)["UNet"]
    torch.manual_seed(0)
    model = kind.build().eval()
    before = libraries.answered(model, kind)
    tuning = mmpeft.attach(model, mmpeft.DoRA(rank=2))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    wanted = libraries.answered(model, kind)
    tuning.merge()
    assert libraries.judged(before, wanted, lambda: libraries.run(model, kind, tmp_path)) == "exact"


def test_the_table_says_what_came_out_and_leaves_the_rest_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "readers.md"
    file.write_text(f"# Readers\n\n{START}\nold\n{END}\nrest\n")
    rows = [Row("comfyui", "SDXL", "kohya", "DoRA", "0.5"), Row("forge", "SDXL", "kohya", "DoRA", "refused: why")]
    put(page(rows, {"comfyui": "1", "forge": "2"}, {("SDXL", "kohya", "DoRA, comfy")}), file)
    text = file.read_text()
    assert text.startswith("# Readers\n")
    assert text.endswith("rest\n")
    assert "|DoRA|0.5|refused|" in text
    assert 'Not written: DoRA, `dora="comfy"`.' in text
    assert "old" not in text


def test_columns_that_are_not_run_stay_in_the_table_of_language_models() -> None:
    rows = {("Llama", "LoRA"): {"PEFT 1": "exact", "vllm": "0.5, *partly*: 2 tensors left out"}}
    page = f"before\n{language.section(rows)}after\n"
    assert language.known(page) == rows
    now = language.known(page) | {("Llama", "DoRA"): {"PEFT 1": "refused"}}
    assert "|Llama|DoRA|refused|not run|" in language.section(now)
    assert language.judged({"a": torch.ones(4), "b": torch.zeros(1)}, {"a": torch.ones(4)}) == "exact"
    assert language.judged({"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.ones(4)}).startswith(
        "0.71, *partly*: 1"
    )
