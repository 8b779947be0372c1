"""A bank with an entry of every kind."""

from __future__ import annotations

import torch

import mmpeft
from mmpeft.bank import Bank
from tests.support.moved import redraw
from tests.unit.toy import Toy

X = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(3))


KINDS = {
    "lora": mmpeft.LoRA(at="attn.q", rank=2),
    "wide": mmpeft.LoRA(at="attn.q|mlp.*", rank=3, alpha=6),
    "adapter": mmpeft.ParallelAdapter(at="block", bottleneck=2),
    "full": mmpeft.Full(),
}


def filled(names: dict[str, mmpeft.Method] | None = None) -> Bank:
    bank = Bank(Toy())
    for i, (name, method) in enumerate((names or KINDS).items()):
        bank.add_task(name, method)
        redraw(bank.tuning(name).parameters(), seed=i)
    return bank.eval()
