"""Visual questions: files with damage, the fusion transformer, training, predictions, and asking from the shell."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor

import mmpeft
from mmpeft.cli import main
from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.vla.vqa.data import SceneQuestionData, VQAData
from mmpeft.vla.vqa.model import Fusion, Looking
from mmpeft.vla.vqa.questions import ANSWERS, TYPES
from mmpeft.vla.vqa.task import VisualQuestions
from tests.matrix.example import enliven

WORDS = 200
CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 60, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 2},
}
LORA = mmpeft.LoRA(at="attn.{q,v}", rank=2)


class Letters:
    """A tokenizer of letters: start, one number a letter, end (the highest), padding."""

    context_length = 60

    def __call__(self, texts: Any, context_length: int | None = None) -> Tensor:
        n = context_length or self.context_length
        rows = [[WORDS - 2, *(1 + ord(c) % 100 for c in text), WORDS - 1][:n] for text in texts]
        return torch.tensor([row + [0] * (n - len(row)) for row in rows])


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's own towers, tiny: a class token before the patches, unlike the embedded pair."""

    def make(*args: Any, **kwargs: Any) -> CLIP:
        torch.manual_seed(0)
        model = CLIP(**CFG)
        enliven(model)
        return model

    monkeypatch.setattr("mmpeft.vla.pair.create", make)
    monkeypatch.setattr("mmpeft.vla.pair.tokenizer", lambda name: Letters())


def scenes(**options: Any) -> SceneQuestionData:
    return SceneQuestionData(**{"scenes": 8, "eval_scenes": 4, "image_size": 64, "batch_size": 4, **options})


def task(method: Any = None, **fusion: Any) -> VisualQuestions:
    torch.manual_seed(0)
    return VisualQuestions("tiny", method, Fusion(**{"width": 16, "depth": 1, **fusion}), image_size=64)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"accelerator": "cpu", "max_steps": 2, "num_sanity_val_steps": 0, **quiet, **options}
    return lightning.Trainer(default_root_dir=folder, plugins=[AtomicCheckpointIO()], **options)


def ready(module: VisualQuestions, folder: Path) -> tuple[VisualQuestions, Any]:
    data = scenes()
    data.setup(None)
    module.trainer = trainer(folder)
    module.trainer.datamodule = data  # type: ignore[attr-defined]
    module.prepare()
    return module.eval(), next(iter(data.train_dataloader()))


# -- VQAv2's files -------------------------------------------------------------------------------------------


def vqa_files(root: Path) -> Path:
    for split in ("train", "val", "predict"):
        (root / split / "images").mkdir(parents=True)
        for number in (1, 2):
            array = np.full((20, 24, 3), 90 * number, np.uint8)
            Image.fromarray(array).save(root / split / "images" / f"{number:04d}.png")
        asked = [
            {"question_id": 10 * i, "image_id": i, "question": q} for i, q in ((1, "what is it?"), (2, "is it red?"))
        ]
        said = [
            {"question_id": 10, "question_type": "what", "answers": [{"answer": a} for a in ["Cat", "cat", "dog"]]},
            {"question_id": 20, "question_type": "is", "answers": [{"answer": "yes"}] * 5},
        ]
        (root / split / "questions.json").write_text(json.dumps({"questions": asked}))
        if split != "predict":
            (root / split / "annotations.json").write_text(json.dumps({"annotations": said}))
    return root


def vqa(root: Path, **options: Any) -> VQAData:
    return VQAData(
        str(root), **{"image_name": "{split}/images/{image_id:04d}.png", "image_size": 64, "batch_size": 2, **options}
    )


def change(path: Path, key: str, row: int, **facts: Any) -> None:
    """Change entries of a file; None takes a key away."""
    known = json.loads(path.read_text())
    for name, value in facts.items():
        if value is None:
            del known[key][row][name]
        else:
            known[key][row][name] = value
    path.write_text(json.dumps(known))


def test_answers_count_by_their_annotators(tmp_path: Path) -> None:
    data = vqa(vqa_files(tmp_path))
    data.setup(None)
    assert data.answers == ["cat", "dog", "yes"]
    assert data.types == ["is", "what"]
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(batch.scores, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 1]]))
    assert batch.types.tolist() == [1, 0]
    assert batch.owner.tolist() == [0, 1]
    assert vqa(tmp_path, vocabulary=2).answers == ["cat", "dog"]


def test_training_leaves_out_what_it_cannot_answer_and_validation_counts_it(tmp_path: Path) -> None:
    data = vqa(vqa_files(tmp_path), vocabulary=2)
    data.setup(None)
    assert len(data.train_set) == 1
    assert len(data.val_set) == 2
    assert data.val_set[1].scores.sum() == 0


@pytest.mark.parametrize(
    ("file", "row", "facts", "message"),
    [
        ("questions", 0, {"question": None}, "lacks 'question'"),
        ("questions", 0, {"image_id": None}, "lacks 'image_id'"),
        ("questions", 1, {"image_id": 7}, "0007.png, which does not exist"),
        ("questions", 1, {"image_id": "x"}, "lacks"),
        ("annotations", 0, {"answers": None}, "lacks 'answers'"),
        ("annotations", 1, {"question_id": 77}, "question 20 .* has no answer"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, row: int, facts: dict, message: str) -> None:
    change(vqa_files(tmp_path) / "train" / f"{file}.json", file, row, **facts)
    with pytest.raises(DataError, match=message):
        vqa(tmp_path)


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder `train`"):
        vqa(tmp_path)
    root = vqa_files(tmp_path)
    for row in (0, 1):
        change(root / "val" / "annotations.json", "annotations", row, answers=[{"answer": "elephant"}])
    with pytest.raises(DataError, match=r"no question of .*val has one of the 3 answers"):
        vqa(root)
    (root / "val" / "annotations.json").write_text("[]")
    with pytest.raises(DataError, match="key 'annotations'"):
        vqa(root)
    (root / "val" / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"annotations\.json"):
        vqa(root)
    with pytest.raises(ConfigError, match="vocabulary"):
        vqa(root, vocabulary=1)


def test_a_question_beyond_the_context_stops_before_training(pair: None, tmp_path: Path) -> None:
    change(vqa_files(tmp_path) / "val" / "questions.json", "questions", 0, question="why " * 30)
    with pytest.raises(DataError, match="longer than the 60 tokens"):
        trainer(tmp_path).fit(task(), vqa(tmp_path))


# -- scenes --------------------------------------------------------------------------------------------------


def test_sets_differ_and_repeat() -> None:
    one, two = scenes(num_workers=0), scenes(num_workers=0)
    for data in (one, two):
        data.setup(None)
    first, again = (next(iter(data.train_dataloader())) for data in (one, two))
    assert torch.equal(first.images, again.images)
    assert first.questions == again.questions
    val, test = next(iter(one.val_dataloader())), next(iter(one.test_dataloader()))
    assert val.questions != test.questions, "the same places and kinds in two sets"
    assert val.scores.shape == (len(val.questions), len(ANSWERS))
    assert int(val.owner.max()) == len(val.images) - 1
    with pytest.raises(ConfigError, match="scenes"):
        scenes(scenes=0)


# -- the model -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_each_question_alone(pair: None, tmp_path: Path) -> None:
    """Batching, padding and several questions an image change nothing."""
    module, batch = ready(task(LORA), tmp_path)
    with torch.no_grad():
        together = module(batch.images, batch.questions, batch.owner)
        for row in (0, 3, len(batch.questions) - 1):
            image = batch.images[batch.owner[row]][None]
            torch.testing.assert_close(module(image, batch.questions[row : row + 1])[0], together[row])
    assert together.shape == (len(batch.questions), len(ANSWERS))


def test_a_blind_model_sees_no_image_and_another_does(pair: None, tmp_path: Path) -> None:
    for blind in (True, False):
        module, batch = ready(task(blind=blind), tmp_path)
        with torch.no_grad():
            first = module(batch.images, batch.questions, batch.owner)
            other = module(batch.images.flip(3), batch.questions, batch.owner)
        assert torch.equal(first, other) == blind


@pytest.mark.parametrize("method", [None, LORA, mmpeft.VLAdapter(), mmpeft.VPT(at="image:tokens", tokens=3)], ids=str)
def test_all_that_trains_has_a_gradient(pair: None, tmp_path: Path, method: Any) -> None:
    module, batch = ready(task(method), tmp_path)
    with torch.no_grad():  # away from where half of a pair of factors has none
        for _, parameter in module.trainable():
            parameter.add_(0.02 * torch.randn_like(parameter))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.loss(batch, 0).backward()
    dead = [name for name, p in module.trainable() if p.grad is None or not p.grad.any()]
    assert not dead


def test_heads_follow_likeness_by_their_weights() -> None:
    """A block's attention to patches against each question and head by itself: `softmax(k·q/√d + β_h s) v`."""
    torch.manual_seed(0)
    width, heads, owner = 8, 2, torch.tensor([1, 0, 1])
    block = Looking(width, heads, 0.0, likeness=True)
    x, patches, s = torch.randn(3, 4, width), torch.randn(2, 5, width), torch.randn(3, 5)
    attention = block.multihead_attn
    for part in (block.self_attn.out_proj, block.linear2):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    found = []
    for question, image in enumerate(owner.tolist()):
        parts = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k, v = (
            (given @ w.T + b).unflatten(-1, (heads, -1))
            for given, w, b in zip((block.norm2(x[question]), patches[image], patches[image]), *parts)
        )
        per_head = [
            (q[:, h] @ k[:, h].T / (width // heads) ** 0.5 + block.beta[h] * s[question]).softmax(-1) @ v[:, h]
            for h in range(heads)
        ]
        found.append(x[question] + attention.out_proj(torch.cat(per_head, -1)))
    torch.testing.assert_close(block(x, torch.zeros(3, 4, dtype=torch.bool), patches, owner, s), torch.stack(found))


def test_a_tower_that_pools_by_attention_has_no_likeness(pair: None, tmp_path: Path, monkeypatch: Any) -> None:
    def none(model: Any) -> Any:
        raise Refused("pools by attention")

    monkeypatch.setattr("mmpeft.vla.vqa.task.projection", none)
    module, batch = ready(task(LORA), tmp_path)
    assert not any("beta" in name or "turn" in name for name, _ in module.trainable())
    assert module(batch.images, batch.questions, batch.owner).isfinite().all()


def test_losses_against_their_formulas(pair: None, tmp_path: Path) -> None:
    module, batch = ready(task(), tmp_path)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with torch.no_grad():
        z = module(batch.images, batch.questions, batch.owner)
        true = batch.scores.argmax(1)
        torch.testing.assert_close(module.loss(batch, 0), -z.log_softmax(1)[range(len(z)), true].mean())
        module.soft = True
        p, s = z.sigmoid(), batch.scores
        by_hand = -(s * p.log() + (1 - s) * (1 - p).log()).sum(1).mean()
        torch.testing.assert_close(module.loss(batch, 0), by_hand)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="heads must divide the width"):
        Fusion(width=10, heads=4)


def test_context_in_the_place_of_words_is_refused(pair: None, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="in the place of the question's words"):
        ready(task(mmpeft.CoOp(tokens=4)), tmp_path)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["scenes", "files"])
def test_fit_test_and_predict(pair: None, tmp_path: Path, source: str) -> None:
    data = scenes() if source == "scenes" else vqa(vqa_files(tmp_path / "files"))
    module = task(LORA)
    run = trainer(tmp_path, logger=TensorBoardLogger(str(tmp_path), "run"))
    run.fit(module, data)
    found = run.validate(module, data, verbose=False)[0]
    assert {"val/accuracy"} < set(found) <= {"val/accuracy", *(f"val/{name}" for name in data.types)}
    if source == "scenes":
        tested = run.test(module, data, verbose=False)[0]
        assert {"test/accuracy"} < set(tested) <= {"test/accuracy", *(f"test/{name}" for name in TYPES)}
        assert (Path(run.log_dir) / "answers" / "test.png").is_file()
    assert list((Path(run.log_dir) / "answers").glob("val_*.png"))
    run.predict(module, data)
    lines = [json.loads(line) for line in (Path(run.log_dir) / "answers.jsonl").read_text().splitlines()]
    data.setup(None)
    assert len(lines) == sum(len(batch.questions) for batch in data.predict_dataloader())
    assert all(set(line) == {"id", "question", "answers"} for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)
    assert all(set(line["answers"]) <= set(data.answers) for line in lines)


def test_ask_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmpeft"])
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    fusion = {"class_path": "Fusion", "init_args": {"width": 16, "depth": 1}}
    init = {"backbone": "embedded:clip_emoji", "fusion": fusion, "image_size": 64}
    config = {
        "model": {"class_path": "VisualQuestions", "init_args": init},
        "data": {
            "class_path": "SceneQuestionData",
            "init_args": {"scenes": 4, "eval_scenes": 2, "image_size": 64, "batch_size": 4},
        },
        "method": {"class_path": "VLAdapter", "init_args": {"bottleneck": 2}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "num_sanity_val_steps": 0},
    }
    Path("vqa.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "vqa.yaml", "--name", "asked"]) == 0
    Image.new("RGB", (50, 40), "red").save("red.png")
    capsys.readouterr()
    words = ["ask", "--checkpoint", "runs/asked", "--image", "red.png", "--out", "out.png", "--question"]
    assert main([*words, "where is the flag?", "how many clocks are there?"]) == 0
    assert "where is the flag?" in capsys.readouterr().out
    with Image.open("out.png") as picture:
        assert picture.width > 200
    assert main([*words, "why " * 40]) == 2
    assert "longer than the 32 tokens" in capsys.readouterr().err
    assert main(["ask", "--checkpoint", "nowhere", "--image", "red.png", "--question", "why?"]) == 2
