"""Few-shot recognition: the papers' formulas, splits, base and new classes, caches, WiSE-FT, exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning
import open_clip
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor, nn

import mmpeft
from mmpeft.combine.interpolate import interpolate
from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.methods import Frozen
from mmpeft.parts.in_place import InPlace
from mmpeft.training.image_data import ImageData, Pairs
from mmpeft.vla import backbone
from mmpeft.vla.data.few_shot import FewShotData
from mmpeft.vla.export import save_classifier, save_pair
from mmpeft.vla.fewshot.consistency import Consistency, GaussianAverage
from mmpeft.vla.fewshot.heads import ClipAdapter, CoCoOp, Head, LinearHead, TaskRes, TipAdapter
from mmpeft.vla.fewshot.task import FewShot
from mmpeft.vla.fewshot.texts import with_room
from mmpeft.vla.fewshot.wise import WiseCurve
from tests.matrix.example import enliven

WORDS = 200
NAMES = ["cat", "dog", "red car", "tree"]
CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 20, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 3},
}


class Letters:
    """A tokenizer of letters: start, one number a letter of the alphabet, end (the highest), padding."""

    context_length = 20

    def __call__(self, texts: Any, context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        n = context_length or self.context_length
        rows = [[WORDS - 2, *(1 + ord(c) % 100 for c in text.strip()), WORDS - 1][:n] for text in texts]
        return torch.tensor([row + [0] * (n - len(row)) for row in rows])


@pytest.fixture(autouse=True)
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any, **kwargs: Any) -> CLIP:
        torch.manual_seed(0)
        model = CLIP(**CFG)
        enliven(model)
        return model

    for module in ("mmpeft.vla.fewshot.task",):
        monkeypatch.setattr(f"{module}.create", make)
        monkeypatch.setattr(f"{module}.tokenizer", lambda name: Letters())
    return make


class Blobs(ImageData):
    """Coloured noise, one colour a class."""

    def __init__(self, per_class: int = 8, classes: tuple[str, ...] = tuple(NAMES), seed: int = 0) -> None:
        super().__init__(batch_size=4, augment="none")
        self.classes, self.per_class = list(classes), per_class

    def datasets(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(len(self.classes)).repeat_interleave(self.per_class)
        colours = torch.randint(0, 200, (len(self.classes), 3, 1, 1), generator=generator)
        for name in ("train", "test"):
            noise = torch.randint(0, 56, (len(labels), 3, 32, 32), generator=generator)
            setattr(self, f"{name}_set", Pairs((colours[labels] + noise).to(torch.uint8), labels))


def data(**options: Any) -> FewShotData:
    return FewShotData(Blobs(), **{"shots": 2, "batch_size": 4, "augment": "none", **options})


def fit(task: FewShot, source: FewShotData, epochs: int = 1, callbacks: list[Callback] | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir="/nonexistent",
    )
    trainer.fit(task, datamodule=source)
    return trainer


def ready(head: Head | None = None, method: Any = None, **options: Any) -> FewShot:
    task = FewShot("tiny", method, head, templates=["a {}."], **options)
    task.classes, task.base = list(NAMES), 2
    task.prepare()
    return task.eval()


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


def test_maple_is_the_published_form(pair: Any) -> None:
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
        max_epochs, current_epoch = 4, 0

    weights = torch.exp(-0.5 * (torch.tensor([1.0, 2, 3, 4]) - 2) ** 2)
    for epoch in range(4):
        Run.current_epoch = epoch
        module.weight.data.fill_(float(epoch))
        average.on_train_epoch_end(Run(), module)  # type: ignore[arg-type]
    average.on_train_end(Run(), module)  # type: ignore[arg-type]
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


def test_kept_features_are_those_of_the_images() -> None:
    task, source = FewShot("tiny", None, ClipAdapter(), templates=["a {}."], views=2), data()
    fit(task, source)
    plain = data()
    plain.configure(32, *backbone.preprocessing(task.model)[1:])
    plain.setup()
    samples = plain.train_dataloader().dataset
    images = torch.stack([samples[0, row][0] for row in range(len(samples))])
    torch.testing.assert_close(source.train_set.views[0], task.image_features(images), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_a_keyed_cache_comes_back(tmp_path: Path) -> None:
    first, source = FewShot("tiny", None, TipAdapter(train=True), templates=["{}"], views=1), data()
    fit(first, source, 2)
    again = FewShot("tiny", None, TipAdapter(train=True), templates=["{}"], views=1)
    fit(again, data(), 0)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    image = F.normalize(torch.randn(3, 16), dim=-1)
    assert torch.equal(first(image), again(image))


# -- splits --------------------------------------------------------------------------------------------------------


def test_splits_nest_are_shared_by_a_file_and_keep_tests_apart(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    few, more = data(shots=1, split_file=str(file)), data(shots=3)
    few.setup(), more.setup()
    assert set(few.train_set.indices) < set(more.train_set.indices)
    assert not set(more.train_set.indices) & set(more.val_set.indices)
    labels = [few.source.train_set[i][1] for i in few.train_set.indices]
    assert sorted(labels) == [0, 1]
    assert {few.source.train_set[i][1] for i in few.val_set.indices} == {0, 1, 2, 3}
    other = data(shots=1, seed=5, split_file=str(file))
    other.setup()
    assert other.train_set.indices == few.train_set.indices
    with pytest.raises(DataError, match="shots=1"):
        data(shots=2, split_file=str(file)).setup()
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "train": [10**6]}))
    with pytest.raises(DataError, match="rows outside"):
        data(shots=1, split_file=str(file)).setup()


def test_bad_classes_and_shots() -> None:
    with pytest.raises(DataError, match="several classes are called 'red car'"):
        FewShotData(Blobs(classes=("red car", "red_car", "dog")))
    with pytest.raises(DataError, match="'cat' has 8 training images, shots=9"):
        data(shots=9).setup()
    source = Blobs()
    source.setup()
    source.test_set = Pairs(source.test_set.images[:8], source.test_set.second[:8])
    source.datasets = lambda stage=None: None  # type: ignore[method-assign]
    with pytest.raises(DataError, match="'dog' has no test image"):
        FewShotData(source, shots=1).setup()
    with pytest.raises(ConfigError, match="base_share"):
        data(base_share=0)
    placeless = FewShot("tiny", templates=["no place"])
    placeless.classes = list(NAMES)
    with pytest.raises(ConfigError, match="class name once"):
        placeless.prepare()
    with pytest.raises(ConfigError, match="give it the method CoOp"):
        ready(CoCoOp())


def test_room_for_learned_tokens() -> None:
    tokens = Letters()(["cat", "a longer"])
    made = with_room(tokens, 2, 1)
    assert made.shape == tokens.shape
    assert (made[:, 0] == tokens[:, 0]).all()
    assert torch.equal(made[0, 3:7], tokens[0, 1:5])
    assert (made.argmax(1) == tokens.argmax(1) + 2).all()
    with pytest.raises(DataError, match="leave no room for 11 learned tokens"):
        with_room(tokens, 11, 1)


def test_a_tokenizer_without_a_start_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Letters):
        def __call__(self, texts: Any, context_length: int | None = None) -> Tensor:
            n = context_length or self.context_length
            return F.pad(super().__call__(texts, n + 1)[:, 1:], (0, 0))

    monkeypatch.setattr("mmpeft.vla.fewshot.task.tokenizer", lambda name: Bare())
    with pytest.raises(ConfigError, match="position=0"):
        ready(method=mmpeft.CoOp(tokens=2))
    task = ready(method=mmpeft.CoOp(tokens=2, position=0))
    assert (task.texts.tokens[0, :, 2] != WORDS - 2).all()


def test_too_long_a_class_name_is_named() -> None:
    task = FewShot("tiny", templates=["{}"])
    task.classes = ["cat", "a very, very long class name"]
    with pytest.raises(DataError, match="a very, very long class name"):
        task.prepare()


# -- between frozen and tuned, and out of the suite -----------------------------------------------------------------


def test_interpolation_goes_from_the_base_to_the_tuned_model_and_back() -> None:
    task = ready(method=mmpeft.LoRA(at="attn.*|mlp.*") + mmpeft.BitFit())
    with torch.no_grad():
        for parameter in task.tuning.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    image, model = torch.randn(2, 3, 32, 32), task.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        tuned = model.encode_image(image)
        with mmpeft.use(model, None):
            plain = model.encode_image(image)
        for share, expected in ((0.0, plain), (1.0, tuned)):
            with interpolate(task.tuning, share):
                torch.testing.assert_close(model.encode_image(image), expected, atol=1e-5, rtol=1e-4)
        with interpolate(task.tuning, 0.5):
            half = model.state_dict()["visual.transformer.resblocks.0.mlp.c_fc.weight"].clone()
        with interpolate(task.tuning, 1.0):
            whole = model.state_dict()["visual.transformer.resblocks.0.mlp.c_fc.weight"].clone()
    first = before["visual.transformer.resblocks.0.mlp.c_fc.weight"]
    torch.testing.assert_close(half, (first + whole) / 2)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_the_wise_curve_is_written_and_refuses_prompts(tmp_path: Path) -> None:
    task, source = FewShot("tiny", mmpeft.LoRA(at="attn.{q,v}"), templates=["a {}."]), data()
    trainer = fit(task, source)
    trainer.callbacks.append(WiseCurve([0.0, 1.0]))
    trainer._default_root_dir = str(tmp_path)
    (found,) = trainer.test(task, datamodule=source, verbose=False)
    header, *rows = (tmp_path / "wise.csv").read_text().split()
    assert header == "alpha,val/base,val/new,val/harmonic,test/base,test/new,test/harmonic"
    assert float(rows[1].split(",")[4]) == pytest.approx(found["test/base"])
    assert (tmp_path / "wise.png").stat().st_size > 5000
    with pytest.raises(Refused, match="WiSE-FT wants a mergeable method"):
        fit(FewShot("tiny", mmpeft.CoOp(tokens=2)), data(), 1, [WiseCurve()])


def test_a_merged_pair_opens_in_open_clip(tmp_path: Path, pair: Any) -> None:
    source = tmp_path / "base"
    config = {"model_cfg": CFG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    plain = pair()
    backbone.save(plain, source, config, plain.state_dict())
    model = backbone.create(str(source))
    tuning = mmpeft.attach(model, mmpeft.LoRA(at="attn.*"))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert save_pair(tuning, str(source), tmp_path / "out") < 1e-5
    back = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(back.encode_image(image), model.eval().encode_image(image), atol=1e-5, rtol=1e-4)
    with pytest.raises(Refused):
        save_pair(mmpeft.attach(pair(), mmpeft.CoOp(tokens=2)), str(source), tmp_path / "never")


def test_learned_prompts_become_classifier_weights(tmp_path: Path) -> None:
    task = ready(method=mmpeft.CoOp(tokens=2))
    assert save_classifier(task, tmp_path) < 1e-4
    assert json.loads((tmp_path / "classes.json").read_text()) == NAMES
    with pytest.raises(ConfigError, match="no product with fixed weights"):
        save_classifier(ready(ClipAdapter()), tmp_path)


def test_frozen_trains_nothing(pair: Any) -> None:
    model = pair()
    tuning = mmpeft.attach(model, Frozen())
    assert not list(tuning.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    tuning.detach()
    assert all(p.requires_grad for p in model.parameters())


# -- pictures from the shell -----------------------------------------------------------------------------------------


def test_names_of_ones_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmpeft.vla.fewshot.command import main

    Image.new("RGBA", (20, 30), (255, 0, 0, 128)).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    words = ["classify", "--image", str(tmp_path / "a.png"), "--classes", "cat,dog", "--template", "a {}."]
    assert main([*words, "--out", str(out)]) == 0
    assert "a.png" in capsys.readouterr().out
    assert out.stat().st_size > 1000
    with pytest.raises(ConfigError, match="two or more different names"):
        main(["classify", "--image", str(tmp_path / "a.png"), "--classes", "cat"])
    with pytest.raises(DataError, match="no picture"):
        main(["classify", "--image", str(tmp_path / "b.png"), "--classes", "cat,dog"])
