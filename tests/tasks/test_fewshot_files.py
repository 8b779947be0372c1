"""Few-shot runs and their files: splits, what is kept, the way from frozen to tuned, exports, pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import open_clip
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mmpeft
from mmpeft.combine.interpolate import interpolate
from mmpeft.data.images import Pairs
from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.methods import Frozen
from mmpeft.run.callbacks import LearningCurves, Outcome
from mmpeft.run.checkpoint import LastCheckpoint, RandomState
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.vla import backbone
from mmpeft.vla.export import save_classifier, save_pair
from mmpeft.vla.fewshot.consistency import Consistency, GaussianAverage
from mmpeft.vla.fewshot.data import FewShotData
from mmpeft.vla.fewshot.heads import ClipAdapter, CoCoOp, TaskRes, TipAdapter
from mmpeft.vla.fewshot.task import FewShot
from mmpeft.vla.fewshot.texts import with_room
from mmpeft.vla.fewshot.wise import WiseCurve
from tests.tasks.fewshot_pair import CFG, NAMES, WORDS, Blobs, Letters, data, fit, ready

pytestmark = pytest.mark.usefixtures("pair")


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


def test_splits_that_somebody_else_has_written(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    data(shots=2, split_file=str(file)).setup()
    facts = json.loads(file.read_text())
    train, val = facts["train"], facts["val"]
    for wrong, message in (
        ([1, 2], "expected a JSON object, got list"),
        ({k: v for k, v in facts.items() if k != "val"}, "no 'val'"),
        ({**facts, "train": [*train[:-1], "3"]}, "no 'train'"),
        ({**facts, "val": [*val, train[0]]}, "an image twice"),
        ({**facts, "train": train[:-1]}, r"'dog': 1}; expected 2 of each of the 2 base classes"),
        ({**facts, "train": [*train, val[-1]], "val": val[:-1]}, r"'tree': 1}; expected 2"),
        ({**facts, "labels": "0" * 16}, "has labels='0000000000000000', this run"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=message):
            data(shots=2, split_file=str(file)).setup()


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

    monkeypatch.setattr("mmpeft.vla.pair.tokenizer", lambda name: Bare())
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
    with pytest.raises(Refused, match="with TaskRes there is more between them"):
        fit(FewShot("tiny", mmpeft.LoRA(), TaskRes()), data(), 1, [WiseCurve()])


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


def test_a_pair_of_the_hub_and_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub.json").write_text(json.dumps({"model_cfg": CFG}))
    asked = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / "hub.json")

    monkeypatch.setattr(backbone, "hf_hub_download", download)
    larger = CLIP(**{**CFG, "vision_cfg": {**CFG["vision_cfg"], "image_size": 48}})
    tuning = mmpeft.attach(larger, mmpeft.LoRA(at="attn.*"))
    assert save_pair(tuning, "hf-hub:some/pair@v2", tmp_path / "out") < 1e-5
    assert asked == [("some/pair", "open_clip_config.json", "v2")]
    assert open_clip.create_model(f"local-dir:{tmp_path / 'out'}").visual.image_size == (48, 48)
    emoji = backbone.create("embedded:clip_emoji", image_size=128)
    with pytest.raises(Refused, match=r"tuned at \(128, 128\) pixels; open_clip builds those of timm at their own"):
        save_pair(mmpeft.attach(emoji, mmpeft.LoRA()), "embedded:clip_emoji", tmp_path / "never")
    assert not (tmp_path / "never").exists()


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


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def kept(folder: Path, task: FewShot, epochs: int) -> dict[str, Tensor]:
    """Fit with the callbacks of the command line; the tensors of the checkpoint."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[RandomState(), LearningCurves(), Outcome(), LastCheckpoint()],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(task, datamodule=data())
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("train", "epochs"), [(True, 2), (False, 0), (False, 1)])
def test_what_is_chosen_by_validation_images_is_in_the_checkpoint(tmp_path: Path, train: bool, epochs: int) -> None:
    task = FewShot("tiny", None, TipAdapter(train=train), templates=["a {}."], views=1)
    found = kept(tmp_path, task, epochs)
    assert not torch.equal(task.head.strength, torch.tensor([1.0, 5.5]))
    for name, tensor in task.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_prompts_averaged_over_epochs_are_in_the_checkpoint_and_the_adapter(tmp_path: Path) -> None:
    fast = partial(torch.optim.SGD, lr=0.05)
    task = FewShot("tiny", mmpeft.CoOp(tokens=2), consistency=Consistency(), templates=["a {}."], optimizer=fast)
    found = kept(tmp_path, task, 3)
    (tokens,) = [tensor.detach() for tensor in task.tuning.parameters()]
    (name,) = [name for name, tensor in task.named_parameters() if tensor.requires_grad]
    assert torch.equal(found[name], tokens)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    (written,) = load_file(file).values()
    assert torch.equal(written, tokens)
    callback = next(c for c in task.trainer.callbacks if isinstance(c, GaussianAverage))
    torch.testing.assert_close(tokens, callback.sum[0] / callback.total)


def test_a_tip_adapter_wants_a_frozen_image_tower() -> None:
    with pytest.raises(ConfigError, match="keeps features of the training images"):
        ready(TipAdapter(), mmpeft.LoRA(at="image:attn.{q,v}"))
    with pytest.raises(ConfigError, match="keeps features of the training images"):
        fit(FewShot("tiny", mmpeft.LoRA(at="attn.{q,v}"), TipAdapter()), data())


# -- pictures from the shell -----------------------------------------------------------------------------------------


def test_names_of_ones_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmpeft.vla.commands import classify as main

    Image.new("RGBA", (20, 30), (255, 0, 0, 128)).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    words = ["classify", "--image", str(tmp_path / "a.png"), "--classes", "cat,dog", "--template", "a {}."]
    assert main([*words, "--out", str(out)]) == 0
    assert "a.png" in capsys.readouterr().out
    assert out.stat().st_size > 1000
    assert main([*words[:4], "cat,dog", "--template", "a {} {x}.", "--out", str(out)]) == 0
    with pytest.raises(SystemExit):
        main([*words, "--top", "0"])
    assert "--top: expected a whole number of 1 or more" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="two or more different names"):
        main(["classify", "--image", str(tmp_path / "a.png"), "--classes", "cat"])
    with pytest.raises(DataError, match="no picture"):
        main(["classify", "--image", str(tmp_path / "b.png"), "--classes", "cat,dog"])
