"""A route for each row: each row as if it were alone, or refused; nothing of the batch is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.sites import Site, anatomy, qualified_name
from mmpeft.surgery.state import state_of
from tests.support.moved import attach_moved
from tests.unit.toy import Layer, Toy

WIDTH, WORDS = 8, 30
LM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "pad_token_id": 0,
}


def moved(model: nn.Module, method: mmpeft.Method, *names: str) -> dict[str, mmpeft.Tuning]:
    """Tunings of one method, far from their start and from one another."""
    return {name: attach_moved(model, method, name, by=0.3, seed=seed) for seed, name in enumerate(names)}


class Stacked(nn.Module):
    """Streams side by side in dimension 0, [streams, B, n, d], as Gemma 3n has them."""

    def __init__(self, streams: int = 2) -> None:
        super().__init__()
        self.streams, self.blocks = streams, nn.Sequential(Layer(WIDTH), Layer(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(torch.stack([x * (i + 1) for i in range(self.streams)])).sum(0)


class Windows(nn.Module):
    """Windows of all images side by side, [windows, B, n, d] flattened: the rows of an image are not consecutive."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Layer(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, n, d = x.shape
        windows = x.view(batch, 2, n // 2, d).transpose(0, 1).reshape(2 * batch, n // 2, d)
        return self.blocks(windows).view(2, batch, n // 2, d).transpose(0, 1).reshape(batch, n, d)


class Normalised(nn.Module):
    """Centred over the batch, which ties the rows together; and it counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Layer(WIDTH))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return self.blocks(x - x.mean(0))


@anatomy(qualified_name(Stacked), qualified_name(Windows), qualified_name(Normalised))
def blocks(model: nn.Module) -> list[Site]:
    found = []
    for i in range(len(model.blocks)):
        found += [Site(f"blocks.{i}.q", "attn.q", i, kind="linear"), Site(f"blocks.{i}", "block", i, width=WIDTH)]
    return found


@pytest.mark.parametrize("build", [Toy, Stacked, lambda: Stacked(4), Windows])
def test_each_row_is_as_it_is_alone(build: Callable[[], nn.Module]) -> None:
    """Dimension 0 of what a tuned module sees may be as long as the batch and mean something else."""
    torch.manual_seed(0)
    model = build().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(4, 6, WIDTH)
    moved(model, mmpeft.LoRA(rank=2, at="attn.q"), "a", "b")
    route = ["a", None, "b", "a"]
    with torch.no_grad(), mmpeft.use(model, route):
        mixed = model(x)
    for row, name in enumerate(route):
        with torch.no_grad(), mmpeft.use(model, name):
            alone = model(x[row : row + 1]) if name else plain(x[row : row + 1])
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [Toy, Stacked])
def test_the_gradients_are_those_of_each_row(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(4, 6, WIDTH)
    tunings = moved(model, mmpeft.LoRA(rank=2, at="attn.q"), "a", "b")
    route, own = ["a", "b", "b", None], [p for t in tunings.values() for p in t.parameters()]
    with mmpeft.use(model, route):
        mixed = torch.autograd.grad(model(x).square().sum(), own)
    alone = [torch.zeros_like(p) for p in own]
    for row, name in enumerate(route[:3]):
        with mmpeft.use(model, name):
            found = torch.autograd.grad(model(x[row : row + 1]).square().sum(), own, materialize_grads=True)
        alone = [a + g for a, g in zip(alone, found)]
    for ours, theirs in zip(mixed, alone):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_proof_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = Normalised().train()
    moved(model, mmpeft.LoRA(rank=2, at="attn.q"), "a")
    x, before, state = torch.randn(4, 5, WIDTH), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(Refused, match="do not stay apart"), mmpeft.use(model, ["a", None, "a", None]):
        model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=32, patch_size=16),
        text_config=hf.LlamaConfig(**LM),
        image_token_index=WORDS - 1,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def seen(pictures: tuple[int, int]) -> dict[str, Tensor]:
    """Two texts with so many pictures each, of four tokens a picture."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS - 1, (2, 12), generator=generator)
    for row, count in enumerate(pictures):
        ids[row, 1 : 1 + 4 * count] = WORDS - 1
    values = torch.randn(sum(pictures), 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values}


@pytest.mark.parametrize("pictures", [(2, 0), (1, 1), (0, 2), (2, 2)])
def test_pictures_are_not_rows(pictures: tuple[int, int]) -> None:
    """A language tower's rows are the text's, however many pictures each has; an image tower's rows are refused."""
    model, batch = llava(), seen(pictures)
    moved(model, mmpeft.LoRA(rank=2, at=lambda s: "language_model" in s.path and s.role == "attn.q"), "a", "b")
    answers = {}
    for name in "ab":
        with torch.no_grad(), mmpeft.use(model, name):
            answers[name] = model(**batch).logits
    with torch.no_grad(), mmpeft.use(model, ["a", "b"]):
        mixed = model(**batch).logits
    for row, name in enumerate("ab"):
        torch.testing.assert_close(mixed[row], answers[name][row], atol=1e-5, rtol=1e-5)
    for tuning in mmpeft.tunings(model).values():
        tuning.detach()
    for method in (
        mmpeft.LoRA(rank=2, at=lambda s: "vision_tower" in s.path and s.role == "attn.q"),
        mmpeft.PromptTuning(tokens=2),
    ):
        try:
            moved(model, method, "a", "b")
        except mmpeft.errors.MMPEFTError:
            continue  # a method that this model does not take at all
        with pytest.raises((Refused, ConfigError)), mmpeft.use(model, ["a", "b"]):
            model(**batch)
        for tuning in mmpeft.tunings(model).values():
            tuning.detach()


@pytest.mark.parametrize("method", [mmpeft.PromptTuning(tokens=3), mmpeft.PrefixTuning(tokens=3), mmpeft.BitFit()])
def test_the_models_own_loss_is_the_mean_over_rows(method: mmpeft.Method) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LM)).eval()
    tunings = moved(model, method, "a", "b")
    own = [p for t in tunings.values() for p in t.parameters()]
    ids = torch.randint(1, WORDS, (4, 7))
    route = ["a", "b", "b", "a"]
    with mmpeft.use(model, route):
        loss = model(ids, labels=ids).loss
    mixed = torch.autograd.grad(loss, own)
    losses = []
    for row, name in enumerate(route):
        with mmpeft.use(model, name):
            losses.append(model(ids[row : row + 1], labels=ids[row : row + 1]).loss)
    alone = torch.stack(losses).mean()
    torch.testing.assert_close(loss, alone)
    for ours, theirs in zip(mixed, torch.autograd.grad(alone, own)):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [mmpeft.LoRA(rank=2), mmpeft.PrefixTuning(tokens=2)])
def test_logits_of_every_picture_with_every_text(method: mmpeft.Method) -> None:
    from tests.matrix.families.transformers import FAMILIES

    example = FAMILIES["hf_clip"]()
    model = example.model
    moved(model, method, "a", "b")
    with torch.no_grad(), mmpeft.use(model, ["a", "b", "a", "b"]):
        mixed = model(**example.batch)
    with torch.no_grad(), mmpeft.use(model, "a"):
        alone = model(**example.batch)
    torch.testing.assert_close(mixed.image_embeds[::2], alone.image_embeds[::2], atol=1e-5, rtol=1e-5)
    if isinstance(method, mmpeft.PrefixTuning):
        assert mixed.logits_per_image is None


def test_a_batch_of_another_size_is_refused() -> None:
    model = Toy()
    moved(model, mmpeft.LoRA(rank=2, at="attn.q"), "a")
    with pytest.raises(ConfigError, match="for 3 rows, but the batch has 4"), mmpeft.use(model, ["a", None, "a"]):
        model(torch.randn(4, 5, WIDTH))
    assert not state_of(model).proofs


KINDS = {
    "ranks": [mmpeft.LoRA(rank=r, at="attn.q|mlp.*") for r in (1, 3, 2)],
    "places": [mmpeft.LoRA(rank=2, at=at) for at in ("attn.q", "mlp.*", "attn.q|mlp.up")],
    "gains": [
        mmpeft.DoRA(rank=2, at="attn.q|mlp.*"),
        mmpeft.LoRA(rank=2, at="attn.q"),
        mmpeft.DoRA(rank=1, at="mlp.up"),
    ],
    "factors": [
        mmpeft.AdaLoRA(rank=2, target=1, at="attn.q"),
        mmpeft.LoHa(rank=2, at="attn.q"),
        mmpeft.DyLoRA(rank=2, at="attn.q"),
    ],
    "parts": [mmpeft.LoRA(rank=2, at="attn.q|mlp.*"), mmpeft.ParallelAdapter(at="block", bottleneck=2)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_many_tunings_in_one_batch(kind: str, grad: bool) -> None:
    """Whatever their ranks and sites, each row has its own, and every pattern is served."""
    torch.manual_seed(0)
    model, generator = Toy().eval(), torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, WIDTH, generator=generator)
    tunings = [moved(model, method, f"n{i}")[f"n{i}"] for i, method in enumerate(KINDS[kind])]
    names: list[str | None] = [None, *(tuning.name for tuning in tunings)]
    alone: dict[str | None, Tensor] = {}
    with torch.set_grad_enabled(grad):
        for change in range(3):
            for name in names:
                with mmpeft.use(model, name):
                    alone[name] = model(x).detach()
            for step in range(3):
                route = [names[(i * (step + 1) + step) % len(names)] for i in range(6)]
                with mmpeft.use(model, route):
                    mixed = model(x)
                for row, name in enumerate(route):
                    torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-5, rtol=1e-5)
            with torch.no_grad():  # kept factors are those of the present weights, however they were written
                for tuning in tunings:
                    for parameter in tuning.parameters():
                        parameter.data.mul_(0.5) if change else parameter.mul_(0.5)


def test_another_pattern_costs_no_new_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    model = Toy().eval()
    x = torch.randn(4, 5, WIDTH)
    moved(model, mmpeft.LoRA(rank=2, at="attn.q|mlp.*"), "a", "b", "c")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    routes = [["a", "b", "c", None], ["c", "c", "a", "b"], [None, "b", "b", "b"]]
    graphs = []
    with torch.no_grad():
        with mmpeft.use(model, routes[0]):
            model(x)  # rows are proven to stay apart before they are compiled
        for route in routes:
            with mmpeft.use(model, route):
                mixed, eager = compiled(x), model(x)
            graphs.append(counter.frame_count)
            torch.testing.assert_close(mixed, eager, atol=1e-5, rtol=1e-5)
    assert graphs == [1, 1, 1]


def test_dropout_of_some_rows() -> None:
    torch.manual_seed(0)
    model = Toy().train()
    x = torch.randn(4, 5, WIDTH)
    moved(model, mmpeft.LoRA(rank=2, at="attn.q", dropout=0.5), "a")
    moved(model, mmpeft.LoRA(rank=2, at="attn.q"), "b")
    answers = []
    for _ in range(2):
        with mmpeft.use(model, ["a", "b", None, "b"]):
            answers.append(model(x))
    assert not torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1:], answers[1][1:])
