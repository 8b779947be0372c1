"""Memory of a training step under LST and LoRA: `python benchmarks/lst_memory.py`.

Bytes kept for the backward pass are counted; peak memory is sampled in a process of its own for each method (resident
memory above what the model and the batch take, on CPU; allocated memory on an accelerator).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import timm
import torch
from rich.console import Console
from rich.table import Table

import mmpeft
from mmpeft.bench.memory import kept_for_backward

METHODS = {
    "LoRA attn.{q,v}": mmpeft.LoRA(rank=8, at="attn.{q,v}"),
    "LoRA all linears": mmpeft.LoRA(rank=8, at="attn.*,mlp.*"),
    "LST token by token": mmpeft.LST(attention=False),
    "LST": mmpeft.LST(),
    "LST drop=3": mmpeft.LST(drop=3),
}
MIB = 2**20


def measure(name: str, model_name: str, batch: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = timm.create_model(model_name, pretrained=False).to(device).train()
    x = torch.randn(batch, 3, *model.patch_embed.img_size, device=device)
    tuning = mmpeft.attach(model, METHODS[name])

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    with torch.no_grad():
        model(x[:1])  # kernels and thread pools
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        loss().backward()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
        loss().backward()
        peak = torch.cuda.max_memory_allocated() / MIB - before
    tuning.model.zero_grad(set_to_none=True)
    trainable = sum(p.numel() for p in tuning.parameters())
    return {"kept": kept_for_backward(loss) / MIB, "peak": peak, "trainable": trainable}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.model, options.batch, options.device)))
        return
    table = Table(title=f"One training step: {options.model}, batch {options.batch}, {options.device}")
    for column in ("method", "trainable", "kept for backward", "of LoRA's", "peak above rest", "of LoRA's"):
        table.add_column(column, justify="left" if column == "method" else "right")
    first = None
    for name in METHODS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        shares = {key: f"{found[key] / first[key]:.2f}" for key in ("kept", "peak")}
        table.add_row(
            name,
            f"{found['trainable']:,}",
            f"{found['kept']:.0f} MiB",
            shares["kept"],
            f"{found['peak']:.0f} MiB",
            shares["peak"],
        )
    Console().print(table)


if __name__ == "__main__":
    main()
