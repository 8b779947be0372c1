"""What is done with a finished run by its folder: every task predicts what it is given, goes on, and is written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mmpeft.cli import main
from mmpeft.run.domains import table
from tests.support.hub import MemoryHub
from tests.support.task_examples import EXAMPLES, write_pairs

Said = pytest.CaptureFixture[str]
GIVEN = {
    "ImageClassifier": ["pictures"],
    "DepthEstimator": ["pictures"],
    "ContrastiveTuner": ["pictures", "--text", "a red thing", "a blue thing"],
    "FewShot": ["pictures"],
    "Segmenter": ["pictures", "--text", "a dog", "a cat"],
    "VisualQuestions": ["pictures", "--text", "is there a dog?"],
    "StyleTuner": ["a castle", "a castle"],
    "SliderTuner": ["a castle", "a castle"],
    "WordTuner": ["a castle", "a castle"],
}
"""What each task is given: two pictures of other shapes in a folder, or two prompts."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    Image.new("RGB", (40, 30), (200, 20, 20)).save("pictures/red.png")
    Image.new("L", (30, 50), 90).save("pictures/more/grey.jpg")
    return tmp_path


def trained(task: str, place: Path) -> Path:
    """The folder of a run of one step and one validation."""
    write_pairs(place)
    facts = {key: value for key, value in EXAMPLES[task].items() if key != "seed"}
    (place / "run.yaml").write_text(yaml.safe_dump(facts))
    short = [f"--trainer.limit_{name}_batches=1" for name in ("train", "val", "test")]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
    assert main(["fit", "-c", "run.yaml", "--name", "run", "--trainer.max_epochs=1", *short, *quiet]) == 0
    return place / "runs" / "run" / "version_0"


def test_every_task_is_given_something() -> None:
    ours = {name for name, (domain, _) in table("TASKS").items() if not name.endswith("Pretraining")}
    assert set(GIVEN) == ours


@pytest.mark.parametrize("task", GIVEN)
def test_predicts_what_it_is_given(task: str, place: Path, capsys: Said) -> None:
    trained(task, place)
    out = place / "out"
    assert main(["predict", "runs/run", *GIVEN[task], "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    tables = [path for path in files if path.suffix in (".csv", ".jsonl")]
    names = {path.stem.split("_classes")[0] for path in files}
    found = tables[0].read_text().splitlines()[tables[0].suffix == ".csv" :] if tables else names
    assert len(found) == 2
    assert main(["predict", "runs/run", *GIVEN[task], "--out", str(out)]) == 2  # nothing is written over
    assert "is there already" in capsys.readouterr().err


def test_goes_on_and_keeps_the_best(place: Path, capsys: Said) -> None:
    run = trained("ImageClassifier", place)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert main(["resume", "runs/run", "--trainer.max_epochs=3"]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 * first
    assert main(["test", str(run), "--best"]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["predict", "runs/run", "pictures/none.png"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["resume"]) == 2
    assert "which run?" in capsys.readouterr().err


def test_a_run_of_a_stranger_is_data(place: Path, capsys: Said) -> None:
    run = trained("ImageClassifier", place)
    own = yaml.safe_load((run / "config.yaml").read_text())
    hurt = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "hurt"]}}
    called = {"class_path": "os.system", "init_args": {"command": "touch hurt"}}
    for path, value, verbs in (
        (("trainer", "callbacks"), [hurt], ("resume",)),
        (("model", "init_args", "optimizer"), called, ("resume", "test", "predict")),
    ):
        facts = copy.deepcopy(own)
        place_of = facts
        for part in path[:-1]:
            place_of = place_of[part]
        place_of[path[-1]] = value
        (run / "config.yaml").write_text(yaml.safe_dump(facts))
        for verb in verbs:
            assert main([verb, str(run)]) == 2
            assert "neither registered nor" in capsys.readouterr().err
    assert not (place / "hurt").exists()


def test_a_classifier_is_written(place: Path, hub: MemoryHub, capsys: Said) -> None:
    trained("ImageClassifier", place)
    for to in ("timm", "onnx", "peft", "merged"):
        assert main(["export", "runs/run", "--to", to, "--out", to]) == 0
        assert "read" in capsys.readouterr().out
        assert any((place / to).iterdir())
    assert main(["export", "runs/run", "--to", "kohya", "--out", "out"]) == 2
    assert "can be written as merged, onnx, peft, timm" in capsys.readouterr().err
    (place / "alone").mkdir()
    assert main(["export", "alone", "--to", "peft", "--out", "out"]) == 2
    assert "--model module:function" in capsys.readouterr().err
    assert main(["push", "runs/run", "someone/emoji", "--license", "mit"]) == 0
    card = hub.files["someone/emoji"]["README.md"].decode()
    assert all(said in card for said in ("embedded:vit_emoji", "EmojiData", "val/accuracy"))


def test_a_pair_is_written(place: Path, capsys: Said) -> None:
    trained("FewShot", place)
    assert main(["export-clip", "--checkpoint", "runs/run", "--out", "out"]) == 0  # the former name
    said = capsys.readouterr()
    assert "--to open_clip" in said.err
    assert (place / "out" / "classes.json").is_file()
