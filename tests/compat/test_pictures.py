"""Vision-language models answer about a picture with a tuning as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmpeft
from tests.compat.models import bend, close, plain, untouched
from tests.compat.pictures import PICTURED, pictured
from tests.compat.rows import row


def _tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=3, do_sample=False)


@row("transformers", f"`generate` and `forward` with a picture: {', '.join(PICTURED)}")
@pytest.mark.parametrize("name", PICTURED)
def test_a_picture_is_answered(name: str) -> None:
    model, inputs = pictured(name)
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.{q,v}"))
    assert torch.equal(_tokens(model, inputs), _tokens(before, inputs))
    bend(tuning, 2.0)
    expected = plain(tuning, before)
    assert torch.equal(_tokens(model, inputs), _tokens(expected, inputs))
    if name in ("janus", "vision_encoder_decoder"):  # forward has arguments of its own there
        return
    with torch.no_grad():
        got, right, base = (one(**inputs).logits for one in (model, expected, before))
    close(got, right, 1e-4)
    assert not torch.allclose(got, base, atol=1e-4)
