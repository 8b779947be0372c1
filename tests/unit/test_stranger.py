"""Runs that somebody else has written: nothing of theirs runs, and nothing is written where they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmpeft.errors import ConfigError, MMPEFTError
from mmpeft.files import may_write
from mmpeft.run import stranger
from mmpeft.run.experiment import Experiment
from mmpeft.run.reload import load_run
from mmpeft.vision.data.digits import DigitsData
from mmpeft.vla.fewshot.data import FewShotData

EVIL = "from pathlib import Path\nPath({mark!r}).touch()\nclass ImageClassifier: pass\ndef f(*a, **k): pass\n"
MODEL = {"class_path": "ImageClassifier", "init_args": {"backbone": "vit_tiny_patch16_224"}}
DATA = {"class_path": "DigitsData", "init_args": {}}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a module in its folder, which is the working directory and on the search path."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("evil", None)
    return tmp_path


def write(found: Path, **run: Any) -> None:
    (found / "config.yaml").write_text(yaml.safe_dump({"model": MODEL, "data": DATA, "method": "LoRA", **run}))


def given(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


HOSTILE = {
    "task": {"model": given("evil.ImageClassifier")},
    "data": {"data": given("evil.DigitsData")},
    "method": {"method": given("evil.LoRA")},
    "a class of the standard library": {"data": given("subprocess.Popen", args=["touch", "ran"])},
    "optimiser by path": {"model": given("ImageClassifier", backbone="vit_tiny_patch16_224", optimizer="evil.f")},
    "optimiser": {"model": given("ImageClassifier", backbone="vit_tiny_patch16_224", optimizer=given("evil.f"))},
    "scheduler": {"model": given("ImageClassifier", backbone="vit_tiny_patch16_224", lr_scheduler=given("os.system"))},
    "source inside data": {"data": given("FewShotData", source=given("evil.DigitsData"))},
    "torch's own dangers": {"data": given("torch.hub.load", repo="x")},
    "shorthand": {"data": "evil.DigitsData"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_of_theirs_is_imported_or_built(found: Path, case: str) -> None:
    write(found, **HOSTILE[case])
    with pytest.raises(ConfigError, match=r"may run no code of its own|not correspond to a subclass|os\.system"):
        load_run(found)
    assert not (found / "ran").exists()
    assert "evil" not in sys.modules
    assert not [finder for finder in sys.meta_path if isinstance(finder, stranger._OnlyInstalled)]
    assert may_write()


def test_callbacks_loggers_and_plugins_are_not_looked_at(found: Path) -> None:
    write(found, trainer={"callbacks": [given("evil.f")], "logger": given("evil.f"), "plugins": [given("evil.f")]})
    facts = stranger.read_config(found / "config.yaml")
    with stranger.guarded(found / "config.yaml") as check:
        experiment = Experiment.read({**facts, "trainer": Experiment.quiet})
        check(experiment.config)
    assert not (found / "ran").exists()


def test_what_the_program_has_imported_is_its_own(found: Path) -> None:
    __import__("evil")
    (found / "ran").unlink()
    write(found, model=given("evil.ImageClassifier"))
    stranger.read_config(found / "config.yaml")  # the parser says what is wrong with it
    sys.modules.pop("evil")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi"))
        + "model: *i\n",
        "[" * 5000,
        "- a list",
        "model: {class_path: [a]}",
        "model: !!python/object/apply:os.system [touch ran]",
        "\x00\x01",
        "model: 3\ndata: x\n",
        "model: {class_path: ImageClassifier, init_args: [1]}",
    ],
    ids=["many laughs", "deep", "list", "list as a name", "python object", "binary", "numbers", "arguments as a list"],
)
def test_strange_configurations(found: Path, text: str) -> None:
    (found / "config.yaml").write_text(text)
    with pytest.raises(MMPEFTError):
        load_run(found)
    assert not (found / "ran").exists()


def test_a_split_is_read_and_not_written(found: Path) -> None:
    split = found / "elsewhere.json"
    data = FewShotData(DigitsData(), shots=1, split_file=str(split))
    with stranger.guarded(found / "config.yaml"):
        data.setup(None)  # type: ignore[arg-type]  # every stage
    assert not split.exists()
    data = FewShotData(DigitsData(), shots=1, split_file=str(split))
    data.setup(None)  # type: ignore[arg-type]  # every stage
    assert split.exists()
