"""Example inputs of transformers models are accepted by small models of many kinds, and reach every tower."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.llm.inputs import example_inputs
from tests.zoo.hf import build, types

KINDS = [
    "bamba", "bert", "clip", "detr", "dinov2", "gemma3", "idefics3", "llama", "llava", "mamba", "mixtral", "patchtst",
    "qwen2_5_vl", "sam", "segformer", "siglip2", "t5", "vjepa2", "wav2vec2", "whisper",
]  # fmt: skip


def _run(model: nn.Module) -> set[str]:
    """The modules with weights of their own that a pass over the example inputs runs."""
    ran: set[str] = set()
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda m, args, out, path=path: ran.add(path))
    found = example_inputs(model)
    assert found is not None
    args, kwargs = found
    with torch.no_grad():
        answer = model(*args, **kwargs)
    assert any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(dict(answer)))
    return ran


@pytest.mark.parametrize("model_type", KINDS)
def test_a_small_model_takes_its_example(model_type: str) -> None:
    model = build(model_type)
    ran = _run(model)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears & ran) >= 0.75 * len(linears), f"did not run: {sorted(linears - ran)}"


def test_every_tower_runs_where_pictures_stand_in_the_text() -> None:
    ran = _run(build("llava"))
    for tower in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(tower in path for path in ran), tower


def test_rows_and_placeholders_of_a_picture() -> None:
    model = build("qwen2_5_vl")
    found = example_inputs(model)
    assert found is not None
    ids = found[1]["input_ids"]
    counts = (ids == model.config.image_token_id).sum(1)
    assert len(ids) == 2
    assert counts[0] == counts[1] > 0


def test_inputs_are_the_same_each_time() -> None:
    model = build("whisper")
    one, other = example_inputs(model), example_inputs(model)
    assert one is not None
    assert other is not None
    for name, value in one[1].items():
        assert value is other[1][name] or torch.equal(value, other[1][name]), name


def test_precision_of_the_weights() -> None:
    model = build("llava").to(torch.bfloat16)
    found = example_inputs(model)
    assert found is not None
    assert found[1]["pixel_values"].dtype == torch.bfloat16
    with torch.no_grad():
        assert model(**found[1]).logits.dtype == torch.bfloat16


def test_other_models_have_no_example() -> None:
    assert example_inputs(nn.Linear(2, 2)) is None


def test_small_models_are_deterministic_and_small() -> None:
    one, other = build("mixtral").state_dict(), build("mixtral").state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert sum(value.numel() for value in one.values()) < 1_000_000


def test_the_zoo_holds_what_the_automatic_classes_create() -> None:
    assert {"llama", "bert", "clip", "t5", "mamba", "detr"} <= set(types())
    assert len(types()) > 500


def test_importing_does_not_load_transformers() -> None:
    code = "import sys, mmpeft.llm.inputs; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
