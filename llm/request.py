"""What is asked of example inputs: the model, its arguments, and the parts of its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 2
TOKENS = 12


class Request:
    """One model with its forward's arguments."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        self.model = model
        self.config: Any = model.config
        named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.names = list(named)
        self.required = {n for n, p in named.items() if p.default is Parameter.empty}
        self.main: str = getattr(model, "main_input_name", "input_ids")
        self.kind: str = self.config.model_type
        self._generator = torch.Generator().manual_seed(0)

    def configs(self) -> Iterator[Any]:
        """The config and all those below it, the nearest first."""
        level = [self.config]
        while level:
            yield from level
            level = [v for c in level for v in vars(c).values() if hasattr(v, "model_type") and hasattr(v, "to_dict")]

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that some config has, the nearest config first."""
        for config in self.configs():
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def part(self, *keys: str) -> Any:
        """The nearest sub-config whose name has one of these words, or the config."""
        level = [("", self.config)]
        while level:
            for name, config in level:
                if any(key in name for key in keys):
                    return config
            level = [
                (n, v)
                for _, c in level
                for n, v in vars(c).items()
                if hasattr(v, "model_type") and hasattr(v, "to_dict")
            ]
        return self.config

    def noise(self, *shape: int) -> Tensor:
        """Values as of a normalised picture or sound."""
        return torch.randn(*shape, generator=self._generator)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator)


def first(value: Any) -> int:
    """A size that some configs write as a list."""
    return int(value[0]) if isinstance(value, list | tuple) else int(value)
