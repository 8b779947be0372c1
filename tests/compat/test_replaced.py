"""Tables resized and modules replaced after attach: carried over, or refused; never an update dropped silently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import MMPEFTError, Refused
from tests.compat.models import WORDS, bend, causal, close, images, plain, t5, untouched, vit, words
from tests.compat.rows import row

RIGHT = "the updates of the old rows carried over, or refused with the order to use"


def _refused_or(run: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The answer, or None where it was refused by the suite with a reason."""
    try:
        with torch.no_grad():
            return run()
    except MMPEFTError as error:
        assert len(str(error)) > 20  # noqa: PT017
        return None


@row(
    "transformers",
    "`resize_token_embeddings` after `attach`, tied or not, larger, smaller; tables tuned or not",
    RIGHT,
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [WORDS + 7, WORDS - 8])
@pytest.mark.parametrize("at", ["attn.q", "embed", "head", "embed|head|attn.q"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resized_tables(tied: bool, size: int, at: str, kind: str) -> None:
    model = causal(kind, tie_word_embeddings=tied)
    before = untouched(model)
    try:
        tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=at))
    except MMPEFTError:
        pytest.skip("refused on this model as it is")
    bend(tuning)
    text = words() % (WORDS - 8)

    expected = plain(tuning, untie(before)) if at != "attn.q" else plain(tuning, before)

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        model.resize_token_embeddings(size, mean_resizing=False)
        return model(text).logits

    got = _refused_or(run)
    if got is None:
        return
    assert got.shape[-1] == size
    kept = min(size, WORDS)
    with torch.no_grad():
        right = expected(text).logits
    close(got[..., :kept], right[..., :kept], 1e-4)
    saved = {n: t.shape for n, t in tuning.state_dict().items()}
    assert saved
    with torch.no_grad(), mmpeft.use(model, None):
        close(model(text).logits[..., :kept], before(text).logits[..., :kept], 1e-4)


def untie(model: Any) -> Any:
    """A copy whose head has a weight of its own, so that an update of one does not reach the other."""
    copied = copy.deepcopy(model)
    copied.lm_head.weight = nn.Parameter(copied.lm_head.weight.detach().clone())
    return copied


@row(
    "transformers",
    "`resize_token_embeddings` where the head or the table is tuned",
    "refused before anything changes; works for the number of words that there are, and beside a prompt",
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "method", [mmpeft.LinearProbe(), mmpeft.LoRA(rank=2, at="head"), mmpeft.LoRA(rank=2, at="embed"), mmpeft.Full()]
)
def test_resizing_is_refused_before_it_begins(tied: bool, method: mmpeft.methods.Method) -> None:
    model = causal(tie_word_embeddings=tied)
    tuning = bend(mmpeft.attach(model, method))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    with torch.no_grad():
        expected = model(words()).logits
    for given in ({"new_num_tokens": WORDS + 7}, {"new_num_tokens": WORDS, "pad_to_multiple_of": 1000}):
        with pytest.raises(Refused, match="resize before attach, or detach"):
            model.resize_token_embeddings(**given)
    model.resize_token_embeddings()
    model.resize_token_embeddings(WORDS, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == WORDS
    assert all(dict(model.named_modules())[path] is module for path, module in modules.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(words()).logits, expected)
    tuning.detach()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(WORDS + 7, mean_resizing=False)
    assert model(words()).logits.shape[-1] == WORDS + 7


def test_a_prompt_does_not_mind_another_table() -> None:
    model = causal()
    tuning = bend(mmpeft.attach(model, mmpeft.PromptTuning(tokens=3)))
    with torch.no_grad():
        expected = model(words()).logits
        model.resize_token_embeddings(WORDS + 7, mean_resizing=False)
        close(model(words()).logits[..., :WORDS], expected, 1e-4)
    assert all(p.shape[-2] == 3 for p in tuning.parameters())


@row("transformers", "`resize_token_embeddings`, then training, saving, merging and detaching", RIGHT)
@pytest.mark.parametrize("at", ["attn.q", "embed", "head"])
def test_life_after_resizing(at: str, tmp_path: Path) -> None:
    model = causal(tie_word_embeddings=False)
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=at)))
    size = WORDS + 5
    text = words().clone()
    text[:, -1] = WORDS + 2
    try:
        torch.manual_seed(1)
        model.resize_token_embeddings(size, mean_resizing=False)
        loss = model(text, labels=text).loss
        loss.backward()
        assert all(p.grad is not None for p in tuning.parameters())
        got = model(text).logits
        tuning.save(tmp_path / "adapter")
    except MMPEFTError:
        return
    torch.manual_seed(1)
    before.resize_token_embeddings(size, mean_resizing=False)
    for name, parameter in before.named_parameters():
        own = dict(model.named_parameters())[name]
        with torch.no_grad():
            parameter.copy_(own)
    fresh = untouched(before)
    mmpeft.load(fresh, tmp_path / "adapter")
    close(fresh(text).logits, got, 1e-4)
    tuning.merge()
    close(model(text).logits, got, 1e-4)
    tuning.unmerge()
    tuning.detach()
    close(model(text).logits, before(text).logits, 1e-4)


@row("transformers", "an encoder-decoder's shared table resized after `attach`", RIGHT)
def test_a_shared_table() -> None:
    model = t5()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.{q,v}")))
    expected = plain(tuning, before)
    given = {"input_ids": words(), "decoder_input_ids": words(tokens=3)}

    def run() -> torch.Tensor:
        model.resize_token_embeddings(WORDS + 4, mean_resizing=False)
        return model(**given).logits

    got = _refused_or(run)
    if got is not None:
        close(got[..., :WORDS], expected(**given).logits, 1e-4)


def _new_head(model: Any) -> None:
    torch.manual_seed(9)
    model.head = nn.Linear(48, 7)


def _reset(model: Any) -> None:
    torch.manual_seed(9)
    model.reset_classifier(7)


def _new_block(model: Any) -> None:
    from timm.models.vision_transformer import Block

    torch.manual_seed(9)
    model.blocks[1] = Block(48, 3, qkv_bias=True).eval()


def _fewer_blocks(model: Any) -> None:
    del model.blocks[-1]


def _more_blocks(model: Any) -> None:
    from timm.models.vision_transformer import Block

    torch.manual_seed(9)
    model.blocks.append(Block(48, 3, qkv_bias=True).eval())


def _sliced(model: Any) -> None:
    model.blocks = model.blocks[:1]


def _new_layer(model: Any) -> None:
    torch.manual_seed(9)
    model.blocks[0].mlp.fc1 = nn.Linear(48, 192)


def _no_layer(model: Any) -> None:
    model.blocks[0].mlp = nn.Identity()


def _swapped(model: Any) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def _new_weight(model: Any) -> None:
    torch.manual_seed(9)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(0.1 * torch.randn(192, 48))


def _new_data(model: Any) -> None:
    torch.manual_seed(9)
    model.blocks[0].mlp.fc1.weight.data = 0.1 * torch.randn(192, 48)


CHANGES = {
    "new head": _new_head,
    "reset_classifier": _reset,
    "new block": _new_block,
    "one block fewer": _fewer_blocks,
    "one block more": _more_blocks,
    "blocks sliced": _sliced,
    "new layer": _new_layer,
    "layer taken out": _no_layer,
    "blocks swapped": _swapped,
    "new weight": _new_weight,
    "new data": _new_data,
}
TUNED = {"attn.*|mlp.*|head": "everything", "attn.q": "queries", "head": "the head alone"}


def _touches(change: str, at: str) -> bool:
    """Whether what is replaced is tuned."""
    if at == "head":
        return change in ("new head", "reset_classifier")
    if at == "attn.q":
        return change in ("new block", "one block fewer", "blocks sliced", "blocks swapped")
    return change != "one block more"


@row(
    "timm",
    "after `attach`: `model.head = ...`, `reset_classifier`; a block replaced, deleted, added, swapped;"
    " a layer replaced or taken out; a weight replaced",
    "exact for what is not tuned, for blocks deleted, added and swapped and for weights; a tuned module's own "
    "replacement is refused: before `attach`, or after `detach`",
)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", TUNED, ids=TUNED.values())
def test_modules_replaced(change: str, at: str) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=at)))
    carried = plain(tuning, before)
    moved = change not in ("new weight", "new data")

    def run() -> torch.Tensor:
        CHANGES[change](model)
        return model(images())

    got = _refused_or(run)
    if got is None:
        assert _touches(change, at), "nothing tuned is replaced: there is nothing to refuse"
        return
    CHANGES[change](before)
    if not moved:
        carried = plain(tuning, before)
    elif change in ("one block fewer", "blocks sliced", "blocks swapped", "one block more") or not _touches(change, at):
        CHANGES[change](carried)
    else:
        carried = _put_on_the_new(tuning, before)
    close(got, carried(images()), 1e-4)
    with torch.no_grad(), mmpeft.use(model, None):
        close(model(images()), before(images()), 1e-4)


def _put_on_the_new(tuning: Any, changed: Any) -> Any:
    """The changed model with the updates on its new modules: what carrying over means."""
    try:
        return plain(tuning, changed)
    except (AttributeError, RuntimeError):
        return pytest.fail("the update has no place on the new module: it was dropped without a word")


@row(
    "timm",
    "a head that trains (`LinearProbe`) and is then replaced",
    "the new head is refused: before `attach`, or after `detach`",
)
@pytest.mark.parametrize("change", ["new head", "reset_classifier"])
def test_a_probe_whose_head_is_replaced(change: str) -> None:
    model = vit()
    tuning = mmpeft.attach(model, mmpeft.LinearProbe())
    try:
        CHANGES[change](model)
        loss = model(images()).square().mean()
    except MMPEFTError:
        return
    loss.backward()
    assert all(p.grad is not None for p in tuning.parameters()), "what is said to train is no longer in the model"
    assert sum(p.numel() for p in tuning.parameters()) == 7 * 49


@row(
    "timm",
    "detach, save and merge after a tuned module was replaced",
    "the replacement is refused; so are `save` and `merge` once a tuned block is gone; `detach` gives the plain model",
)
@pytest.mark.parametrize("change", ["new head", "new layer", "one block fewer", "new block"])
@pytest.mark.parametrize("act", ["detach", "save", "merge"])
def test_life_after_replacement(change: str, act: str, tmp_path: Path) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*|mlp.*|head")))
    try:
        CHANGES[change](model)
        getattr(tuning, act)(*([tmp_path / "a"] if act == "save" else []))
    except MMPEFTError:
        return
    CHANGES[change](before)
    with torch.no_grad():
        if act == "detach":
            close(model(images()), before(images()))
            assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
        elif act == "merge":
            merged = model(images())
            tuning.unmerge()
            close(model(images()), merged, 1e-4)
        else:
            got = model(images())
            mmpeft.load(before, tmp_path / "a")
            close(before(images()), got, 1e-4)
