"""What is asked of example inputs: the model, its arguments, and the parts of its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.types import AnyFunc, Config, Leaf

ROWS = 2
TOKENS = 12
MODALITIES = ("image", "video", "audio")


class Request:
    """One model with its forward's arguments."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Config = model.config
        self.config, self.kind = config, str(config.model_type)
        named = _named(model.forward)
        self.names = list(named)
        self.main: str = getattr(model, "main_input_name", "input_ids")
        self.required = {n for n, p in named.items() if p.default is Parameter.empty}
        for modality in ("image", "audio"):  # what a tower cannot do without is optional in the whole
            if run := self.tower(modality):
                self.required |= {n for n, p in _named(run).items() if p.default is Parameter.empty and n in named}
        self._generator = torch.Generator().manual_seed(0)

    def tower(self, modality: str) -> AnyFunc | None:
        """The method that gives the features of a modality."""
        holders = (self.model, getattr(self.model, "base_model", None), getattr(self.model, "model", None))
        found = [f for h in holders if (f := getattr(h, f"get_{modality}_features", None)) is not None]
        return next((f for f in reversed(found) if _named(f)), None)  # a wrapper passes on what it does not name

    def lacks(self, *words: str) -> bool:
        """Whether the config names a part of these kinds and has none."""
        named = {n: v for n, v in vars(self.config).items() if n in {f"{w}_config" for w in words}}
        return bool(named) and all(v is None for v in named.values())

    def configs(self) -> Iterator[Config]:
        """The config and all those below it, the nearest first."""
        return (config for _, config in self._named_configs())

    def _named_configs(self) -> Iterator[tuple[str, Config]]:
        level = [("", self.config)]
        while level:
            yield from level
            level = [(n, v) for _, c in level for n, v in vars(c).items() if hasattr(v, "to_diff_dict")]

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that some config has, the nearest config first."""
        for config in self.configs():
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def part(self, *words: str) -> Config:
        """The nearest sub-config in whose name one of these words stands, or the config."""
        return next((c for n, c in self._named_configs() if any(word in n for word in words)), self.config)

    def noise(self, *shape: int) -> Tensor:
        """Values as of a normalised picture or sound."""
        return torch.randn(*shape, generator=self._generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator)


def _named(function: AnyFunc) -> dict[str, Parameter]:
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def first(value: Leaf) -> int:
    """A size that some configs write as a list."""
    return int(value[0]) if isinstance(value, list | tuple) else int(value)
