"""Segmentation by text: decoders, data, the task, its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor

import mmpeft
from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.tasks.taps import Taps, grid_of
from mmpeft.vla import backbone
from mmpeft.vla.segmentation.data import BACKGROUND, KINDS, SceneSegmentationData
from mmpeft.vla.segmentation.decoders import CLIPSegDecoder, Decoder, SANDecoder, pooled, prompted
from mmpeft.vla.segmentation.losses import assign, matched
from mmpeft.vla.segmentation.masks import FolderSegmentationData
from mmpeft.vla.segmentation.task import Segmenter, means, overlap
from mmpeft.vla.taps import image_taps
from tests.matrix.example import enliven

NAME = "embedded:clip_emoji"
NATIVE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 20, "vocab_size": 90, "width": 24, "heads": 3, "layers": 2},
}
DECODERS = {"CLIPSeg": lambda: CLIPSegDecoder(width=16, heads=2), "SAN": lambda: SANDecoder(16, 2, 2, queries=5)}
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "accelerator": "cpu"}


def native() -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**NATIVE)
    enliven(model)
    return model.eval()


def started(decoder: Decoder, model: Any) -> tuple[Decoder, Taps]:
    taps = image_taps(model)
    size = backbone.preprocessing(model)[0]
    decoder.start(taps, 192 if hasattr(model.visual, "trunk") else 16, 16)
    assert size
    return decoder.eval(), taps


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("tower", ["timm", "open_clip"])
def test_scores_for_any_classes_on_either_kind_of_tower(kind: str, tower: str) -> None:
    model: Any = backbone.create(NAME).eval() if tower == "timm" else native()
    decoder, taps = started(DECODERS[kind](), model)
    images = torch.randn(2, 3, 64, 64)
    width = 192 if tower == "timm" else 16
    for count in (1, 7):
        text = torch.nn.functional.normalize(torch.randn(count, width), dim=-1)
        scores = decoder(taps, images, text)
        assert scores.shape == (2, count, 64, 64)
        assert float(scores.min()) >= 0
        assert float(scores.max()) <= 1
    target = torch.full((2, 64, 64), BACKGROUND)
    target[0, :20], target[1, 30:, :9], target[1, :5] = 0, 3, 255
    loss = decoder.loss(taps, images, text, target)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_film_is_the_published_form() -> None:
    decoder, _ = started(CLIPSegDecoder(width=16, heads=2), native())
    assert isinstance(decoder, CLIPSegDecoder)
    x, text = torch.randn(2, 4, 16), torch.randn(3, 16)
    made = decoder.film(x, text)
    for b in range(2):
        for c in range(3):
            prompt = 4 * text[c]  # the root of its width: unit vectors become ones of unit variance
            gamma = decoder.scale.weight @ prompt + decoder.scale.bias
            beta = decoder.shift.weight @ prompt + decoder.shift.bias
            torch.testing.assert_close(made[b, c], x[b] * gamma + beta)
    own = text[torch.tensor([[2, 0], [1, 2]])]  # each image with prompts of its own
    torch.testing.assert_close(decoder.film(x, own)[0], made[0, [2, 0]])
    torch.testing.assert_close(decoder.film(x, own)[1], made[1, [1, 2]])


@torch.no_grad()
def test_a_map_begins_with_what_the_pair_says_of_a_patch() -> None:
    model: Any = backbone.create(NAME).eval()
    decoder, taps = started(DECODERS["CLIPSeg"](), model)
    assert isinstance(decoder, CLIPSegDecoder)
    for parameter in decoder.up.parameters():
        parameter.zero_()
    images = torch.randn(2, 3, 64, 64)
    text = torch.nn.functional.normalize(torch.randn(5, 192), dim=-1)
    trunk = model.visual.trunk
    patches = model.visual.head(trunk.fc_norm(trunk.forward_features(images)))  # as the tower does with their mean
    cosines = torch.nn.functional.normalize(patches, dim=-1) @ text.t()
    expected = model.logit_scale.exp() * (cosines - cosines.mean(-1, keepdim=True))
    found = decoder.logits(taps, images, text)[:, :, 8::16, 8::16].flatten(2).transpose(1, 2)
    near = torch.nn.functional.interpolate(expected.transpose(1, 2).unflatten(2, (4, 4)), 64, mode="bilinear")
    torch.testing.assert_close(found, near[:, :, 8::16, 8::16].flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_images_are_asked_for_what_they_show_and_for_others() -> None:
    target = torch.full((3, 4, 4), BACKGROUND)
    target[0, 0], target[0, 1], target[1, 2], target[1, 3] = 5, 2, 7, 255
    asked = prompted(target, 9, 4)
    assert asked.shape == (3, 4)
    assert {5, 2} <= set(asked[0].tolist())
    assert 7 in asked[1]
    assert all(len(set(row.tolist())) == 4 for row in asked)
    assert prompted(target, 9, None).tolist() == [list(range(9))] * 3
    with pytest.raises(ConfigError, match="prompts is a number"):
        CLIPSegDecoder(prompts=0)
    with pytest.raises(ConfigError, match="5 heads do not divide"):
        SANDecoder(16, heads=5)
    with pytest.raises(ConfigError, match="last is a number of blocks in 1 … 2"):
        started(SANDecoder(16, 2, 2, last=3), native())


def test_copies_see_the_patches_their_bias_leaves_and_nobody_sees_them() -> None:
    model: Any = native()
    decoder, taps = started(SANDecoder(16, 2, 2, queries=3, last=1), model)
    assert isinstance(decoder, SANDecoder)
    base = torch.randn(1, taps.prefix + 16, taps.width)
    bias = torch.full((1, decoder.clip_heads, 3, 16), float("-inf"))
    bias[..., :4] = 0
    with torch.no_grad():
        first = decoder.recognise(taps, base, bias)
        far, near = base.clone(), base.clone()
        far[:, taps.prefix + 8] += 5 * torch.randn(taps.width)
        near[:, taps.prefix + 1] += 5 * torch.randn(taps.width)
        torch.testing.assert_close(decoder.recognise(taps, far, bias), first, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(decoder.recognise(taps, near, bias), first, atol=1e-3)
        block = taps.blocks[-1]
        plain = block(base)
        mask = torch.zeros(1, decoder.clip_heads, taps.prefix + 19, taps.prefix + 19)
        mask[..., taps.prefix + 16 :] = float("-inf")
        mask[..., taps.prefix + 16 :, : taps.prefix + 16] = 0
        x = torch.cat([base, torch.randn(1, 3, taps.width)], 1)
        with_copies = block(x, attn_mask=mask.flatten(0, 1))
    torch.testing.assert_close(with_copies[:, : taps.prefix + 16], plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_tower_that_pools_patches_pools_them_under_each_mask() -> None:
    """A mask of everything gives the pair's own answer for the whole image."""
    model: Any = backbone.create(NAME).eval()
    decoder, taps = started(SANDecoder(16, 2, 2, queries=3, last=1), model)
    assert isinstance(decoder, SANDecoder)
    assert not hasattr(decoder, "bias_query")
    images = torch.randn(2, 3, 64, 64)
    text = torch.nn.functional.normalize(torch.randn(5, 192), dim=-1)
    decoder.mask_query[-1].weight.zero_()
    decoder.mask_query[-1].bias.zero_()  # every mask is one half everywhere
    scores, masks = decoder.explain(taps, images, text)
    whole = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.t()
    torch.testing.assert_close(scores[:, 1, :5], whole, atol=1e-3, rtol=1e-3)
    assert not masks.any()
    features = torch.randn(1, 4, 8)
    found = pooled(features, torch.tensor([[[1.0, 0.0, 3.0, 0.0]]]))
    torch.testing.assert_close(found[0, 0], (features[0, 0] + 3 * features[0, 2]) / 4)


def test_segments_go_to_the_queries_that_fit() -> None:
    truth = torch.zeros(2, 10)
    truth[0, :5], truth[1, 5:] = 1, 1
    masks = torch.stack([-torch.ones(10), 8 * (2 * truth[1] - 1), 8 * (2 * truth[0] - 1)])
    classes = torch.zeros(3, 5)
    queries, segments = assign(classes, masks, truth, [3, 1])
    assert dict(zip(queries.tolist(), segments.tolist())) == {1: 1, 2: 0}
    classes[2, 3] = classes[1, 1] = classes[0, 4] = 20
    target = torch.tensor([[3] * 5 + [1] * 5])[:, None]
    good = matched(classes[None], masks[None, :, None], target)
    worse = matched(classes[None], -masks[None, :, None], target)
    assert float(good) < 0.02 < float(worse)
    hidden = target.clone()
    hidden[..., 5:] = 255
    assert float(matched(classes[None], masks[None, :, None], hidden)) < float(worse)


def test_patches_fill_a_grid() -> None:
    assert grid_of(64, (128, 128)) == (8, 8)
    assert grid_of(32, (64, 128)) == (4, 8)
    with pytest.raises(Refused, match="fill no grid"):
        grid_of(19, (64, 64))
    with pytest.raises(ConfigError, match="blocks 0 … 2, asked for"):
        image_taps(native()).layers([1, 5])


def test_scenes_hide_unseen_kinds_and_test_identities_from_training() -> None:
    data = SceneSegmentationData(scenes=40, eval_scenes=40, image_size=64)
    data.setup()
    train = [data.train_dataloader().dataset[0, i] for i in range(40)]
    seen = {int(n) for _, mask in train for n in mask.unique()} - {BACKGROUND}
    assert seen <= set(range(len(KINDS) - 4))
    assert len(seen) > 6
    val = [data.val_dataloader().dataset[i] for i in range(40)]
    again = [data.val_dataloader().dataset[i] for i in range(40)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(val, again))
    assert {int(n) for _, mask in val for n in mask.unique()} & set(range(12, 16))
    rows = [{row for own in s.rows for row in own} for s in (data.train_set, data.val_set)]
    assert not rows[0] & rows[1]
    other = data.train_dataloader().dataset[1, 0]
    assert not torch.equal(other[0], train[0][0])  # new scenes in the next epoch


def folder(root: Path, mask: Tensor | None = None, classes: str = "cat\ndog\n") -> Path:
    for part in ("images", "masks"):
        (root / "train" / part).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(classes)
    Image.new("RGB", (20, 16), "red").save(root / "train" / "images" / "a.jpg")
    if mask is not None:
        Image.fromarray(mask.to(torch.uint8).numpy()).save(root / "train" / "masks" / "a.png")
    return root


def test_folders_of_masks(tmp_path: Path) -> None:
    mask = torch.zeros(16, 20)
    mask[3:9] = 1
    mask[0] = 255
    data = FolderSegmentationData(str(folder(tmp_path, mask)), image_size=32)
    data.setup()
    image, target = data.train_dataloader().dataset[0, 0]
    assert image.shape == (3, 32, 32)
    assert {int(n) for n in target.unique()} == {0, 1, 255}
    data = FolderSegmentationData(str(folder(tmp_path, mask, "dog\n")), background=0, first=1, image_size=32)
    data.setup()
    assert {int(n) for n in data.train_dataloader().dataset[0, 0][1].unique()} == {0, BACKGROUND, 255}
    data = FolderSegmentationData(str(tmp_path), first=1, ignored=0, image_size=32, check=False)
    data.setup("fit")
    assert data.test_set is None
    with pytest.raises(DataError, match=r"holds 255, the classes are 1 … 1 and 0 does not count"):
        data.train_set[0]


def test_pictures_to_predict_keep_their_size(tmp_path: Path) -> None:
    root = folder(tmp_path, torch.arange(320).reshape(16, 20) % 2)
    (root / "predict").mkdir()
    Image.new("RGB", (30, 24), "blue").save(root / "predict" / "mine.png")
    Image.new("RGB", (50, 20), "red").save(root / "predict" / "other.jpg")
    data = FolderSegmentationData(str(root))
    task = Segmenter(NAME, decoder=CLIPSegDecoder(width=16, heads=2), image_size=64)
    lightning.Trainer(default_root_dir=tmp_path / "out", **QUIET).predict(task, datamodule=data)
    files = sorted(path.name for path in (tmp_path / "out" / "segments").iterdir())
    assert files == ["mine.png", "mine_classes.png", "other.png", "other_classes.png"]
    stored = Image.open(tmp_path / "out" / "segments" / "mine_classes.png")
    assert stored.size == (30, 24)
    assert set(np.unique(np.array(stored)).tolist()) <= {0, 1, 2}


def test_bad_masks(tmp_path: Path) -> None:
    def first(mask: Tensor | None, classes: str = "cat\ndog\n", name: str = "x") -> Any:
        data = FolderSegmentationData(str(folder(tmp_path / name, mask, classes)), image_size=32)
        data.setup()
        return data.train_set[0]

    with pytest.raises(DataError, match=r"a\.png is \(5, 20\), its image a\.jpg \(16, 20\)"):
        first(torch.zeros(5, 20))
    with pytest.raises(DataError, match=r"a\.png holds 7, the classes are 0 … 1"):
        first(torch.full((16, 20), 7))
    with pytest.raises(DataError, match=r"no training mask in .* has a pixel of dog"):
        first(torch.zeros(16, 20))
    with pytest.raises(DataError, match="unseen is a number of classes below"):
        FolderSegmentationData(str(tmp_path / "x"), unseen=2)
    with pytest.raises(DataError, match="has no mask"):
        first(None, name="y")
    with pytest.raises(DataError, match="1 … 253 different classes"):
        first(torch.zeros(16, 20), "cat\ncat\n", "z")
    with pytest.raises(DataError, match=r"no .*classes\.txt"):
        FolderSegmentationData(str(tmp_path))
    with pytest.raises(ConfigError, match="unseen"):
        SceneSegmentationData(unseen=16)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_run_reports_seen_and_unseen(kind: str) -> None:
    data = SceneSegmentationData(scenes=8, eval_scenes=8, batch_size=4, eval_batch_size=4, image_size=64)
    method = mmpeft.LoRA(at="image:attn.*", rank=2) if kind == "SAN" else None
    task = Segmenter(NAME, method, DECODERS[kind](), template="a drawing of a {}", image_size=64)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(task, datamodule=data)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert set(found) == {"test/mIoU", "test/seen", "test/unseen", "test/hIoU"}
    assert all(0 <= value <= 1 for value in found.values())
    other = task.encode(["zebra", "space ship", "cheese"])
    assert task(torch.randn(1, 3, 64, 64), other).shape == (1, 3, 64, 64)


def test_means_leave_out_what_is_nowhere() -> None:
    metric = overlap(6)
    metric.update(torch.tensor([0, 0, 1, 3, 5, 5]), torch.tensor([0, 1, 1, 4, 255, 5]))
    found = means(metric.compute()[:5], 2)  # 0: 1/2, 1: 1/2, 2 nowhere, 3 and 4: 0
    assert [round(float(v), 4) for v in found.values()] == [0.25, 0.5, 0.0, 0.0]
    found = means(torch.tensor([0.5, torch.nan, 0.3]), 1)
    assert float(found["hIoU"]) == pytest.approx(2 * 0.5 * 0.3 / 0.8)


def test_a_pixel_unsure_of_its_class_still_shows_something() -> None:
    task = Segmenter(NAME)
    scores = torch.tensor([[0.4, 0.3, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.9]]).t()[None, :, None]
    assert task.segment(scores)[0, 0].tolist() == [0, 3, 2]
    task.threshold = None
    assert task.segment(scores)[0, 0].tolist() == [0, 0, 2]
    with pytest.raises(ConfigError, match="threshold is a score"):
        Segmenter(NAME, threshold=1.5)


def test_a_tuned_text_tower_is_heard() -> None:
    task = Segmenter(NAME, mmpeft.LoRA(at="text:attn.*", rank=2), CLIPSegDecoder(width=16, heads=2), image_size=64)
    task.classes, task.log = ["cat", "dog"], lambda *a, **k: None  # type: ignore[method-assign]
    tuning = task.prepare()
    target = torch.zeros(1, 64, 64, dtype=torch.long)
    task.loss((torch.randn(1, 3, 64, 64), target), 0).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuning.parameters())


def test_a_picture_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmpeft.cli import main as mmpeft_main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "model: {class_path: Segmenter, init_args: {backbone: 'embedded:clip_emoji', image_size: 64,"
        " decoder: {class_path: CLIPSegDecoder, init_args: {width: 16, heads: 2}}}}\n"
        "data: {class_path: SceneSegmentationData, init_args: {scenes: 4, eval_scenes: 4, image_size: 64}}\n"
        "trainer: {max_epochs: 1, enable_progress_bar: false, accelerator: cpu}\n"
    )
    assert mmpeft_main(["fit", "-c", "run.yaml", "--name", "seg"]) == 0
    assert list((tmp_path / "runs/seg").rglob("masks/*.png"))
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save("pic.png")
    words = ["segment", "--checkpoint", "runs/seg", "--image", "pic.png", "--classes", "cat,dog", "--out", "out.png"]
    assert mmpeft_main(words) == 0
    assert Image.open("out_classes.png").size == (40, 30)
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert mmpeft_main([*words[:-4], "--classes", "cat,cat"]) == 2
