"""A step of training and one of evaluation: time, bytes kept, kernel calls; ours, PEFT's and the floor's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import METHODS, Family
from timing import Setting, interleaved, kernel_calls, table
from torch import Tensor, nn

from mmpeft.bench.memory import kept_for_backward

TIMES = ("", "s/step", "÷ floor", "÷ PEFT", "s/evaluation", "÷ backbone", "÷ PEFT")
COUNTS = ("", "trains", "kernels/step", "kept, MiB", "÷ floor", "÷ PEFT", "kept bf16, MiB", "÷ floor", "÷ PEFT")
MIB = 2**20


def measure(family: Family, setting: Setting) -> dict[str, Any]:
    """Report the family's tables; return its figures."""
    models, refused = _models(family)
    turns = interleaved({name: _Step(family, model) for name, model in models.items()}, setting)
    figures: dict[str, Any] = {}
    for name, model in models.items():
        peer = next((f"PEFT {m}" for m in METHODS if name.startswith(f"ours {m}")), "")
        peer = peer if peer in models else ""
        figures[name] = {
            "peer": peer,
            "trains": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step": turns.time(name),
            "step ÷ floor": turns.ratio(name, "floor"),
            "step ÷ PEFT": turns.ratio(name, peer) if peer else "",
            "step ÷ LoRA": turns.ratio(name, "ours LoRA all"),
            "kept": _kept(model, lambda model=model: family.loss(model)),
            "kept bf16": _kept(model, lambda model=model: _autocast(family, model)),
            "kernels": kernel_calls(_Step(family, model)),
        }
    evaluated = {name: model.eval() for name, model in models.items() if "pointwise" not in name}
    turns = interleaved({name: _Evaluation(family, model) for name, model in evaluated.items()}, setting)
    for name in evaluated:
        peer = figures[name]["peer"]
        figures[name] |= {
            "evaluation": turns.time(name),
            "evaluation ÷ backbone": turns.ratio(name, "floor"),
            "evaluation ÷ PEFT": turns.ratio(name, peer) if peer else "",
            "evaluation ÷ LoRA": turns.ratio(name, "ours LoRA all"),
        }
    setting.say(f"\n### {family.title}\n")
    setting.say(table(TIMES, (_times(name, own) for name, own in figures.items())))
    setting.say(table(COUNTS, (_counts(name, figures) for name in figures)))
    for name, reason in refused.items():
        setting.say(f"{name} is refused by it: {reason}.\n")
    return figures


def _models(family: Family) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All that take turns, ours beside its peer; and what PEFT does not do."""
    models, refused = {"floor": family.floor()}, {}
    for method in METHODS:
        models[f"ours {method}"] = family.tuned(method)
        try:
            models[f"PEFT {method}"] = family.peers(method)
        except ValueError as error:
            refused[f"PEFT {method}"] = str(error)
        models[f"ours {method}, pointwise"] = family.tuned(method, "pointwise")
    return models, refused


class _Step:
    """Forward and backward; gradients are dropped, so that none is added to another."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        self.family, self.model = family, model
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        self.family.loss(self.model).backward()
        for parameter in self.trained:
            parameter.grad = None


class _Evaluation:
    """Forward without gradients."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        self.family, self.model = family, model

    @torch.no_grad()
    def __call__(self) -> None:
        self.family.loss(self.model)


def _kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes alive for the backward pass; parameters do not count, nor those that a forward pass makes anew.

    PEFT's multi-head attention does so: it merges, runs and registers the frozen weights again.
    """
    before = list(model.parameters())  # held, so that no new storage takes an address of theirs
    known = {p.untyped_storage().data_ptr() for p in before}
    total = kept_for_backward(loss)
    made = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return total - sum(size for address, size in made.items() if address not in known)


def _autocast(family: Family, model: nn.Module) -> Tensor:
    with torch.autocast(family.device.type, torch.bfloat16):
        return family.loss(model)


def _times(name: str, own: dict[str, Any]) -> list[str]:
    kinds = ("step", "step ÷ floor", "step ÷ PEFT", "evaluation", "evaluation ÷ backbone", "evaluation ÷ PEFT")
    return [name, *(f"{own[kind]:.3f}" if own.get(kind) else "" for kind in kinds)]


def _counts(name: str, figures: dict[str, Any]) -> list[str]:
    own, floor = figures[name], figures["floor"]
    peer = figures.get(own["peer"])
    cells = [name, f"{own['trains']:,}", f"{own['kernels']:,}"]
    for what in ("kept", "kept bf16"):
        share = f"{own[what] / peer[what]:.3f}" if peer else ""
        cells += [f"{own[what] / MIB:.0f}", f"{own[what] / floor[what]:.2f}", share]
    return cells
