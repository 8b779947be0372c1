"""How a prompt enters a causal transformers model: its keys and values once, the text's positions behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmpeft.host import original_class
from mmpeft.parts.prompt import Prompt


def prompted(
    host: nn.Module, run: Callable[..., Any], part: Prompt, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's forward pass with the prompt in front of every row; equal to concatenated embeddings."""
    parameters = list(inspect.signature(original_class(host).forward).parameters)[1:]
    kwargs = {**dict(zip(parameters, args)), **kwargs}
    text = kwargs.get("input_ids")
    text = kwargs["inputs_embeds"] if text is None else text
    embedding: Any = host.get_input_embeddings()  # type: ignore[operator]

    def prompt_alone() -> None:
        alone = {"inputs_embeds": part.embeddings()[None].to(embedding.weight.dtype), "use_cache": False}
        checkpointed = [m for m in host.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in checkpointed:  # as for the suite's own recomputation
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            run(**alone, **({"logits_to_keep": 1} if "logits_to_keep" in parameters else {}))
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]

    part.record(host, prompt_alone)
    positions = kwargs.get("position_ids")
    if positions is None:
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + text.shape[1], device=text.device)[None]
    return run(**{**kwargs, "position_ids": positions + len(part)})
