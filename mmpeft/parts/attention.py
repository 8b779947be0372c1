"""Learned keys and values inside any attention: the torch functions it calls are answered while it runs.

No backbone is named here, and none is changed: an attention is known by what it computes, either one
`scaled_dot_product_attention` or `softmax(q kᵀ) v` written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmpeft.errors import Refused
from mmpeft.functional.attention import prefix_mask
from mmpeft.hosting.answers import multi_head
from mmpeft.hosting.host import original_class
from mmpeft.parts.prefix import GatedPrefix, Prefix
from mmpeft.sites import Connect, Site
from mmpeft.types import AnyFunc, Args, Argument, Forward, Kwargs, Output

FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}

LINEAR = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}
LINEAR |= {torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__}
"""What is done to the scores of learned keys as to the others', where it says nothing of single keys."""
POINTWISE = {torch.tanh, Tensor.tanh}
SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}
SUMS |= {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__isub__, Tensor.sub_}
MASKS = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, torch.where, Tensor.where}
SHAPE = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, Tensor.flatten, torch.flatten, Tensor.contiguous}
DTYPE = {Tensor.to, Tensor.float, Tensor.type, Tensor.type_as, Tensor.half, Tensor.bfloat16, Tensor.double}
CARRIED = SUMS | MASKS | SHAPE | DTYPE
"""What passes over learned keys: they have no mask and no bias by position, and their shape is kept."""

KeyValuePart = Prefix | GatedPrefix


def connection(site: Site) -> Connect:
    """How learned keys and values enter a `kv` site: by the torch functions it calls, where nothing else is noted."""
    return site.connect or Connect("", attend)


def attend(
    host: nn.Module,
    run: Forward,
    parts: Sequence[KeyValuePart],
    args: Args,
    kwargs: Kwargs,
    keyed: Callable[[Tensor], Tensor] | None = None,
) -> Output:
    """Run an attention module with the keys and values of `parts`.

    Of one that writes its softmax out, `keyed` says what it does to keys before the product with the queries; what it
    does to the scores behind it is followed: factors act on those of learned keys too, masks and biases do not.

    Raises:
        Refused: the module computed none, or more than one, such attention.
    """
    mode = _Attending(parts, keyed)
    with mode:
        output = run(*args, **kwargs)
    if mode.found != 1:
        raise Refused(
            f"{original_class(host).__name__} computed {mode.found} attentions in one pass by "
            "scaled_dot_product_attention or a softmax between two products, expected 1; learned keys and values "
            "enter there: choose that implementation for this module, or a selector that leaves it out"
        )
    return output


def attentions(run: Forward, *args: Argument, **kwargs: Argument) -> int:
    """How many attentions that learned keys can enter a module's pass computes; -1 if there are others too."""
    mode = _Attending(())
    with mode:
        run(*args, **kwargs)
    return mode.found if not mode.other else -1


class _Attending(TorchFunctionMode):
    """`softmax(q [K_p; K]ᵀ) [V_p; V]`, and what stands beside it, in place of `softmax(q Kᵀ) V`."""

    def __init__(self, parts: Sequence[KeyValuePart], keyed: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.front = [part for part in parts if isinstance(part, Prefix)]
        self.gated = [part for part in parts if isinstance(part, GatedPrefix)]
        self.keyed = keyed
        self.found = 0
        self.other = False
        self.scores: Tensor | None = None
        """Of the attention under way, between its first product and its softmax."""
        self.learned: list[Tensor] = []
        """Scores of the learned keys: one for all in front, one for each gated part."""
        self.share: Tensor | None = None
        """Behind the softmax, until the product with the values."""
        self.values: list[Tensor] = []

    def __torch_function__(self, func: AnyFunc, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.fused(**dict(zip(FUSED, args)), **kwargs)
        if func in PRODUCTS and args[0].dim() == 4 and args[1].dim() == 4:
            return self.product(func, *args)
        if func in SOFTMAX and self.scores is not None and args and args[0] is self.scores:
            return self.softmax(func, *args, **kwargs)
        if func in SOFTMAX and args and args[0].dim() == 4:
            self.other = True
        if func is F.multi_head_attention_forward:
            with self:
                return multi_head(*args, **kwargs)
        y = func(*args, **kwargs)
        if self.scores is not None and isinstance(y, Tensor) and any(a is self.scores for a in args):
            self.follow(func, y, args, kwargs)
        return y

    def fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Argument,
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

    def product(self, func: AnyFunc, left: Tensor, right: Tensor) -> Tensor:
        """The first product of an attention is that of queries and keys, the one behind the softmax has the values."""
        if self.share is None:
            y: Tensor = func(left, right)
            self.scores = y
            self.learned, self.values = [], []
            keys = right.transpose(-2, -1)
            for group in ([self.front] if self.front else []) + [[part] for part in self.gated]:
                learned, values = _learned(group, keys, left)
                learned = self.keyed(learned) if self.keyed else learned
                self.learned.append(left @ learned.transpose(-2, -1))
                self.values.append(values)
            return y
        self.found += 1
        shares, found = self.learned, self.values
        self.share = None
        self.learned, self.values = [], []
        if self.front:
            right = torch.cat([found[0].to(right.dtype), right], dim=2)
        mixed: Tensor = func(left, right)
        for part, own, value in zip(self.gated, shares[bool(self.front) :], found[bool(self.front) :]):
            beside = (own @ value.to(own.dtype)) * torch.tanh(part.gate).to(own.dtype)
            mixed = mixed + beside.to(mixed.dtype)
        return mixed

    def follow(self, func: AnyFunc, y: Tensor, args: Args, kwargs: Kwargs) -> None:
        """Do to the scores of learned keys what is done to the others'."""
        others = [a for a in args if isinstance(a, Tensor) and a is not self.scores]
        own = self.scores
        assert own is not None
        alike = all(a.dim() == 0 or a.shape[-1] == 1 < own.shape[-1] for a in others)  # for every key
        if func in LINEAR | SUMS and alike:
            self.learned = [func(*(s if a is own else a for a in args), **kwargs) for s in self.learned]
        elif func in POINTWISE:
            self.learned = [func(s) for s in self.learned]
        elif func not in CARRIED or func in LINEAR:
            return  # a value computed from the scores; where they become it, no softmax of theirs is found
        self.scores = y

    def softmax(self, func: AnyFunc, scores: Tensor, *args: Argument, **kwargs: Argument) -> Tensor:
        learned, self.scores = [s.to(scores.dtype) for s in self.learned], None
        front = learned[:1] if self.front else []
        y: Tensor = func(torch.cat([*front, scores], dim=-1) if front else scores, *args, **kwargs)
        self.learned = [*front, *(func(s, *args, **kwargs) for s in learned[len(front) :])]
        self.share = y
        return y


def _learned(group: Sequence[KeyValuePart], keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, h, p, d] of some prefixes together, or of one gated part."""
    if isinstance(group[0], GatedPrefix):
        return group[0].projected(queries)
    found = values = keys[:, :, :0]
    for part in group:
        assert isinstance(part, Prefix)
        found, values = part.extend(found, values)
    return found, values
