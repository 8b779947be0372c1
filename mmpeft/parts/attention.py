"""Learned keys and values inside any attention: the torch functions it calls are answered while it runs.

No backbone is named here, and none is changed: an attention is known by what it computes, either one
`scaled_dot_product_attention` or `softmax(q kᵀ) v` written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmpeft.answers import multi_head
from mmpeft.errors import Refused
from mmpeft.functional.attention import prefix_mask
from mmpeft.host import original_class
from mmpeft.parts.prefix import GatedPrefix, Prefix

FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}

KeyValuePart = Prefix | GatedPrefix


def attend(
    host: nn.Module,
    run: Callable[..., Any],
    parts: Sequence[KeyValuePart],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keyed: Callable[[Tensor], Tensor] | None = None,
    scale: Tensor | float = 1.0,
) -> Any:
    """Run an attention module with the keys and values of `parts`.

    Of one that writes its softmax out, `keyed` and `scale` say what it does to keys before, and to scores after the
    product with the queries (the queries are taken as they enter it).

    Raises:
        Refused: the module computed none, or more than one, such attention.
    """
    mode = _Attending(parts, keyed, scale)
    with mode:
        output = run(*args, **kwargs)
    if mode.found != 1:
        raise Refused(
            f"{original_class(host).__name__} computed {mode.found} attentions in one pass by "
            "scaled_dot_product_attention or a softmax between two products, expected 1; learned keys and values "
            "enter there: choose that implementation for this module, or a selector that leaves it out"
        )
    return output


class _Attending(TorchFunctionMode):
    """`softmax(q [K_p; K]ᵀ) [V_p; V]`, and what stands beside it, in place of `softmax(q Kᵀ) V`."""

    def __init__(
        self, parts: Sequence[KeyValuePart], keyed: Callable[[Tensor], Tensor] | None, scale: Tensor | float
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.front = [part for part in parts if isinstance(part, Prefix)]
        self.gated = [part for part in parts if isinstance(part, GatedPrefix)]
        self.keyed, self.scale = keyed, scale
        self.found = 0
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.pending = False
        self.values: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.fused(**dict(zip(FUSED, args)), **kwargs)
        if func in PRODUCTS and args[0].dim() == 4 and args[1].dim() == 4:
            return self.product(func, *args)
        if func in SOFTMAX and self.query is not None and not self.pending:
            return self.softmax(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        self.found += 1
        length = key.shape[2]
        if self.front:
            for part in self.front:
                key, value = part.extend(key, value)
            count, rows = key.shape[2] - length, query.shape[2]
            attn_mask = prefix_mask(attn_mask, is_causal, count, rows, length, query.device)
            is_causal = False
        y = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        scaling = options.get("scale") or query.shape[-1] ** -0.5
        for gated in self.gated:
            y = y + gated.beside(query, scaling).transpose(1, 2).to(y.dtype)
        return y

    def product(self, func: Any, left: Tensor, right: Tensor) -> Tensor:
        """The first product of an attention is that of queries and keys, the one behind the softmax has the values."""
        if not self.pending:
            self.query, self.key = left, right.transpose(-2, -1)
            return func(left, right)  # type: ignore[no-any-return]
        assert self.query is not None
        self.found += 1
        values = right if self.values is None else torch.cat([self.values.to(right.dtype), right], dim=2)
        y: Tensor = func(left, values)
        for part in self.gated:
            y = y + part.beside(self.query * self.scale, 1.0, self.keyed).transpose(1, 2).to(y.dtype)
        self.query, self.pending = None, False
        return y

    def softmax(self, func: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.query is not None
        assert self.key is not None
        self.pending = True
        keys = values = self.key[:, :, :0]
        for part in self.front:
            keys, values = part.extend(keys, values)
        if self.front:
            learned = self.query @ (self.keyed(keys) if self.keyed else keys).transpose(-2, -1) * self.scale
            scores, self.values = torch.cat([learned.to(scores.dtype), scores], dim=-1), values
        return func(scores, *args, **kwargs)  # type: ignore[no-any-return]
