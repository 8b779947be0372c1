"""Loaders of other programs that install: what they read of files written here; docs/readers.md has the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from benchmarks.readers import lycoris_lora
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
