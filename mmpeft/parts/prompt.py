"""`Prompt`: learned embeddings in front of a language model's input; under causal attention, its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.hosting.forward import plan_of
from mmpeft.hosting.recompute import recomputing
from mmpeft.hosting.unchanged import Watched
from mmpeft.parts.base import Part
from mmpeft.parts.passing import Passed
from mmpeft.types import AnyModule, Args, Argument, Attribute, Forward, Kwargs, Output, StateDict

Around = Callable[[nn.Module, Forward, "Prompt", Args, Kwargs], Output]
View = Callable[[nn.Module, Attribute, Any], Attribute]
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


Keys = dict[int, tuple[Tensor, Tensor]]


@dataclass
class Pass:
    """What the layers are told of the forward pass under way: keys and values of the prompt by layer.

    While `recording` they put them there; otherwise they take them, `past` words being between the prompt and those
    of the pass. They are `silent` while a prompt in front of this one is recorded.
    """

    kept: Keys = field(default_factory=dict)
    recording: bool = False
    silent: bool = False
    past: int | Tensor = 0


class Prompt(Part):
    """`p` learned embeddings [p, d] before the text of every row.

    Under causal attention they see only each other: their keys and values are the same for every row, so they are
    computed once, by one row, and put in front of the text's own in every layer (`PromptLayer`). Without gradients
    they are kept until a tensor of the model, a mode or the route changes: a step of generation costs no prompt.
    Elsewhere they lengthen the sequence, and what reads it further on is told (`PromptBeside`).
    """

    order = 0
    rowwise = False
    unmergeable = UNMERGEABLE

    def __init__(self, tokens: Tensor | None, encoder: nn.Module | None, run: Around, model: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.tokens = None if tokens is None else nn.Parameter(tokens)
        self.encoder = encoder
        self._model = (model,)  # a tuple: the prompt is registered under the model, not the model under it
        self._reset()

    def _reset(self) -> None:
        self._pass: Passed[Pass] = Passed()
        self._kept: tuple[tuple[object, ...], Watched, Keys] | None = None  # replaced as a whole: threads may share it
        self._graph: Pass | None = None

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_kept": None, "_graph": None}

    def embeddings(self) -> Tensor:
        """[p, d]."""
        if self.tokens is not None:
            return self.tokens
        assert self.encoder is not None
        made: Tensor = self.encoder()
        return made

    def __len__(self) -> int:
        if self.tokens is not None:
            return len(self.tokens)
        assert self.encoder is not None
        embedding: AnyModule = self.encoder.embedding
        return len(embedding)

    def keys(self, host: nn.Module, run: Callable[[], Output]) -> Keys:
        """Keys and values of the prompt in every layer, which `run` computes unless they are kept and still right."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._record(host, run)
        device = next(self.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = (plan_of(host), torch.is_inference_mode_enabled(), autocast)
        last = self._kept
        if last is not None:
            known = all(a is b for a, b in zip(state, last[0]))
            if known and last[1].same() and not last[1].training():
                return last[2]
            self._kept = None
        watched = Watched(self._model[0])
        noted = watched.note() and not watched.training()  # before computing: a change meanwhile is seen
        made = self._record(host, run)
        if noted:
            self._kept = (state, watched, made)
        return made

    def _record(self, host: nn.Module, run: Callable[[], Output]) -> Keys:
        recording = Pass(recording=True)
        before = [(prompt, prompt._pass.set(Pass(silent=True))) for prompt in self.behind(host)]
        before.append((self, self._pass.set(recording)))
        # A block that recomputes would find the recording over. One row of p tokens needs no recomputation.
        try:
            with nullcontext() if torch.compiler.is_compiling() else recomputing(False):  # dynamo sets no context
                run()
        finally:
            for prompt, own in before:
                prompt._pass.set(own)
        return recording.kept

    def behind(self, host: nn.Module) -> list[Prompt]:
        """Other prompts between this one and the text: those whose pass is under way when this one's begins."""
        found: list[Prompt] = []
        for part in plan_of(host).wraps:
            if isinstance(part, Prompt) and part is not self:
                own = part._pass.get()
                if own is not None and not (own.recording or own.silent):
                    found.append(part)
        return found

    def served(self, host: nn.Module, kept: Keys, past: int | Tensor, run: Callable[[], Output]) -> Output:
        """`run` with these keys and values in front of every layer's own."""
        own = Pass(kept, past=past + sum(len(prompt) for prompt in self.behind(host)))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._graph = own  # for blocks that are computed again in the backward pass, when no pass is under way
        before = self._pass.set(own)
        try:
            return run()
        finally:
            self._pass.set(before)

    def under_way(self) -> Pass:
        """The forward pass that a layer is in."""
        own = self._pass.get() or self._graph
        if own is None:
            raise ConfigError(
                "a layer with a prompt ran by itself: the prompt's keys and values are those of a pass of its model"
            )
        return own

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
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

    def around(self, host: nn.Module, run: Forward, *args: Argument, **kwargs: Argument) -> Output:
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

    def record(self, keys: Tensor, values: Tensor) -> None:
        """While recording, keep what the attention computes of the prompt, nothing in front of it."""
        now = self._prompt[0].under_way()
        if now.recording:
            now.kept[self.index] = (keys, values)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend to keys and values [B, h, n, d]; nothing while recording."""
        now = self._prompt[0].under_way()
        if now.recording or now.silent:
            return keys, values
        batch = [tensor.to(keys).expand(len(keys), -1, -1, -1) for tensor in now.kept[self.index]]
        return torch.cat([batch[0], keys], dim=2), torch.cat([batch[1], values], dim=2)

    def visible(self, rows: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which of `rows` words see which prompt tokens [rows, p]: those less than `window` before; None for all."""
        if window is None:
            return None
        (prompt,) = self._prompt
        place = torch.arange(rows, device=device) + prompt.under_way().past + len(prompt)
        seen: Tensor = place[:, None] - torch.arange(len(prompt), device=device) < window
        return seen

    def read(self, host: nn.Module, name: str, base: Attribute) -> Attribute:
        return self.view(host, base, self)
