"""HF PEFT's LoRA on the same models: on every linear and convolution that it takes, by module name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import Tensor, nn


def peft_lora(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    """How many layers it wraps, and how many of those get a gradient; or why it does not run.

    A grouped convolution takes part only where its groups divide the rank, so that those are left out.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    names = [n for n, m in model.named_modules() if n and (isinstance(m, kinds) or type(m).__name__ == "Conv1D")]
    names = [name for name in names if getattr(model.get_submodule(name), "groups", 1) == 1]
    try:
        config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
        loss(tuned).backward()
    except Exception as error:
        return {"state": "FAIL", "why": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    grads = [p.grad for name, p in tuned.named_parameters() if ".lora_A." in name]
    live = sum(grad is not None and bool(grad.any()) for grad in grads)
    return {"state": "ok" if live == len(grads) else "dead", "layers": len(grads), "live": live}
