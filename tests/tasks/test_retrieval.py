"""Contrastive tuning on images with texts: the loss in micro-batches, recall, and where the pairs come from."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import mmpeft
from mmpeft.data.caption_sources import open_captions
from mmpeft.errors import AdapterFileError, ConfigError, DataError
from mmpeft.vla import backbone
from mmpeft.vla.contrastive.data import CaptionData
from mmpeft.vla.contrastive.task import ContrastiveTuner, recall

NAME = "embedded:clip_emoji"
LORA = mmpeft.LoRA(at="attn.{q,v}", rank=2)
TEXTS = ["a cat", "a red car", "a tree", "two dogs"]


def picture(path: Path, colour: int) -> Path:
    Image.fromarray(np.full((20, 24, 3), colour, np.uint8)).save(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        for i, text in enumerate(TEXTS):
            picture(tmp_path / f"{i}.png", 60 * i)
            writer.writerows([[f"{i}.png", text], [f"{i}.png", f"{text}, again"]])
    return tmp_path / "pairs.csv"


def shard(path: Path, texts: dict[str, str], images: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key in images:
            data = io.BytesIO()
            Image.new("RGB", (10, 10)).save(data, "PNG")
            info = tarfile.TarInfo(f"{key}.png")
            info.size = data.tell()
            data.seek(0)
            tar.addfile(info, data)
        for key, text in texts.items():
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    images, grads = torch.randn(4, 3, 64, 64), []
    for size in (None, 1, 3):
        task = ContrastiveTuner(NAME, LORA, micro_batch=size, tune_scale=True)
        task.prepare()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in task.tuning.parameters():
                parameter.normal_(std=0.05)
        loss = task.contrast(images, task.tokens(TEXTS))
        grads.append([loss, *torch.autograd.grad(loss, [p for p in task.parameters() if p.requires_grad])])
    assert len(grads[0]) == 1 + len(list(task.tuning.parameters()))  # the scale among them
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_the_loss_is_the_published_one(objective: Any) -> None:
    task = ContrastiveTuner(NAME, LORA, objective=objective)
    task.prepare()
    images, tokens = torch.randn(4, 3, 64, 64), task.tokens(TEXTS)
    with torch.no_grad():
        image, text = task.encode(images, tokens)
        scores = task.model.logit_scale.exp() * image @ text.t()
        if objective == "clip":
            target = torch.arange(4)
            expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2
        else:
            expected = -F.logsigmoid((2 * torch.eye(4) - 1) * (scores - 10)).sum() / 4
        torch.testing.assert_close(task.contrast(images, tokens), expected, atol=1e-4, rtol=1e-4)


def test_recall_counts_every_caption_of_an_image() -> None:
    image = torch.eye(4)[[0, 0, 1, 2]]
    text = torch.eye(4)[[1, 0, 2, 1]]
    found = recall(image, text, torch.tensor([0, 0, 1, 2]))
    assert float(found["image_to_text@1"]) == pytest.approx(1 / 3)  # image 0 by its second text
    assert float(found["image_to_text@5"]) == 1
    assert float(found["text_to_image@1"]) == pytest.approx(1 / 4)


def test_an_image_of_five_captions_is_found_once() -> None:
    torch.manual_seed(0)
    rows = torch.arange(40).repeat_interleave(5)[torch.randperm(200)]
    image = F.normalize(torch.randn(40, 16), dim=-1)
    text = F.normalize(image[rows] + 1.5 * torch.randn(200, 16), dim=-1)
    found = recall(image[rows], text, rows)
    scores = text @ image.t()
    for k in (1, 5, 10):
        texts = [int(rows[i]) in scores[i].argsort(descending=True)[:k].tolist() for i in range(200)]
        images = [n in rows[scores[:, n].argsort(descending=True)[:k]].tolist() for n in range(40)]
        assert float(found[f"text_to_image@{k}"]) == pytest.approx(sum(texts) / 200)
        assert float(found[f"image_to_text@{k}"]) == pytest.approx(sum(images) / 40)


def test_tuning_on_a_table_reports_recall(table: Path) -> None:
    data = CaptionData(str(table), str(table), batch_size=4, augment="none")
    task = ContrastiveTuner(NAME, LORA)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, datamodule=data)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert {f"test/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= set(found)
    assert found["test/image_to_text@10"] == 1


def test_tables_shards_and_data_sets_give_the_same_samples(table: Path, tmp_path: Path) -> None:
    found = open_captions(str(table), "image", "text")
    assert len(found) == 8
    assert found.rows == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found[2][1] == "a red car"
    assert found[2][0].getpixel((0, 0)) == (60, 60, 60)
    shard(tmp_path / "a-0.tar", {"1": "one", "2": "two"}, ["1", "2"])
    shard(tmp_path / "a-1.tar", {"3": "three"}, ["3"])
    shards = open_captions(str(tmp_path / "a-*.tar"), "", "")
    assert shards.texts == ["one", "two", "three"]
    assert shards[2][0].size == (10, 10)
    folder = tmp_path / "folder"
    folder.mkdir()
    picture(folder / "x.png", 9)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": "nine"}))
    hub = open_captions(f"{folder}:train", "image", "text")
    assert hub.texts == ["nine"]
    assert hub[0][0].getpixel((0, 0)) == (9, 9, 9)


def test_bad_pairs(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'caption'; columns: image, text"):
        open_captions(str(table), "image", "caption")
    with pytest.raises(DataError, match="no tar file matches"):
        open_captions(str(tmp_path / "none-*.tar"), "", "")
    shard(tmp_path / "half.tar", {"1": "one"}, ["1", "2"])
    with pytest.raises(DataError, match=r"expected pairs .*\['2'\]"):
        open_captions(str(tmp_path / "half.tar"), "", "")
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="no whole tar file"):
        open_captions(str(tmp_path / "broken.tar"), "", "")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"expected \.csv"):
        open_captions(str(tmp_path / "x.json"), "", "")
    (tmp_path / "gone.csv").write_text("image,text\nnowhere.png,a\n")
    with pytest.raises(DataError, match=r"nowhere\.png, which does not exist"):
        open_captions(str(tmp_path / "gone.csv"), "image", "text")
    (tmp_path / "0.csv").write_text("image,text\n0.png,\n")
    with pytest.raises(DataError, match="sample 0 has no text"):
        open_captions(str(tmp_path / "0.csv"), "image", "text")
    (tmp_path / "fake.png").write_bytes(b"no picture")
    (tmp_path / "fake.csv").write_text("image,text\nfake.png,a\n")
    with pytest.raises(DataError, match=r"fake\.png cannot be read"):
        open_captions(str(tmp_path / "fake.csv"), "image", "text")[0]


def test_a_caption_longer_than_the_context_is_named(table: Path) -> None:
    table.write_text("image,text\n0.png," + "long " * 40)
    data = CaptionData(str(table), batch_size=1)
    data.setup()
    with pytest.raises(DataError, match="longer than the 32 tokens"):
        data.check_texts(backbone.tokenizer(NAME))


def test_names_of_pairs() -> None:
    with pytest.raises(ConfigError, match=r"no embedded pair 'clip_emojy'.*Did you mean 'clip_emoji'"):
        backbone.create("embedded:clip_emojy")
    with pytest.raises(ConfigError, match=r"unknown pair 'ViT-B-61'.*Did you mean"):
        backbone.create("ViT-B-61/openai")
    with pytest.raises(ConfigError, match=r"no pretrained tag 'laion'"):
        backbone.create("ViT-B-16/laion")
    with pytest.raises(ConfigError, match="choose one"):
        backbone.create("ViT-B-16")
    with pytest.raises(ConfigError, match=r"has no open_clip_config\.json"):
        backbone.create("local-dir:/nowhere")


def test_a_damaged_pair_is_refused(tmp_path: Path) -> None:
    source = backbone.folder_of(NAME)
    assert source is not None
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / backbone.MODEL).read_bytes())
    data[-5] ^= 1
    (tmp_path / backbone.MODEL).write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        backbone.create(str(tmp_path))
    model: Any = backbone.create(NAME, image_size=128)
    assert model.encode_image(torch.zeros(1, 3, 128, 128)).shape == (1, 192)


@pytest.mark.parametrize("objective", ["clip", "siglip"])
@pytest.mark.parametrize("tune", [False, True], ids=["scales rest", "scales train"])
def test_the_adapter_holds_the_scales_and_fits_its_own_base(tmp_path: Path, objective: Any, tune: bool) -> None:
    task = ContrastiveTuner(NAME, LORA, objective=objective, tune_scale=tune)
    tuning = task.prepare()
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.25)
    assert all(any(p is own for own in tuning.parameters()) for _, p in task.trainable())
    tuning.save(tmp_path)
    base = backbone.create(NAME, True, None)
    if objective == "siglip" and tune:
        with pytest.raises(AdapterFileError, match="logit_bias"):
            mmpeft.load(base, tmp_path)
        base.logit_bias = nn.Parameter(torch.tensor(-10.0))
    mmpeft.load(base, tmp_path)
    assert float(base.logit_scale) == pytest.approx(float(task.model.logit_scale), abs=1e-6)
    if objective == "siglip" and tune:
        assert float(base.logit_bias) == pytest.approx(-9.75)
