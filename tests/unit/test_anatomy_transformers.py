"""What the anatomy says of transformers' models is checked by running them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn

import mmpeft
from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.methods.recipe import own_weight
from mmpeft.sites import ROLES, Site, sites
from tests.matrix.example import Example
from tests.matrix.families.transformers import FAMILIES, GQA, LM, T5, _build, _text

SEQ2SEQ = "input_ids attention_mask decoder_input_ids"
VARIANTS: dict[str, Callable[[], Example]] = {
    "qwen2": partial(_build, hf.Qwen2ForCausalLM, hf.Qwen2Config, _text, **GQA),
    "qwen3": partial(_build, hf.Qwen3ForCausalLM, hf.Qwen3Config, _text, **GQA),
    "mistral": partial(_build, hf.MistralForCausalLM, hf.MistralConfig, _text, **GQA),
    "gemma": partial(_build, hf.GemmaForCausalLM, hf.GemmaConfig, _text, **GQA),
    "gemma3": partial(_build, hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _text, **GQA),
    "olmo2": partial(_build, hf.Olmo2ForCausalLM, hf.Olmo2Config, _text, **GQA),
    "llama_classifier": partial(_build, hf.LlamaForSequenceClassification, hf.LlamaConfig, _text, **GQA),
    "neox_parallel": partial(_build, hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _text, use_parallel_residual=True, **LM),
    "roberta": partial(_build, hf.RobertaForSequenceClassification, hf.RobertaConfig, _text, **LM),
    "t5_relu": partial(_build, hf.T5ForConditionalGeneration, hf.T5Config, SEQ2SEQ, feed_forward_proj="relu", **T5),
}
ALL = {**FAMILIES, **VARIANTS}
families = pytest.mark.parametrize("family", ALL)


def _linears(model: nn.Module) -> list[Site]:
    return [s for s in sites(model) if s.kind in ("linear", "conv", "embedding")]


@families
def test_every_projection_is_a_site_of_a_known_role(family: str) -> None:
    model = ALL[family]().model
    found = sites(model)
    assert {s.role for s in found} <= set(ROLES)
    covered = {s.path for s in _linears(model)}
    projections = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) or hasattr(m, "nf")}
    assert projections <= covered
    for path, own in Counter(s.path for s in _linears(model) if s.rows).items():
        slices = [s for s in _linears(model) if s.path == path]
        assert own == len(slices)
        weight = own_weight(model, slices[0])
        marks = torch.zeros(len(weight))
        for site in slices:
            marks += put_rows(torch.zeros_like(marks), torch.ones_like(take_rows(marks, site.rows)), site.rows)
        assert torch.equal(marks, torch.ones_like(marks)), f"rows of {path} are not shared out once each"


@families
def test_every_row_of_every_projection_is_read(family: str) -> None:
    """Changing the rows a site owns changes the answer: no site is dead, none is another's."""
    example = ALL[family]()
    before = example.answer()
    skipped = ("logit_scale",)
    for site in _linears(example.model):
        weight = own_weight(example.model, site)
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(put_rows(saved, -take_rows(saved, site.rows), site.rows))
            after = example.answer()
            weight.copy_(saved)
        assert site.path in skipped or not torch.equal(after, before), f"{site} is dead"
    assert torch.equal(example.answer(), before)


@families
def test_keys_have_the_heads_of_the_cache(family: str) -> None:
    """Sizes of `kv` sites are what the attention function gets."""
    example = ALL[family]()
    seen: list[tuple[int, int]] = []
    tuning = mmpeft.attach(example.model, mmpeft.PTuningV2(tokens=2))
    for placement in tuning.placements:
        part = placement.part

        def extend(keys, values, part=part, real=part.extend):
            seen.append((keys.shape[1], keys.shape[3]))
            assert (part.heads, part.width) == seen[-1]
            return real(keys, values)

        part.extend = extend
    example()
    assert len(seen) == len(tuning.placements)


@families
def test_sublayers_add_to_the_stream(family: str) -> None:
    """`stream` reads the block's stream, `out` is what is added to it: their widths and calls agree."""
    example = ALL[family]()
    model = example.model
    calls: dict[str, tuple[int, ...]] = {}

    def record(path: str, output: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, *result: object) -> None:
            value = (result[0][0] if isinstance(result[0], tuple) else result[0]) if output else None
            value = value if output else (args[0] if args else next(iter(kwargs.values())))
            calls[f"{path}:{'out' if output else 'in'}"] = tuple(value.shape)

        return hook

    sub = [s for s in sites(model) if s.role in ("attn", "cross", "mlp")]
    for site in sub:
        model.get_submodule(site.stream).register_forward_pre_hook(record(site.stream, False), with_kwargs=True)
        out = site.out or site.path
        model.get_submodule(out).register_forward_hook(record(out, True), with_kwargs=True)
    example()
    for site in sub:
        stream, out = calls[f"{site.stream}:in"], calls[f"{site.out or site.path}:out"]
        assert stream[-1] == out[-1] == site.width, site
        assert stream[:2] == out[:2], site
