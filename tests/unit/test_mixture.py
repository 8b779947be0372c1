"""Prefixes composed for each row: by hand, row by row, what trains, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmpeft
from mmpeft.bank.router import soft_weights
from mmpeft.errors import ConfigError, Refused
from mmpeft.surgery.mixture import Mixture
from mmpeft.vision.continual.methods.coda_prompt import dependence, orthonormal
from tests.matrix.example import BATCH, Example
from tests.matrix.families import FAMILIES

P, SIZES = 2, {"old": 3, "new": 4}
NAMES = tuple(SIZES)


def tuned(family: str) -> tuple[Example, list[Tensor]]:
    """Two tunings of several components each, and weights [L, B, M] for them."""
    example = FAMILIES[family]()
    for name, components in SIZES.items():
        mmpeft.attach(example.model, mmpeft.PTuningV2(tokens=components * P), name)
    layers = len(mmpeft.tunings(example.model)["old"].placements)
    return example, [torch.randn(layers, BATCH, m) for m in SIZES.values()]


def answer(example: Example, route: object) -> Tensor:
    with mmpeft.use(example.model, route):  # type: ignore[arg-type]
        return example.answer()


@pytest.mark.parametrize("family", ["vit", "swin", "open_clip", "llama"])
@torch.no_grad()
def test_each_row_has_its_own_prefix(family: str) -> None:
    """A batch in one pass, each row alone in a mixed batch, and a tuning that holds the row's sum agree."""
    example, weights = tuned(family)
    own = {name: mmpeft.tunings(example.model)[name].placements for name in NAMES}
    composed = answer(example, Mixture(NAMES, tuple(weights)))
    apart = [Mixture(NAMES, tuple(w[:, b : b + 1] for w in weights)) for b in range(BATCH)]
    torch.testing.assert_close(answer(example, apart), composed, atol=1e-5, rtol=1e-4)
    single = mmpeft.attach(example.model, mmpeft.PTuningV2(tokens=P), "single")
    for b in range(BATCH):
        for layer, placed in enumerate(single.placements):
            terms = [
                weight[layer, b, m] * own[name][layer].part.tokens[:, m * P : (m + 1) * P]  # type: ignore[index]
                for name, weight in zip(NAMES, weights)
                for m in range(SIZES[name])
            ]
            placed.part.tokens.copy_(sum(terms))  # type: ignore[operator, union-attr]
        torch.testing.assert_close(answer(example, "single")[b], composed[b], atol=1e-5, rtol=1e-4)
    mixed = answer(example, [apart[0], None, "old", apart[3]])
    torch.testing.assert_close(mixed[[0, 3]], composed[[0, 3]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], answer(example, None)[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[2], answer(example, "old")[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [None, "block"])
def test_weights_and_components_train_and_frozen_ones_do_not_move(recompute: str | None) -> None:
    example, weights = tuned("vit")
    old, new = (mmpeft.tunings(example.model)[name] for name in NAMES)
    old.recompute = recompute  # type: ignore[assignment]
    for parameter in old.parameters():
        parameter.requires_grad_(False)
    before = [p.clone() for p in old.parameters()]
    leaves = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW([*leaves, *new.parameters()], lr=0.1, weight_decay=0.5)
    with mmpeft.use(example.model, Mixture(NAMES, tuple(leaves))):
        loss = example().square().mean()
    loss.backward()  # the route is another one by now
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*leaves, *new.parameters()])
    optimizer.step()
    assert all(map(torch.equal, before, old.parameters()))


def test_soft_weights_are_cosines_of_each_row_alone() -> None:
    query, focus, keys = torch.randn(5, 7), torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = F.cosine_similarity((query[:, None] * focus[:, None]), keys[:, None], dim=-1)
    found = soft_weights(query, focus, keys)
    assert found.shape == (2, 5, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft_weights(query[3:4], focus, keys)[:, 0], found[:, 3])
    with pytest.raises(ConfigError, match=r"\[\.\.\., M, 7\]"):
        soft_weights(query, focus[..., :5], keys)


def test_new_components_start_orthonormal_and_dependence_is_zero_there() -> None:
    old = orthonormal(torch.rand(2, 3, 10), torch.empty(2, 0, 10))
    assert float(dependence(old)) < 1e-12
    new = orthonormal(torch.rand(2, 4, 10), old)
    assert float(dependence(torch.cat([old, new], dim=1))) < 1e-12
    moved = old + torch.rand(2, 3, 10)  # after training: no longer orthonormal, still left out
    assert (orthonormal(torch.rand(2, 4, 10), moved) @ moved.mT).abs().max() < 1e-5
    assert float(dependence(2 * old)) == pytest.approx(2 * 3 * 9 / 9)
    full = orthonormal(torch.rand(2, 9, 10), old)  # no room for all of them
    torch.testing.assert_close(full.norm(dim=-1), torch.ones(2, 9))


def test_what_cannot_be_mixed() -> None:
    example, weights = tuned("vit")
    model = example.model
    with pytest.raises(ConfigError, match=r"\[L, B, M\] or \[B, M\] for each"):
        Mixture(NAMES)
    with pytest.raises(ConfigError, match="for the 3 layers of 'old'"):
        mmpeft.use(model, Mixture(NAMES, tuple(w[:1] for w in weights)))
    with pytest.raises(ConfigError, match="not all of one length"):
        mmpeft.use(model, Mixture(NAMES, tuple(w[..., :2] for w in weights)))
    with pytest.raises(ConfigError, match="weights for 3 rows, but the batch has 4"):
        answer(example, Mixture(NAMES, tuple(w[:, :3] for w in weights)))
    mmpeft.attach(model, mmpeft.LoRA(at="attn.q"), "lora")
    with pytest.raises(Refused, match="learned keys and values"):
        mmpeft.use(model, Mixture(("old", "lora"), tuple(weights)))
    mmpeft.attach(model, mmpeft.PTuningV2(at="kv & depth=0"), "low")
    with pytest.raises(Refused, match="other sites"):
        mmpeft.use(model, Mixture(("old", "low"), tuple(weights)))
