"""How a prompt enters a transformers model, the text's positions behind it.

Causal models keep its keys and values; encoders see it as part of the sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.errors import ConfigError
from mmpeft.hosting.host import original_class
from mmpeft.parts.prompt import Prompt
from mmpeft.types import AnyModule, Args, Forward, Kwargs, Output


def prompted(host: nn.Module, run: Forward, part: Prompt, args: Args, kwargs: Kwargs) -> Output:
    """A decoder's forward pass with the prompt in front of every row; equal to concatenated embeddings.

    The host is the stack of blocks with its embedding, which is given the text's positions when they are made: one
    for each word or several (of pictures), counted from the mask or not. All of them move by the prompt's length.
    """
    kwargs = _named(host, args, kwargs)
    text = kwargs.get("input_ids")
    text = kwargs["inputs_embeds"] if text is None else text
    embedding: AnyModule = host.get_input_embeddings()  # type: ignore[operator]  # a model of transformers

    def prompt_alone() -> None:
        with nullcontext() if torch.compiler.is_compiling() else _unchecked(host):
            run(inputs_embeds=part.embeddings()[None].to(embedding.weight.dtype), use_cache=False)

    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the older name before transformers 5.24
    past = cache.get_seq_length() if cache is not None else 0
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(text.shape[1], device=text.device)[None] + past + _first_position(host)
    if not torch.compiler.is_compiling() and not isinstance(past, Tensor):
        _check_room(host, len(part), past + text.shape[1])
    kept = part.keys(host, prompt_alone)
    return part.served(host, kept, past, partial(run, **{**kwargs, "position_ids": positions + len(part)}))


_PAUSED: dict[int, int] = {}
_LOCK = Lock()


@contextmanager
def _unchecked(host: nn.Module) -> Iterator[None]:
    """Without transformers' own recomputation, as without the suite's; several threads may be inside at once."""
    flag = "gradient_checkpointing"
    if not torch.is_grad_enabled():
        yield
        return
    with _LOCK:
        paused = [m for m in host.modules() if getattr(m, flag, False) or id(m) in _PAUSED]
        for module in paused:
            setattr(module, flag, False)
            _PAUSED[id(module)] = _PAUSED.get(id(module), 0) + 1
    try:
        yield
    finally:
        with _LOCK:
            for module in paused:
                _PAUSED[id(module)] -= 1
                if not _PAUSED[id(module)]:
                    del _PAUSED[id(module)]
                    setattr(module, flag, True)


def _first_position(host: nn.Module) -> int:
    """The first word's, in a table of positions that begins with padding (RoBERTa's)."""
    table = _positions(host)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def bidirectional(host: nn.Module, run: Forward, part: Prompt, args: Args, kwargs: Kwargs) -> Output:
    """An encoder's forward pass on the prompt and the text, one sequence with one mask; all of it is returned.

    Positions of the text move behind the prompt's, and the prompt is of token type 0, as with concatenated
    `inputs_embeds`.
    """
    return run(**_lengthened(host, part, args, kwargs)[0])


def stripped(host: nn.Module, run: Forward, part: Prompt, args: Args, kwargs: Kwargs) -> Output:
    """The same, and the prompt's positions are taken out of every output."""
    longer, length = _lengthened(host, part, args, kwargs)
    return _without(run(**longer), len(part), length)


def unlengthened(host: nn.Module, run: Forward, part: Prompt, args: Args, kwargs: Kwargs) -> Output:
    """The layers alone, between embeddings and pooler: what comes after them sees the text."""
    states = args[0] if args else kwargs["hidden_states"]
    return _without(run(*args, **kwargs), len(part), states.shape[1])


def cross_attended(host: nn.Module, run: Forward, part: Prompt, args: Args, kwargs: Kwargs) -> Output:
    """A decoder behind a lengthened encoder: the mask of what it attends to is the text's, and grows by ones."""
    kwargs = _named(host, args, kwargs)
    mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
    if mask is not None and states is not None and mask.shape[-1] + len(part) == states.shape[1]:
        kwargs["encoder_attention_mask"] = _visible(mask, len(part))
    return run(**kwargs)


def _named(host: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
    parameters = list(inspect.signature(original_class(host).forward).parameters)[1:]
    return {**dict(zip(parameters, args)), **kwargs}


def _lengthened(host: nn.Module, part: Prompt, args: Args, kwargs: Kwargs) -> tuple[Kwargs, int]:
    """Arguments with the prompt in front of every row, and how long the sequence is now."""
    kwargs = _named(host, args, kwargs)
    text, count = kwargs.get("inputs_embeds"), len(part)
    if kwargs.get("input_ids") is not None:
        text = host.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]  # a model of transformers
    assert text is not None
    _check_room(host, count, text.shape[1])
    rows = part.embeddings().to(text.dtype).expand(len(text), -1, -1)
    longer: Kwargs = {"input_ids": None, "inputs_embeds": torch.cat([rows, text], dim=1)}
    if kwargs.get("attention_mask") is not None:
        longer["attention_mask"] = _visible(kwargs["attention_mask"], count)
    if kwargs.get("token_type_ids") is not None:
        longer["token_type_ids"] = F.pad(kwargs["token_type_ids"], (count, 0))
    positions = kwargs.get("position_ids")
    if positions is not None:
        first = torch.arange(count, device=positions.device) + positions.min()
        longer["position_ids"] = torch.cat([first.expand(len(positions), -1), positions + count], dim=1)
    return {**kwargs, **longer}, count + text.shape[1]


def _positions(host: nn.Module) -> nn.Embedding | None:
    """A table of learned positions."""
    names = ("position_embeddings", "wpe")
    table = next((m for n, m in host.named_modules() if n.rpartition(".")[2] in names), None)
    return table if isinstance(table, nn.Embedding) else None


def _check_room(host: nn.Module, count: int, length: int) -> None:
    """Raise ConfigError where a table of positions is too short; the lookup's own error names no length."""
    table = _positions(host)
    if table is not None:
        room = table.num_embeddings - _first_position(host)
        if count + length > room:
            raise ConfigError(
                f"{count} prompt tokens and {length} of the text are more than the {room} positions of "
                f"{original_class(host).__name__}; shorten the text to {room - count}"
            )


def _visible(mask: Tensor, count: int) -> Tensor:
    if mask.dim() != 2:
        raise ConfigError(
            f"a prompt extends attention masks of shape [rows, words], got {tuple(mask.shape)}; give the padding mask"
        )
    return F.pad(mask, (count, 0), value=1)


def _without(output: Output, count: int, length: int) -> Output:
    """Outputs without the prompt's positions: states [B, n, d], and the queries of attentions [B, h, n, m]."""

    def strip(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() in (3, 4):
            return value.narrow(-2, count, length - count) if value.shape[-2] == length else value
        return value

    return tree_map(strip, output)
