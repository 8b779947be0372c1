"""LoRA and DoRA beside HF PEFT and beside the floor, on one idle core.

    python benchmarks/lora_vs_peft.py [--rounds 7] [--batch 8] [--json out.json]

Backbone: timm vit_base_patch16_224 with random weights; LoRA r=8 on q, k, v, out and both MLP projections. The
*floor* is the same frozen backbone where only `cls_token` trains: a full forward pass and a full input-gradient
backward pass. Models run in turn, so that whatever the machine does hits all of them; medians are reported.
Bytes saved for backward are counted (each storage once, the model's own parameters excluded), not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
from timing import interleaved
from torch import Tensor, nn

import mmpeft
from mmpeft.bench.memory import kept_for_backward

TARGETS = ["qkv", "proj", "fc1", "fc2"]
AT = "attn.*|mlp.*"
Build = Callable[[], nn.Module]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def floor() -> nn.Module:
    model = backbone().requires_grad_(False)
    model.cls_token.requires_grad_(True)
    return model


def ours(method: mmpeft.Method, recompute: str | None = None) -> Build:
    def build() -> nn.Module:
        model = backbone()
        tuning = mmpeft.attach(model, method)
        tuning.recompute = recompute
        return model

    return build


def peft(dora: bool = False) -> Build:
    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=8, target_modules=r".*blocks\..*\.(qkv|attn\.proj|fc1|fc2)", use_dora=dora)
        return get_peft_model(backbone(), config)

    return build


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(x).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def kept(model: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes alive between the forward and the backward pass, parameters and input excluded."""

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return model(x).float().square().mean()

    return kept_for_backward(loss)


def attach_seconds(rounds: int) -> tuple[float, float]:
    """Medians for 24 layers and 168 linears, as a Llama would have: ours, PEFT's."""
    from peft import LoraConfig, get_peft_model

    def blocks() -> nn.Module:
        return timm.models.VisionTransformer(embed_dim=384, depth=24, num_heads=6, img_size=64, num_classes=10)

    mine, theirs = [], []
    for _ in range(rounds):
        model = blocks()
        start = time.perf_counter()
        mmpeft.attach(model, mmpeft.LoRA(rank=8, at=AT))
        mine.append(time.perf_counter() - start)
        model = blocks()
        start = time.perf_counter()
        get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
        theirs.append(time.perf_counter() - start)
    return statistics.median(mine), statistics.median(theirs)


def call_microseconds(calls: int = 3000) -> dict[str, float]:
    """One linear of width 64 on one row, gradients on: what small batches and decoding feel."""
    from peft import LoraConfig, get_peft_model

    from mmpeft.sites import Site, anatomy

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)  # type: ignore[no-any-return]

    Tiny.__module__, Tiny.__qualname__ = "benchmark", "Tiny"
    anatomy("benchmark.Tiny")(lambda model: [Site("q", "attn.q", 0, kind="linear")])
    base, mine, dora = Tiny().requires_grad_(False), Tiny(), Tiny()
    mmpeft.attach(mine, mmpeft.LoRA(rank=8, at="attn.q"))
    mmpeft.attach(dora, mmpeft.DoRA(rank=8, at="attn.q"))
    theirs = get_peft_model(Tiny(), LoraConfig(r=8, target_modules=["q"])).base_model.model
    their_dora = get_peft_model(Tiny(), LoraConfig(r=8, target_modules=["q"], use_dora=True)).base_model.model
    linears = {
        "base": base.q,
        "ours LoRA": mine.q,
        "PEFT LoRA": theirs.q,
        "ours DoRA": dora.q,
        "PEFT DoRA": their_dora.q,
    }
    x = torch.randn(1, 64)
    best = dict.fromkeys(linears, float("inf"))
    for _ in range(5):
        for name, linear in linears.items():
            start = time.perf_counter()
            for _ in range(calls):
                linear(x)
            best[name] = min(best[name], (time.perf_counter() - start) / calls * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, 3, 224, 224)
    lora, dora = mmpeft.LoRA(rank=8, at=AT), mmpeft.DoRA(rank=8, alpha=8, at=AT)
    builds: dict[str, Build] = {
        "floor": floor,
        "ours LoRA": ours(lora),
        "PEFT LoRA": peft(),
        "ours DoRA": ours(dora),
        "PEFT DoRA": peft(dora=True),
        "ours LoRA, recompute pointwise": ours(lora, "pointwise"),
    }
    models = {name: build() for name, build in builds.items()}
    seconds = interleaved({name: partial(step, model, x) for name, model in models.items()}, args.rounds)
    memory = {name: kept(model, x) for name, model in models.items()}
    memory16 = {name: kept(model, x, autocast=True) for name, model in models.items()}
    small16 = {name: kept(model, x[:2], autocast=True) for name, model in models.items()}
    print(f"vit_base_patch16_224, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}")
    print(f"{'':32}{'s/step':>8}{'÷floor':>8}{'÷PEFT':>8}{'MiB':>8}{'÷floor':>8}{'bf16 MiB':>10}{'at batch 2':>12}")
    for name in models:
        peer = seconds["PEFT DoRA" if "DoRA" in name else "PEFT LoRA"]
        print(
            f"{name:32}{seconds[name]:8.3f}{seconds[name] / seconds['floor']:8.3f}{seconds[name] / peer:8.3f}"
            f"{memory[name] / 2**20:8.0f}{memory[name] / memory['floor']:8.2f}{memory16[name] / 2**20:10.0f}"
            f"{small16[name] / 2**20:12.0f}"
        )
    del models
    gc.collect()
    mine, theirs = attach_seconds(5)
    calls = call_microseconds()
    print(f"attach, 24 layers: ours {mine * 1e3:.0f} ms, PEFT {theirs * 1e3:.0f} ms, ratio {mine / theirs:.3f}")
    print("one call at width 64, µs: " + ", ".join(f"{name} {us:.1f}" for name, us in calls.items()))
    limits = {
        "LoRA step ≤ 0.95 of PEFT": (seconds["ours LoRA"] / seconds["PEFT LoRA"], 0.95),
        "LoRA step ≤ 1.10 of the floor": (seconds["ours LoRA"] / seconds["floor"], 1.10),
        "DoRA step ≤ 1.15 of our LoRA": (seconds["ours DoRA"] / seconds["ours LoRA"], 1.15),
        "attach ≤ 0.2 of PEFT": (mine / theirs, 0.2),
        "call at width 64 ≤ 0.5 of PEFT": (calls["ours LoRA"] / calls["PEFT LoRA"], 0.5),
        "bytes ≤ PEFT": (memory["ours LoRA"] / memory["PEFT LoRA"], 1.0),
        "bytes, recompute pointwise ≤ 1.15 of the floor": (
            memory["ours LoRA, recompute pointwise"] / memory["floor"],
            1.15,
        ),
        "bytes, bf16 autocast, batch 2 ≤ 0.6 of PEFT": (small16["ours LoRA"] / small16["PEFT LoRA"], 0.6),
        f"bytes, bf16 autocast, batch {args.batch} ≤ 0.6 of PEFT": (memory16["ours LoRA"] / memory16["PEFT LoRA"], 0.6),
        f"the same, recompute pointwise, batch {args.batch}": (
            memory16["ours LoRA, recompute pointwise"] / memory16["PEFT LoRA"],
            0.6,
        ),
    }
    for name, (value, limit) in limits.items():
        print(f"{'met   ' if value <= limit else 'MISSED'} {name}: {value:.3f}")
    if args.json:
        report = {"seconds": seconds, "bytes": memory, "bytes_bf16": memory16, "attach": [mine, theirs], "calls": calls}
        args.json.write_text(json.dumps(report | {"limits": limits}, indent=1))


if __name__ == "__main__":
    main()
