"""attach, use, merge and detach on a small backbone: what users meet first."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError, Refused, SiteError
from mmpeft.parts import Branch, Hook, Placement
from tests.unit.toy import Layer, Toy

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))


class _OnHead(mmpeft.Method):
    """Puts a part under the head itself."""

    def place(self, model, available):
        return [Placement(Branch(3, 1, model.head[0].weight, source="output"), "head", "x", (Hook("head", "exit"),))]

    def count(self, model, available):
        return 0


def _moved(tuning: mmpeft.Tuning, by: float) -> mmpeft.Tuning:
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(by)
    return tuning


def test_the_object_stays_and_so_does_its_type() -> None:
    model = Toy()
    linear, keys = model.blocks[0].q, list(model.state_dict())
    mmpeft.attach(model, mmpeft.LoRA(at="attn.q"))
    assert model.blocks[0].q is linear
    assert isinstance(linear, nn.Linear)
    assert type(linear).__name__ == "Linear"
    assert [k for k in model.state_dict() if "mmpeft" not in k] == keys
    assert isinstance(model, Toy)


def test_two_tunings_on_one_model_are_independent() -> None:
    model = Toy()
    plain = model(X)
    a = _moved(mmpeft.attach(model, mmpeft.LoRA(at="attn.q"), name="a"), 0.3)
    with_a = model(X)
    b = _moved(mmpeft.attach(model, mmpeft.Full(), name="b"), 0.1)
    with_b = model(X)
    assert not torch.equal(with_a, with_b)
    with mmpeft.use(model, "a"):
        assert torch.equal(model(X), with_a)
        with mmpeft.use(model, None):
            assert torch.equal(model(X), plain)
    assert torch.equal(model(X), with_b)
    assert all(p.requires_grad for t in (a, b) for p in t.parameters()), "switching must not freeze the others"
    with mmpeft.use(model, ["a", "b", "a", None]):
        mixed = model(X)
    for row, expected in enumerate((with_a, with_b, with_a, plain)):
        torch.testing.assert_close(mixed[row], expected[row])
    a.detach()
    assert torch.equal(model(X), with_b)
    b.detach()
    assert torch.equal(model(X), plain)
    assert type(model) is Toy


def test_mixed_batches_train_their_own_rows_only() -> None:
    model = Toy()
    a = _moved(mmpeft.attach(model, mmpeft.LoRA(at="attn.q"), name="a"), 0.3)
    b = _moved(mmpeft.attach(model, mmpeft.DoRA(at="mlp.*"), name="b"), 0.2)
    with mmpeft.use(model, ["a", "b", "b", None]):
        together = torch.autograd.grad(model(X).square().sum(), [*a.parameters(), *b.parameters()])
    with a.use():
        of_a = torch.autograd.grad(model(X[:1]).square().sum(), list(a.parameters()))
    with b.use():
        of_b = torch.autograd.grad(model(X[1:3]).square().sum(), list(b.parameters()))
    for mixed, alone in zip(together, (*of_a, *of_b)):
        torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-4)


def test_a_wrong_number_of_names_is_an_error() -> None:
    model = Toy()
    mmpeft.attach(model, mmpeft.LoRA(at="attn.q"), name="a")
    with mmpeft.use(model, ["a", None]), pytest.raises(ConfigError, match="2 rows, but the batch has 3"):
        model(X[:3])
    with pytest.raises(ConfigError, match="no tuning named 'c'"):
        mmpeft.use(model, "c")
    with pytest.raises(ConfigError, match="empty list"):
        mmpeft.use(model, [])


def test_merges_stack_and_come_off_in_reverse() -> None:
    model = Toy()
    bits = {n: p.clone() for n, p in model.named_parameters()}
    a = _moved(mmpeft.attach(model, mmpeft.LoRA(at="attn.q"), name="a"), 0.3)
    tuned = model(X)
    a.merge()
    torch.testing.assert_close(model(X), tuned)
    with pytest.raises(ConfigError, match="merged already"):
        a.merge()
    with pytest.raises(ConfigError, match="unmerge"):
        a.detach()
    with pytest.raises(ConfigError, match="unmerge it before attaching"):
        mmpeft.attach(model, mmpeft.BitFit(), name="late")
    a.unmerge()
    b = mmpeft.attach(model, mmpeft.BitFit(), name="b")
    a.merge()
    b.merge()
    with pytest.raises(ConfigError, match="unmerge 'b' first"):
        a.unmerge()
    b.unmerge()
    a.unmerge()
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters() if n in bits)


def test_bf16_merge_is_the_rounded_fp32_merge_and_restores_every_bit() -> None:
    model = Toy().bfloat16()
    bits = {n: p.clone() for n, p in model.named_parameters()}
    tuning = _moved(mmpeft.attach(model, mmpeft.LoRA(at="attn.q")), 0.3)
    part = tuning.placements[0].part
    expected = (bits["blocks.0.q.weight"].float() + part.factor.materialise() * part.scale).bfloat16()
    tuning.merge()
    assert torch.equal(model.blocks[0].q.weight, expected)
    tuning.unmerge()
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters() if n in bits)


def test_bitfit_creates_the_bias_a_linear_lacks_and_folds_it() -> None:
    model = Toy()
    assert model.blocks[0].up.bias is None
    tuning = _moved(mmpeft.attach(model, mmpeft.BitFit(at="mlp.up")), 0.5)
    assert sum(p.numel() for p in tuning.parameters()) == 2 * 16
    y = model(X)
    tuning.merge()
    assert model.blocks[0].up.bias is not None
    torch.testing.assert_close(model(X), y)
    tuning.unmerge()
    tuning.detach()
    assert model.blocks[0].up.bias is None


def test_requires_grad_comes_back() -> None:
    model = Toy()
    model.head.requires_grad_(False)
    tuning = mmpeft.attach(model, mmpeft.LinearProbe())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.mmpeft.default.linearprobe_weight.value",
        "head.mmpeft.default.linearprobe_bias.value",
    ]
    tuning.detach()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"head.weight", "head.bias"}


def test_patterns_set_ranks_and_scales() -> None:
    model = Toy()
    method = mmpeft.LoRA(
        at="attn.q|mlp.*", rank=4, alpha=8, rank_pattern={"mlp.* & depth>=-1": 2}, alpha_pattern={"attn.q": 1}
    )
    tuning = mmpeft.attach(model, method)
    found = {(p.role, p.home): (len(p.part.factor.A), p.part.scale) for p in tuning.placements}
    assert found["attn.q", "blocks.0.q"] == (4, 0.25)
    assert found["mlp.up", "blocks.0.up"] == (4, 2.0)
    assert found["mlp.up", "blocks.1.up"] == (2, 4.0)
    assert mmpeft.attach(Toy(), mmpeft.LoRA(at="attn.q", rank=4, alpha=8, rslora=True)).placements[0].part.scale == 4.0
    with pytest.raises(ConfigError, match="names none"):
        mmpeft.attach(Toy(), mmpeft.LoRA(at="attn.q", rank_pattern={"mlp.up": 2}))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: mmpeft.attach(Toy(), "lora"), ConfigError, "expects a method"),
        (lambda: mmpeft.attach(Toy(), mmpeft.LoRA(at="attn.q"), name="keys"), ConfigError, "identifier"),
        (lambda: mmpeft.attach(Toy(), mmpeft.LoRA(at="attn.q"), name="a b"), ConfigError, "identifier"),
        (
            lambda: mmpeft.attach(Toy(), mmpeft.LoRA(at="block")),
            Refused,
            "linear or conv or embedding or experts sites.*kind 'module'",
        ),
        (lambda: mmpeft.attach(Toy(), mmpeft.PTuningV2()), SiteError, "roles here: .*attn.q ×2"),
        (lambda: mmpeft.attach(Toy(), mmpeft.LoRA(at="mlp.gate")), SiteError, "'mlp.gate'"),
        (lambda: mmpeft.attach(Toy(), mmpeft.LastBlocks(blocks=3)), ConfigError, "has 2 blocks"),
        (lambda: mmpeft.attach(Toy(), mmpeft.Full() + mmpeft.BitFit()), ConfigError, "trained by both Full and BitFit"),
        (lambda: mmpeft.LoRA(rank=0), ConfigError, "rank must be positive"),
        (lambda: mmpeft.LoRA(dropout=1.0), ConfigError, r"dropout must be in \[0, 1\)"),
        (lambda: mmpeft.Houlsby(activation="gelo"), ConfigError, "Did you mean 'gelu'"),
        (lambda: mmpeft.Union([]), ConfigError, "at least one"),
        (lambda: mmpeft.LoraX, AttributeError, "Did you mean 'LoRA'"),
    ],
)
def test_bad_requests(build, error, message) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_shift_on_a_norm_without_a_bias_is_not_merged_silently() -> None:
    model = Toy()
    for block in model.blocks:
        block.norm = nn.RMSNorm(8)
    tuning = _moved(mmpeft.attach(model, mmpeft.SSF(at="norm")), 0.1)
    y = model(X)
    with pytest.raises(Refused, match="RMSNorm reads no bias"):
        tuning.merge()
    assert torch.equal(model(X), y)


def test_containers_host_nothing() -> None:
    model = Toy()
    model.head = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(Refused, match="Sequential and cannot host"):
        mmpeft.attach(model, _OnHead())
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_twice() -> None:
    model = Toy()
    mmpeft.attach(model, mmpeft.LoRA(at="attn.q"))
    with pytest.raises(ConfigError, match="attached already"):
        mmpeft.attach(model, mmpeft.LoRA(at="attn.q"))


def test_a_failed_load_state_dict_changes_nothing() -> None:
    tuning = mmpeft.attach(Toy(), mmpeft.LoRA(at="attn.q"))
    good = {n: t + 1 for n, t in tuning.state_dict().items()}
    before = {n: t.clone() for n, t in tuning.state_dict().items()}
    names = list(good)
    for bad, message in (
        ({n: good[n] for n in names[1:]}, "1 missing"),
        (good | {"x": good[names[0]]}, "1 unknown"),
        (good | {names[-1]: torch.zeros(1)}, "expected shape"),
        (good | {names[-1]: good[names[-1]] * float("inf")}, "NaN or infinity"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            tuning.load_state_dict(bad)
    assert all(torch.equal(t, before[n]) for n, t in tuning.state_dict().items())


def test_copies_and_pickles_of_a_part_of_the_model() -> None:
    model = Toy()
    _moved(mmpeft.attach(model, mmpeft.LoRA(at="attn.q")), 0.2)
    block = model.blocks[0]
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(twin, Layer)
        assert torch.equal(twin(X), block(X))


def test_liveness_reports_a_dead_site_and_leaves_no_trace() -> None:
    class Dead(Layer):
        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    model = Toy()
    model.blocks[1].__class__ = Dead
    tuning = mmpeft.attach(model, mmpeft.LoRA(at="attn.q"))
    before = {n: t.clone() for n, t in tuning.state_dict().items()}
    found = tuning.liveness(X)
    assert len(found.dead) == 2
    assert all("blocks.1.q" in name for name in found.dead)
    assert "2 dead of 4" in str(found)
    with pytest.raises(SiteError, match=r"2 of 4 trainable tensors get no gradient"):
        found.check()
    assert all(torch.equal(t, before[n]) for n, t in tuning.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_acts_on_the_update_alone() -> None:
    model = Toy().train()
    tuning = mmpeft.attach(model, mmpeft.LoRA(at="attn.q", dropout=0.5))
    assert torch.equal(model(X), Toy()(X)), "with B = 0 the base path must not feel dropout"
    _moved(tuning, 0.5)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))


def test_report_counts() -> None:
    tuning = mmpeft.attach(Toy(), mmpeft.LoRA(rank=2, at="attn.q"))
    found = tuning.report()
    assert (found.trainable, found.total) == (2 * 2 * 16, sum(p.numel() for p in Toy().parameters()))
    assert "attn.q" in str(found)
