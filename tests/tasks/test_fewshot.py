"""Few-shot recognition: the papers' formulas, and the task that trains by them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import open_clip
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from open_clip.model import CLIP
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.parts.in_place import InPlace
from mmpeft.vla import backbone
from mmpeft.vla.fewshot.consistency import Consistency, GaussianAverage
from mmpeft.vla.fewshot.heads import ClipAdapter, CoCoOp, LinearHead, TaskRes, TipAdapter
from mmpeft.vla.fewshot.task import FewShot
from tests.tasks.fewshot_pair import CFG, NAMES, Letters, data, fit, ready

pytestmark = pytest.mark.usefixtures("pair")


# -- formulas, against small independent implementations ---------------------------------------------------------


def encode_prompts(model: CLIP, prompts: Tensor, ends: Tensor) -> Tensor:
    """CoOp's text encoder as published: embeddings in, features at the end token out."""
    x = prompts + model.positional_embedding[: prompts.shape[1]]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return F.normalize(x[torch.arange(len(x)), ends] @ model.text_projection, dim=-1)


def test_coop_is_the_published_form(pair: Any) -> None:
    task = ready(method=mmpeft.CoOp(tokens=3))
    (part,) = [p.part for p in task.tuning.placements]
    model = pair()
    tokens = Letters()([f"{name}." for name in NAMES])
    embedded = model.token_embedding(tokens)
    prompts = torch.cat([embedded[:, :1], part.tokens.expand(4, -1, -1), embedded[:, 1:-3]], 1)
    ends = tokens.argmax(1) + 3
    expected = encode_prompts(model, prompts, ends)
    torch.testing.assert_close(task.text_features(torch.zeros(1, 16)), expected, atol=1e-5, rtol=1e-5)


def test_cocoop_moves_the_context_by_the_image(pair: Any) -> None:
    head = CoCoOp(reduction=4)
    task = ready(head, mmpeft.CoOp(tokens=3))
    (part,) = [p.part for p in task.tuning.placements]
    image = F.normalize(torch.randn(2, 16), dim=-1)
    model = pair()
    tokens = Letters()([f"{name}." for name in NAMES])
    embedded, ends = model.token_embedding(tokens), tokens.argmax(1) + 3
    first, _, last = head.meta
    for row, feature in enumerate(image):
        shift = last.weight @ (first.weight @ feature + first.bias).relu() + last.bias
        context = (part.tokens + shift).expand(4, -1, -1)
        expected = encode_prompts(model, torch.cat([embedded[:, :1], context, embedded[:, 1:-3]], 1), ends)
        scores = model.logit_scale.exp() * feature @ expected.t()
        torch.testing.assert_close(task(image)[row], scores, atol=1e-4, rtol=1e-4)


def test_maple_is_the_published_form_behind_the_embeddings_norm(pair: Any) -> None:
    task = ready(method=mmpeft.MaPLe(tokens=2, depth=2))
    model, parts = pair(), [p.part for p in task.tuning.placements]
    texts = [p for p in parts if isinstance(p, InPlace)]
    images = [p for p in parts if not isinstance(p, InPlace)]
    image = torch.randn(2, 3, 32, 32)
    x = model.visual._embeds(image)
    x = torch.cat([x, images[0].proj(texts[0].tokens).expand(2, -1, -1)], 1)
    for depth, block in enumerate(model.visual.transformer.resblocks):
        if depth == 1:
            x = torch.cat([x[:, :-2], images[1].proj(texts[1].tokens).expand(2, -1, -1)], 1)
        x = block(x)
    pooled, _ = model.visual._pool(x[:, :-2])
    expected = F.normalize(pooled @ model.visual.proj, dim=-1)
    torch.testing.assert_close(task.image_features(image), expected, atol=1e-5, rtol=1e-4)

    tokens = Letters()([f"{name}." for name in NAMES])
    embedded = model.token_embedding(tokens)
    x = torch.cat([embedded[:, :1], texts[0].tokens.expand(4, -1, -1), embedded[:, 1:-2]], 1)
    x = x + model.positional_embedding
    for depth, block in enumerate(model.transformer.resblocks):
        if depth == 1:
            x = torch.cat([x[:, :1], texts[1].tokens.expand(4, -1, -1), x[:, 3:]], 1)
        x = block(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(4), tokens.argmax(1) + 2] @ model.text_projection
    torch.testing.assert_close(task.text_features(image), F.normalize(x, dim=-1), atol=1e-5, rtol=1e-4)


def test_tip_adapter_is_the_published_form() -> None:
    head = TipAdapter(alpha=1.5, beta=3.0)
    keys, image, text = (F.normalize(torch.randn(n, 16), dim=-1) for n in (6, 5, 4))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    head.start(text, 2, 0)
    head.remember(keys, labels)
    scores = head(image, text, torch.tensor(100.0))
    for i in range(5):
        for c in range(4):
            cache = sum(float(torch.exp(-3.0 * (1 - image[i] @ k))) for k, lab in zip(keys, labels) if lab == c)
            assert float(scores[i, c]) == pytest.approx(
                100 * float(image[i] @ text[c]) + 1.5 * cache, rel=1e-4, abs=1e-4
            )


def test_tip_adapter_chooses_its_strength_by_validation_images() -> None:
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(8, 16), dim=-1)
    labels = torch.tensor([0, 1] * 4)
    text = F.normalize(torch.randn(2, 16), dim=-1)
    head = TipAdapter()
    head.start(text, 2, 0)
    head.remember(keys, labels)
    before = float((head(keys, text, torch.tensor(20.0)).argmax(1) == labels).float().mean())
    head.tune(keys, text, labels, torch.tensor(20.0))
    assert float((head(keys, text, torch.tensor(20.0)).argmax(1) == labels).float().mean()) >= before
    assert (head.strength <= torch.tensor(TipAdapter.reach)).all()


def test_clip_adapter_and_taskres_are_the_published_forms() -> None:
    image, text = F.normalize(torch.randn(3, 16), dim=-1), F.normalize(torch.randn(4, 16), dim=-1)
    adapter = ClipAdapter(ratio=0.3, reduction=4)
    adapter.start(text, 2, 0)
    moved = (image @ adapter.down.weight.t()).clamp(min=0) @ adapter.up.weight.t()
    mixed = F.normalize(0.3 * moved.clamp(min=0) + 0.7 * image, dim=-1)
    torch.testing.assert_close(adapter(image, text, torch.tensor(50.0)), 50 * mixed @ text.t())
    residual = TaskRes(alpha=0.5)
    residual.start(text, 2, 0)
    assert torch.allclose(residual(image, text, torch.tensor(50.0)), 50 * image @ text.t(), atol=1e-4)
    nn.init.normal_(residual.residual)
    scores = residual(image, text, torch.tensor(50.0))
    torch.testing.assert_close(scores[:, 2:], 50 * image @ text[2:].t(), atol=1e-4, rtol=1e-4)
    known = F.normalize(text[:2] + 0.5 * residual.residual, dim=-1)
    torch.testing.assert_close(scores[:, :2], 50 * image @ known.t(), atol=1e-4, rtol=1e-4)


def test_clip_lora_on_vit_b_16_has_184320_parameters() -> None:
    method = mmpeft.LoRA(at="attn.{q,k,v}", rank=2, alpha=1, rslora=True)
    with torch.device("meta"):
        model = backbone.build(open_clip.get_model_config("ViT-B-16"))
    assert method.count(model, mmpeft.sites.sites(model)) == 184_320
    small = CLIP(**CFG)
    tuning = mmpeft.attach(small, method)
    assert tuning.report().trainable == method.count(small, mmpeft.sites.sites(small))


def test_consistency_is_zero_for_the_frozen_pair_and_not_for_another() -> None:
    task = ready(method=mmpeft.LoRA(at="attn.{q,v}"))
    images = torch.randn(2, 3, 32, 32)

    def terms() -> float:
        image = task.image_features(images)
        text = task.text_features(image, slice(0, 2))
        return float(Consistency()(task, images, image, text, task.head(image, text, task.scale)))

    assert terms() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in task.tuning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert terms() > 1e-2


def test_the_gaussian_average_weighs_epochs() -> None:
    average, module = GaussianAverage(0.5, 0.25), nn.Linear(1, 1, bias=False)

    class Run:
        max_epochs, current_epoch, max_steps, global_step = 4, 0, -1, 0

    weights = torch.exp(-0.5 * (torch.tensor([1.0, 2, 3, 4]) - 2) ** 2)
    for epoch in range(4):
        Run.current_epoch = epoch
        module.weight.data.fill_(float(epoch))
        average.on_train_epoch_end(Run(), module)  # type: ignore[arg-type]
    assert float(module.weight) == pytest.approx(float((weights * torch.arange(4.0)).sum() / weights.sum()))


# -- the task ----------------------------------------------------------------------------------------------------

SETUPS: dict[str, tuple[Any, Any]] = {
    "zero-shot": (None, None),
    "linear": (LinearHead, None),
    "tip": (TipAdapter, None),
    "tip-f": (lambda: TipAdapter(train=True), None),
    "clip-adapter": (ClipAdapter, None),
    "taskres": (TaskRes, None),
    "coop": (None, mmpeft.CoOp(tokens=2)),
    "cocoop": (CoCoOp, mmpeft.CoOp(tokens=2)),
    "maple": (None, mmpeft.MaPLe()),
    "clip-lora": (None, mmpeft.LoRA(at="attn.{q,k,v}", rank=2)),
    "vpt+taskres": (TaskRes, mmpeft.VPT(at="image:tokens", tokens=2)),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_way_trains_what_it_says_and_scores_base_and_new(name: str) -> None:
    head, method = SETUPS[name]
    task, source = FewShot("tiny", method, head and head(), templates=["a {}."], warmup=0.0, views=2), data()
    kept: dict[str, Tensor] = {}

    class Before(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            kept.update({k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad})

    trainer = fit(task, source, 2, [Before()])
    moved = {k: not torch.equal(p, kept[k]) for k, p in task.named_parameters() if p.requires_grad}
    assert all(moved.values()), [k for k, m in moved.items() if not m]
    assert bool(moved) == (name not in ("zero-shot", "tip"))
    (found,) = trainer.test(task, datamodule=source, verbose=False)
    assert set(found) >= {"test/base", "test/new", "test/harmonic"}
    assert (found["test/new"] != found["test/new"]) == (name == "linear")  # not a number where no text is read
    base, new, both = (found[f"test/{key}"] for key in ("base", "new", "harmonic"))
    if name != "linear" and base and new:
        assert both == pytest.approx(2 * base * new / (base + new), rel=1e-5)


@pytest.mark.parametrize("name", ["zero-shot", "linear", "tip-f", "cocoop"])
def test_without_new_classes_base_ones_are_scored_alone(name: str) -> None:
    head, method = SETUPS[name]
    task, source = FewShot("tiny", method, head and head(), templates=["a {}."], views=2), data(base_share=1.0)
    trainer = fit(task, source)
    (found,) = trainer.test(task, datamodule=source, verbose=False)
    assert set(found) == {"test/base"}
    few, other = FewShot("tiny", None, None), data(base_share=0.1)
    with pytest.raises(ConfigError, match="has 1 of 4 classes to learn from"):
        fit(few, other)


def test_kept_features_are_those_of_the_images() -> None:
    task, source = FewShot("tiny", None, ClipAdapter(), templates=["a {}."], views=2), data()
    fit(task, source)
    plain = data()
    plain.configure(32, *backbone.preprocessing(task.model)[1:])
    plain.setup()
    samples = plain.train_dataloader().dataset
    images = torch.stack([samples[0, row][0] for row in range(len(samples))])
    torch.testing.assert_close(task.kept.views[0], task.image_features(images), atol=1e-5, rtol=1e-4)


def test_kept_features_stay_with_their_task(pair: Any) -> None:
    """After any stage the same data train this task on them again, and another task on the images."""
    task, source = FewShot("tiny", None, ClipAdapter(), templates=["a {}."], views=2), data()
    batches: list[Tensor] = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            batches.append(batch[0])

    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir="/nowhere")
    trainer.validate(task, datamodule=source, verbose=False)
    for _ in range(2):
        fit(task, source, 1, [Seen()])
    fit(FewShot("tiny", mmpeft.LoRA(rank=2, at="attn.{q,v}"), templates=["a {}."]), source, 1, [Seen()])
    assert [batch.dim() for batch in batches] == [2, 2, 4]
    assert next(iter(source.train_dataloader()))[0].dim() == 4


def test_a_checkpoint_of_a_keyed_cache_comes_back(tmp_path: Path) -> None:
    first, source = FewShot("tiny", None, TipAdapter(train=True), templates=["{}"], views=1), data()
    fit(first, source, 2)
    again = FewShot("tiny", None, TipAdapter(train=True), templates=["{}"], views=1)
    fit(again, data(), 0)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    image = F.normalize(torch.randn(3, 16), dim=-1)
    assert torch.equal(first(image), again(image))
