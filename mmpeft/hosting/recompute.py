"""Activation recomputation at every block: all of it, or the pointwise operations alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmpeft.functional.fused import LOW_RANK_OP
from mmpeft.types import Args, Argument, Forward, Kwargs, Output

Recompute = Literal["pointwise", "block"] | None
_ON: ContextVar[bool] = ContextVar("mmpeft_recompute", default=True)


@contextmanager
def recomputing(on: bool) -> Iterator[None]:
    """Whether blocks that are run inside recompute, of this thread or task alone."""
    token = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(token)


_aten = torch.ops.aten
_PRODUCTS = {
    LOW_RANK_OP,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.linear.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_around(mode: Literal["pointwise", "block"]) -> Forward:
    """A wrapper that runs a block and recomputes it in the backward pass.

    `pointwise` keeps the results of matrix products and attention and repeats normalisations, activations and
    additions; `block` keeps the block's input only.
    """
    return _Pointwise() if mode == "pointwise" else _Block()


def is_cache(value: object) -> bool:
    """Whether an argument is a key-value cache, which a forward pass writes into."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _without_caches(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Arguments without key-value caches: a block that runs twice would write its keys and values twice."""

    def keep(value: object) -> object:
        return None if is_cache(value) else value

    return tuple(map(keep, args)), {name: keep(value) for name, value in kwargs.items()}


class _Block:
    def __call__(self, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        if not (torch.is_grad_enabled() and _ON.get()):
            return run(*args, **kwargs)
        args, kwargs = _without_caches(args, kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


class _Pointwise:
    def __call__(self, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
        if not (torch.is_grad_enabled() and _ON.get()):
            return run(*args, **kwargs)
        args, kwargs = _without_caches(args, kwargs)
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)
