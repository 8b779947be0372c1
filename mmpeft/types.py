"""Names for what may be anything, each with its reason: where a signature needs `Any`, they say what is meant.

What is only passed on or printed is `object`; these are for values that are called, indexed or asked for attributes
that no type of ours can promise. Given one of them, mypy takes the first variant of an overloaded function (`get`,
`getattr`, `Counter`), as it would not for a plain `Any`: the type of the result is written down there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch._ops import OpOverload

Argument: TypeAlias = Any
"""One of the arguments handed on to a function that is not ours."""
Args: TypeAlias = tuple[Any, ...]
"""All positional ones."""
Kwargs: TypeAlias = dict[str, Any]
"""All named ones, or options collected for a call: their types are those of the function called."""

Forward: TypeAlias = Callable[..., Any]
"""The forward of a module, or what runs in its place: its arguments and its output are the model's own."""
AnyFunc: TypeAlias = Callable[..., Any]
"""A function whose signature is only known where it is called."""
TorchOp: TypeAlias = "OpOverload[..., Any]"
"""One of torch's operators, as a dispatch mode sees it."""
AnyModule: TypeAlias = Any
"""A module, or its class, that is asked for what its own class has: of `nn.Module` every attribute is a tensor or a
module."""

Attribute: TypeAlias = Any
"""The value of a module's attribute that parts may answer for: a tensor, or whatever its class keeps there."""

Batch: TypeAlias = Any
"""What a model or a task takes: of whatever form its data give it."""
Output: TypeAlias = Any
"""What a model or a step of a task returns."""

Sample: TypeAlias = Any
"""What a data set gives for one of its rows."""
Transform: TypeAlias = Callable[[Any], Any]
"""What is done to a sample or a picture before it goes into a batch."""

Config: TypeAlias = Any
"""The configuration of a library's model: which settings there are depends on the model."""
Untyped: TypeAlias = Any
"""An object of a library that has no types."""
Ctx: TypeAlias = Any
"""The context of a `torch.autograd.Function`, which its own passes give attributes."""
Leaf: TypeAlias = Any
"""A value inside arguments, outputs or files of any form, known by looking at it."""

Json: TypeAlias = dict[str, Any]
"""An object of JSON or YAML: whoever takes a value out of it knows the key."""
Fields: TypeAlias = dict[str, Any]
"""What belongs together of an example, a batch or a prediction, by name: tensors, words and numbers."""
Facts: TypeAlias = Mapping[str, Any]
"""A mapping of either kind, read only."""
StateDict: TypeAlias = dict[str, Any]
"""A state as torch, Lightning or pickle save it."""
