"""The shape types of the functional core are enforced at run time, and refuse what does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from mmpeft.functional import low_rank, pointwise


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)
    return jaxtyped(function, typechecker=beartype)


r = torch.randn
GOOD_AND_BAD = [
    (low_rank.low_rank_apply, (r(3, 4), r(2, 4), r(5, 2), 1.0), (r(3, 4), r(2, 4), r(5, 3), 1.0)),
    (low_rank.low_rank_delta, (r(2, 4), r(5, 2), 1.0), (r(2, 4), r(5, 3), 1.0)),
    (low_rank.squared_row_norms, (r(5, 4),), (r(5),)),
    (low_rank.low_rank_row_norms, (r(5, 4), r(5), r(2, 4), r(5, 2), 1.0), (r(5, 4), r(4), r(2, 4), r(5, 2), 1.0)),
    (
        pointwise.bottleneck,
        (r(3, 4), r(2, 4), r(2), r(4, 2), r(4), torch.relu),
        (r(3, 4), r(2, 4), r(3), r(4, 2), r(4), torch.relu),
    ),
    (pointwise.insert_tokens, (r(2, 5, 4), r(3, 4), 1), (r(2, 5, 4), r(3, 5), 1)),
    (pointwise.strip_tokens, (r(2, 8, 4), 3, 1), (r(2, 8), 3, 1)),
]


@pytest.mark.parametrize(("function", "good", "bad"), GOOD_AND_BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_shapes(function: Callable[..., Any], good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    checked = _checked(function)
    checked(*good)
    with pytest.raises(TypeCheckError):
        checked(*bad)
