"""What a module returns: a tensor, or several of which the first is the one that matters."""

from __future__ import annotations

from mmpeft.types import Output


def first_of(output: Output) -> Output:
    """The first of several, or what is alone."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Output, first: Output) -> Output:
    """An output of the same kind with another first element; a tensor alone is the first."""
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: first})
    return type(output)([first, *output[1:]]) if isinstance(output, tuple | list) else first
