"""AdapterHub's own reader and writer, the library `adapters`, under its own interpreter; see `folder_jobs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from folder_jobs import answer
from safetensors.torch import save_file

MADE: dict[str, Any] = {
    "double_seq_bn": "double_seq_bn[reduction_factor=4]",
    "seq_bn": "seq_bn[reduction_factor=4]",
    "par_bn": "par_bn",
    "par_bn, learned": adapters.ParBnConfig(scaling="learned", reduction_factor=4),
    "double_seq_bn, by block": adapters.DoubleSeqBnConfig(reduction_factor={"1": 8, "default": 4}, scaling=2.0),
    "double_seq_bn, left out": adapters.DoubleSeqBnConfig(leave_out=[0], non_linearity="gelu"),
    "lora": "lora",
    "lora, all": adapters.LoRAConfig(
        r=3, alpha=5, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
    ),
    "dora": adapters.DoRAConfig(),
    "ia3": "ia3",
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "prefix_tuning": "prefix_tuning",
    "loreft": "loreft",
}


def answers(model: Any) -> torch.Tensor:
    """Logits of one text."""
    found: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return found


@torch.no_grad()
def one(verb: str, base: Path, folder: Path, out: Path, kind: str) -> None:
    """Read a folder, or make one."""
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base).eval()
    found = {"logits.base": answers(model)}
    adapters.init(model)
    if verb == "read":
        info: dict[str, Any] = {}
        own = model.load_adapter(str(folder), use_safetensors=True, loading_info=info)
        lost = [*info.get("missing_keys", ()), *info.get("unexpected_keys", ())]
        assert not lost, f"keys that do not fit: {lost[:3]}"
        model.set_active_adapters(own)
    else:
        torch.manual_seed(0)
        model.add_adapter("made", config=MADE[kind])
        model.set_active_adapters("made")
        for key, parameter in model.named_parameters():
            if ".made." in key:
                parameter += torch.randn_like(parameter) * 0.1
        model.save_adapter(str(folder), "made", with_head=False, use_safetensors=True)
    model.eval()
    save_file(found | {"logits.tuned": answers(model)}, out)


if __name__ == "__main__":
    answer(one)
