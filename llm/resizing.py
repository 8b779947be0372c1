"""Tables and heads that are given other rows: refused before anything changes where parts were made for those."""

from __future__ import annotations

from mmpeft.errors import Refused
from mmpeft.hosting.host import GUARDS, base_value
from mmpeft.parts import Delta
from mmpeft.parts.base import Placement
from mmpeft.surgery.state import state_with
from mmpeft.types import AnyModule


def check_resizing(
    model: AnyModule, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: object, **__: object
) -> None:
    """Raise Refused where `resize_token_embeddings` would take tensors away that parts of a tuning go with.

    The table of words stays the module that it is, with other rows. The head is replaced, tied to the table or not.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = len(base_value(table, "weight"))
    size = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    if size == rows:
        return
    state = state_with(model)
    for name, placements in state.placements.items():
        for placement in placements:
            at_head = any(state.hosts[path] is head for path in (placement.home, *(h.path for h in placement.hooks)))
            if at_head or any(state.hosts[path] is table for path in _weighed(placement)):
                where = placement.home or "the model"
                raise Refused(
                    f"resize_token_embeddings({size}) would change {where}, and {name!r} has {placement.key} there, "
                    f"made for {rows} words: resize before attach, or detach() first and attach again"
                )


def _weighed(placement: Placement) -> list[str]:
    """Modules whose weight a part changes, so that its tensors are as many rows; a prompt only runs them."""
    delta = isinstance(placement.part, Delta)
    return [hook.path for hook in placement.hooks if delta or hook.kind in ("read", "call")]


GUARDS["resize_token_embeddings"] = check_resizing
