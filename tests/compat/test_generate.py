"""`generate` of transformers: the tokens of an untouched copy at a zero update, of the plain merged model at others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mmpeft
from tests.compat.models import EOS, PAD, bend, causal, left_padded, plain, t5, untouched, words
from tests.compat.rows import row

KINDS = ["llama", "gpt2", "qwen2", "gemma2", "mistral", "phi", "phi3", "neox"]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
}


def _generated(model: Any, **options: Any) -> Any:
    inputs = {} if "input_ids" in options else left_padded()
    torch.manual_seed(5)
    found = model.generate(**{**inputs, "max_new_tokens": 6, "do_sample": False, **options})
    return found.sequences if hasattr(found, "sequences") else found


def _check(model: Any, method: Any, **options: Any) -> None:
    before = untouched(model)
    tuning = mmpeft.attach(model, method)
    base = _generated(before, **options)
    assert torch.equal(_generated(model, **options), base)
    bend(tuning, 0.5)
    expected = _generated(plain(tuning, before), **options)
    assert torch.equal(_generated(model, **options), expected)
    if options.get("num_beams", 1) == 1:
        assert not torch.equal(expected, base), "the update changes no token, so that this test would say nothing"
    tuning.merge()
    assert torch.equal(_generated(model, **options), expected)
    tuning.unmerge()
    with mmpeft.use(model, None):
        assert torch.equal(_generated(model, **options), base)


@row("transformers", "`generate` on left-padded prompts of every decoder family")
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_prompts(kind: str) -> None:
    _check(causal(kind), mmpeft.LoRA(rank=2, at="attn.*|mlp.*"))


@row("transformers", "`generate`: beams, sampling with a seed, static cache, no cache, penalties, scores")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_strategies(kind: str, strategy: str) -> None:
    _check(causal(kind), mmpeft.LoRA(rank=2, at="attn.*|mlp.*"), **STRATEGIES[strategy])


@row("transformers", "assisted and prompt-lookup `generate`; the assistant tuned, the model tuned, both")
def test_assisted() -> None:
    model, assistant = causal(), causal(seed=1)
    before, other = untouched(model), untouched(assistant)
    one = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2)), 0.5)
    two = bend(mmpeft.attach(assistant, mmpeft.LoRA(rank=2)), 0.5)
    prompt = {"input_ids": words(1), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    expected = _generated(plain(one, before), **prompt)
    assert torch.equal(_generated(model, **prompt, assistant_model=other), expected)
    assert torch.equal(_generated(model, **prompt, assistant_model=assistant), expected)
    assert torch.equal(_generated(before, **prompt, assistant_model=assistant), _generated(before, **prompt))
    assert torch.equal(_generated(model, **prompt, prompt_lookup_num_tokens=2), expected)
    assert two.name == "default"


@row("transformers", "`generate` of an encoder-decoder, greedy and beams")
@pytest.mark.parametrize("strategy", ["greedy", "beams", "sampling"])
def test_encoder_decoder(strategy: str) -> None:
    method = mmpeft.LoRA(rank=2, at="attn.*|cross.*|mlp.*")
    _check(t5(bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD), method, **STRATEGIES[strategy])


def _head_rows(model: Any, run: Callable[[Any], Any]) -> list[int]:
    seen: list[int] = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    run(model)
    handle.remove()
    return seen


@row("transformers", "the head runs over the last token of the prompt alone (`logits_to_keep`)")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("at", ["attn.q", "attn.q|head"])
def test_the_head_does_not_run_over_the_prompt(kind: str, at: str) -> None:
    model = causal(kind, tie_word_embeddings=False)
    before = untouched(model)
    mmpeft.attach(model, mmpeft.LoRA(rank=2, at=at))
    rows = _head_rows(model, _generated)
    assert rows == _head_rows(before, _generated)
    assert set(rows) == {1}
    kept = _head_rows(model, lambda m: m(words(), logits_to_keep=2))
    assert kept == [2]


@row("transformers", "`prepare_inputs_for_generation` and the argument checks of `generate`")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unknown_arguments_are_refused_as_on_the_base(kind: str) -> None:
    model = causal(kind)
    before = untouched(model)
    mmpeft.attach(model, mmpeft.LoRA(rank=2))
    for one in (before, model):
        with pytest.raises(ValueError, match="no_such_argument"):
            one.generate(**left_padded(), max_new_tokens=2, no_such_argument=1)
        one.generate(**left_padded(), max_new_tokens=2, position_ids=None)


@row(
    "transformers",
    "prompts and prefixes in left-padded batches of every decoder family",
    "the tokens of each row alone",
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi", "neox"])
@pytest.mark.parametrize("method", ["PromptTuning", "PrefixTuning"])
def test_prompts_in_padded_batches(kind: str, method: str) -> None:
    model = causal(kind)
    bend(mmpeft.attach(model, getattr(mmpeft, method)()), 0.5)
    batch = left_padded()
    positions = batch["attention_mask"].cumsum(-1).sub(1).clamp_min(0)  # as `generate` counts them
    together = model(**batch, position_ids=positions).logits
    found = _generated(model)
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][i][mask][None]
        torch.testing.assert_close(together[i][mask][None], model(alone).logits, atol=1e-4, rtol=1e-4)
        new = _generated(model, input_ids=alone, attention_mask=torch.ones_like(alone))[0, alone.shape[1] :]
        assert torch.equal(found[i, mask.numel() :][: len(new)], new)  # a row that ends early is filled up


@row("transformers", "`pipeline('text-generation')` and a streamer on a tuned model")
def test_a_streamer_gets_every_token() -> None:
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2)), 0.5)

    class Keep:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streams = []
    for one in (model, plain(tuning, before)):
        streams.append(Keep())
        one.generate(words(1), max_new_tokens=5, do_sample=False, streamer=streams[-1])
    assert streams[0].tokens == streams[1].tokens
    assert streams[0].tokens[-1] == -1
