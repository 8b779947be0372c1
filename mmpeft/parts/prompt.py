"""`Prompt`: learned embeddings in front of a language model's input; under causal attention, its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.host import plan_of
from mmpeft.parts.base import Part
from mmpeft.recompute import once

Around = Callable[[nn.Module, Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
View = Callable[[nn.Module, Any, Any], Any]
UNMERGEABLE = "learned tokens lengthen the sequence; no base weight can stand for them"


class PromptLSTM(nn.Module):
    """`MLP(BiLSTM(E))`: two layers of size h each way, then `2h → 2h → d` with ReLU (arXiv:2103.10385)."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(count, width))
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self) -> Tensor:
        tokens: Tensor = self.mlp(self.lstm(self.embedding[None])[0][0])
        return tokens


class PromptMLP(nn.Module):
    """`W_3 relu(W_2 relu(W_1 E))`, `d → h → h → d`."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(count, width))
        sizes = ((width, hidden), (hidden, hidden), (hidden, width))
        layers = [module for size in sizes for module in (nn.Linear(*size), nn.ReLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        tokens: Tensor = self.mlp(self.embedding)
        return tokens


class Prompt(Part):
    """`p` learned embeddings [p, d] before the text of every row.

    Under causal attention they see only each other: their keys and values are the same for every row, so they are
    computed once, by one row, and put in front of the text's own in every layer (`PromptLayer`). Without gradients
    they are kept until a tensor or the route changes: a step of generation costs no prompt. Elsewhere they lengthen
    the sequence, and what reads it further on is told (`PromptBeside`).
    """

    order = 0
    rowwise = False
    unmergeable = UNMERGEABLE

    def __init__(self, tokens: Tensor | None, encoder: nn.Module | None, run: Around) -> None:
        super().__init__()
        self.run = run
        self.tokens = None if tokens is None else nn.Parameter(tokens)
        self.encoder = encoder
        self._reset()

    def _reset(self) -> None:
        self.recording = False
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._key: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recording": False, "kept": [], "_key": None}

    def embeddings(self) -> Tensor:
        """[p, d]."""
        if self.tokens is not None:
            return self.tokens
        assert self.encoder is not None
        made: Tensor = self.encoder()
        return made

    def __len__(self) -> int:
        source: Any = self.tokens if self.tokens is not None else self.encoder.embedding  # type: ignore[union-attr]
        return len(source)

    def record(self, host: nn.Module, run: Callable[[], Any]) -> None:
        """Have every layer keep its keys and values of the prompt while `run` computes them."""
        key = None
        if not torch.is_grad_enabled():
            watched = [p._version for p in host.parameters() if p.requires_grad]
            key = (id(plan_of(host)), host.training, torch.is_inference_mode_enabled(), watched)
            if self.kept and key == self._key:
                return
        self.kept, self.recording = [], True
        try:
            with once():  # a block that recomputes would find the recording over; one row of p tokens needs none
                run()
        finally:
            self.recording = False
        self._key = key

    def around(self, host: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(host, run, self, args, kwargs)


class PromptBeside(Part):
    """A further module that must know that a `Prompt` has lengthened the sequence; owns nothing."""

    order = 0
    rowwise = False
    unmergeable = UNMERGEABLE

    def __init__(self, prompt: Prompt, run: Around) -> None:
        super().__init__()
        self._prompt = (prompt,)  # a tuple: the prompt stays registered under the model itself
        self.run = run

    def around(self, host: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(host, run, self._prompt[0], args, kwargs)


class PromptLayer(Part):
    """One layer's keys and values of a `Prompt`; owns nothing."""

    order = 0
    rowwise = False
    unmergeable = UNMERGEABLE

    def __init__(self, prompt: Prompt, index: int, view: View) -> None:
        super().__init__()
        self._prompt = (prompt,)  # a tuple: the prompt stays registered under the model itself
        self.index, self.view = index, view

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend to keys and values [B, h, n, d]; while recording, keep them instead."""
        (prompt,) = self._prompt
        if prompt.recording:
            prompt.kept.append((keys, values))
            return keys, values
        own = prompt.kept[self.index]
        batch = [tensor.to(keys.dtype).expand(len(keys), -1, -1, -1) for tensor in own]
        return torch.cat([batch[0], keys], dim=2), torch.cat([batch[1], values], dim=2)

    def read(self, host: nn.Module, name: str, base: Any) -> Any:
        return self.view(host, base, self)
