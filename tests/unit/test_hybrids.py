"""Gates and the methods built of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.methods.spec import from_spec, to_spec
from mmpeft.parts import Delta, LowRank
from mmpeft.parts.gate import Gate, GatedKeys, GatedOutput, GatedPart
from mmpeft.parts.prefix import Prefix
from tests.matrix.families import FAMILIES
from tests.matrix.families.transformers import TOKENS, WORDS
from tests.support.moved import attach_moved

SMALL = {"rank": 2, "tokens": 3, "hidden": 16, "bottleneck": 8}
PARTS = (mmpeft.LoRA(rank=2, at="mlp.*"), mmpeft.PrefixTuning(tokens=3, hidden=16), mmpeft.Pfeiffer(bottleneck=8))
FAMILY = ["bert", "llama", "t5", "gpt2"]


stirred = partial(attach_moved, by=0.3)


@pytest.mark.parametrize("family", FAMILY)
def test_a_closed_gate_is_the_plain_model_and_an_open_one_the_part(family: str) -> None:
    example = FAMILIES[family]()
    plain = example.answer()
    stirred(example.model, mmpeft.gate(*PARTS, kind="constant", start=0.0))
    assert torch.equal(example.answer(), plain)
    opened, alone = FAMILIES[family](), FAMILIES[family]()
    torch.manual_seed(0)
    stirred(opened.model, mmpeft.gate(*PARTS, kind="constant", start=1.0))
    torch.manual_seed(0)
    stirred(alone.model, PARTS[0] + PARTS[1] + PARTS[2])
    assert not torch.allclose(opened.answer(), plain, atol=1e-2)
    torch.testing.assert_close(opened.answer(), alone.answer(), atol=1e-5, rtol=1e-4)


def gate(kind: str, width: int = 8, dtype: torch.dtype = torch.float64) -> Gate:
    made = Gate(kind, width, 0.3, torch.device("cpu"), dtype)
    for p in made.parameters():
        nn.init.normal_(p)
    return made.eval()


def test_the_kinds_of_gates() -> None:
    x = torch.randn(2, 5, 8).double()
    assert gate("constant")(x) == 0.3
    by_token = gate("token")
    expected = torch.sigmoid(x @ by_token.linear.weight.T + by_token.linear.bias)
    torch.testing.assert_close(by_token(x), expected)
    pooled = gate("pooled")
    pooled.load_state_dict(by_token.state_dict())
    torch.testing.assert_close(pooled(x), expected.mean(1, keepdim=True))
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(pooled(x, seen)[0], expected[0, :3].mean(0, keepdim=True))
    with pytest.raises(ConfigError, match="unknown gate"):
        mmpeft.gate(mmpeft.LoRA(), kind="tokens")  # type: ignore[arg-type]


def test_lora_behind_a_gate_by_the_token() -> None:
    host = nn.Linear(8, 6).double()
    part = Delta(host.weight, LowRank(6, 8, 2, host.weight), 0.25)
    nn.init.normal_(part.factor.B)
    g, x = gate("token"), torch.randn(2, 5, 8).double()
    y = GatedOutput(part, g).exit(host, x, host(x))
    torch.testing.assert_close(y, host(x) + g(x) * 0.25 * x @ (part.factor.B @ part.factor.A).T)


def test_the_gate_of_a_prefix_turns_its_share_of_the_attention() -> None:
    q, k, v = (torch.randn(2, 3, 5, 4).double() for _ in range(3))
    prefix = Prefix(2, 3, 4, torch.zeros(1).double(), lambda *_: None)
    part = GatedKeys(prefix, gate("pooled"))
    longer = part.extend(k, v)
    plain, full = (F.scaled_dot_product_attention(q, *kv).transpose(1, 2) for kv in ((k, v), longer))
    x = part.enter(nn.Identity(), torch.randn(2, 5, 8).double())
    found = part.interpolate(plain, full)
    share = (q @ longer[0].transpose(-2, -1) / 2).softmax(-1)[..., :2].sum(-1, keepdim=True).transpose(1, 2)
    own = F.scaled_dot_product_attention(q, longer[0][:, :, :2], longer[1][:, :, :2]).transpose(1, 2)
    g = part.gate(x).unsqueeze(-1)
    torch.testing.assert_close(found, (1 - g * share) * plain + g * share * own)


def test_unipelt_is_its_three_methods_each_with_its_gates() -> None:
    example = FAMILIES["bert"]()
    tuning = mmpeft.attach(example.model, mmpeft.UniPELT(**SMALL))
    parts = [p.part for p in tuning.placements if isinstance(p.part, GatedPart)]
    kinds = [(type(part.inner).__name__, part.gate.kind) for part in parts]
    assert set(kinds) == {("Delta", "token"), ("Prefix", "pooled"), ("Branch", "pooled")}
    assert all(part.gate.linear.weight.numel() == 32 for part in parts)
    with pytest.raises(Refused, match="a weight has none"):
        tuning.merge()


@pytest.mark.parametrize("recompute", [None, "block"])
def test_padding_opens_no_gate(recompute: str | None) -> None:
    example = FAMILIES["bert"]()
    tuning = stirred(example.model, mmpeft.UniPELT(**SMALL), by=1.0)
    tuning.recompute = recompute
    words = torch.randint(3, WORDS, (2, TOKENS))
    mask = torch.tensor([[1] * TOKENS, [1] * (TOKENS - 2) + [0, 0]])
    padded = example.model(words, attention_mask=mask).logits[1:]
    alone = example.model(words[1:, : TOKENS - 2]).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    tensors = list(tuning.parameters())
    first, second = (torch.autograd.grad(y.square().sum(), tensors) for y in (padded, alone))
    for one, other in zip(first, second):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_no_gate_tells_earlier_words_of_later_ones() -> None:
    example = FAMILIES["llama"]()
    tuning = stirred(example.model, mmpeft.UniPELT(**SMALL))
    assert {p.part.gate.kind for p in tuning.placements} == {"token"}
    words = torch.randint(3, WORDS, (2, TOKENS))
    other = words.clone()
    other[:, -1] = (other[:, -1] + 1) % WORDS
    with torch.no_grad():
        first, second = (example.model(w).logits[:, :-1] for w in (words, other))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(words)}
    cached = example.model.generate(words, use_cache=True, **options)
    assert torch.equal(cached, example.model.generate(words, use_cache=False, **options))
    placed = stirred(FAMILIES["t5"]().model, mmpeft.gate(PARTS[2], kind="pooled")).placements
    kinds = {(p.home.split(".")[0], p.part.gate.kind) for p in placed if isinstance(p.part, GatedPart)}
    assert kinds == {("encoder", "pooled"), ("decoder", "token")}


def test_levels_are_logged_by_kind() -> None:
    example = FAMILIES["bert"]()
    tuning = mmpeft.attach(example.model, mmpeft.UniPELT(**SMALL))
    example.model.train()
    tuning.controllers.fit_start(2)
    for _ in range(2):
        tuning.controllers.before_forward()
        example()
        tuning.controllers.after_step()
    values = tuning.controllers.values()
    assert set(values) == {"gate_lora", "gate_prefixtuning", "gate_pfeiffer"}
    assert all(isinstance(value, Tensor) and 0.3 < value < 0.7 for value in values.values())
    assert {float(p.part.gate.seen) for p in tuning.placements if isinstance(p.part, GatedPart)} == {1.0}


@pytest.mark.parametrize("method", [mmpeft.UniPELT(**SMALL), mmpeft.MAM(tokens=3, hidden=16, bottleneck=8)])
def test_baking_keeps_the_answer_and_the_name(method: mmpeft.methods.Method, tmp_path) -> None:
    example = FAMILIES["bert"]()
    tuning = stirred(example.model, method)
    before = example.answer()
    tuning.for_inference()
    assert torch.equal(example.answer(), before)
    assert type(tuning.method) is type(method)
    assert not any("outer" in name for name, _ in tuning.named_parameters())
    tuning.save(tmp_path)
    other = FAMILIES["bert"]()
    mmpeft.load(other.model, tmp_path)
    assert torch.equal(other.answer(), before)


def test_gates_as_plain_data_and_what_they_refuse() -> None:
    method = mmpeft.gate(mmpeft.LoRA(rank=2), mmpeft.Houlsby(), kind="pooled")
    assert from_spec(to_spec(method)) == method
    assert from_spec(to_spec(mmpeft.gate(PARTS[0]).where("depth>=1"))) == mmpeft.gate(PARTS[0]).where("depth>=1")
    with pytest.raises(Refused, match="updates of weights, adapters and prefixes"):
        mmpeft.attach(FAMILIES["bert"]().model, mmpeft.gate(mmpeft.LLaMAAdapter()))
    with pytest.raises(Refused, match="sees words"):
        mmpeft.attach(FAMILIES["bert"]().model, mmpeft.gate(mmpeft.LoRA(at="embed")))
    with pytest.raises(ConfigError, match="one method that works on sites"):
        mmpeft.gate(mmpeft.BitFit())
