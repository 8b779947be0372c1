"""The command line: fast help, composition of configs, resuming, and what bad input gets."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler must hold the real stderr, not one that a test captures)
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import mmpeft
from mmpeft.cli import COMMANDS, main
from mmpeft.methods import METHODS
from mmpeft.methods.base import Method
from mmpeft.run.callbacks import LearningCurves
from mmpeft.run.reload import load_run

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = {
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {
            "backbone": "vit_tiny_patch16_224",
            "pretrained": False,
            "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
    },
    "data": {"class_path": "tests.tasks.tiny.TinyData"},
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working folder with `tiny.yaml` and `lora.yaml`; returns the arguments that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmpeft"])
    for name in ("lightning.pytorch", "lightning.fabric"):  # their handlers hold a stream that pytest has closed
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "lora.yaml").write_text((CONFIGS / "method" / "lora.yaml").read_text())
    return ["-c", "tiny.yaml", "-c", "lora.yaml"]


def test_a_run_on_random_weights_is_read_back_on_the_same(tiny, monkeypatch):
    base = {}

    def look(self, trainer, module):
        base.update({name: tensor.clone() for name, tensor in module.model.state_dict().items()})

    monkeypatch.setattr(LearningCurves, "on_train_start", look)
    main(["fit", *tiny])
    before = torch.get_rng_state()
    task, _ = load_run("runs/TinyData-LoRA")
    assert torch.equal(torch.get_rng_state(), before)
    found = task.model.state_dict()
    frozen = [name for name in base if ".mmpeft." not in name]
    assert frozen
    assert all(torch.equal(found[name], base[name]) for name in frozen)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--method", "DoRA"], {"at": "conv", "rank": 16}),
        (["--method=LoKr", "--method.rank", "4"], {"at": "conv", "rank": 4}),
        (["--method", "DiffFit"], {"at": ""}),
        (["-c", str(CONFIGS / "method" / "difffit.yaml")], {"at": ""}),
        (["--method", "BitFit", "--method.at", "norm"], {"at": "norm"}),
        (["--method", "LoRA"], {"at": "conv", "rank": 16}),
    ],
)
def test_another_kind_of_method_starts_afresh(tiny, more, expected, capsys):
    Path("of.yaml").write_text("method: {class_path: LoRA, init_args: {at: conv, rank: 16}}")
    with pytest.raises(SystemExit):
        main(["fit", "-c", "tiny.yaml", "-c", "of.yaml", *more, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]
    assert {name: found[name] for name in expected} == expected


def fails(arguments, capsys) -> str:
    """Run a command that must end with exit code 2 and no traceback; return its error."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    shown = capsys.readouterr().err
    assert "error: " in shown
    assert "Traceback" not in shown
    return shown


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mmpeft.cli import main; assert main(['--help']) == 0; assert main(['--version']) == 0\n"
        "heavy = {'torch', 'lightning', 'numpy', 'timm', 'jsonargparse', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert mmpeft.__version__ in done.stdout


def test_help_of_commands_imports_nothing_heavy():
    """All but three, which read names of models and formats from torch's own modules: those take two seconds."""
    from mmpeft.run.commands import FORMER, all_commands

    quick = sorted({*all_commands(), *FORMER} - {"inspect", "convert", "sites"})
    code = (
        "import sys; from mmpeft.cli import main\n"
        f"for name in {quick!r}:\n"
        "    try: assert main([name, '--help']) == 0, name\n"
        "    except SystemExit as done: assert done.code == 0, name\n"
        "    heavy = {'torch', 'lightning', 'timm', 'jsonargparse'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") >= len(quick)


def needed(field: Field) -> bool:
    """Whether a field of a method has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def test_every_method_has_a_config_with_its_own_defaults():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_subclass_arguments(Method, "method")
    found = {}
    for file in sorted((CONFIGS / "method").glob("*.yaml")):
        assert file.stem == file.stem.lower()
        found[file.stem] = parser.instantiate_classes(parser.parse_args([f"--config={file}"])).method
    asked = {name for name, cls in METHODS.items() if any(needed(f) for f in fields(cls))}
    assert "Plan" in asked, "a plan is a user's own file: no config can name it"
    assert {type(method).__name__ for method in found.values()} == set(METHODS) - asked
    assert found["vpt_deep"].deep
    assert not found["vpt"].deep
    assert found["lora"] == mmpeft.LoRA()
    assert found["dora"] == mmpeft.DoRA()


@pytest.mark.parametrize("file", sorted((CONFIGS / "vision").glob("*.yaml")), ids=lambda file: file.stem)
def test_vision_configs_parse(file, monkeypatch, capsys):
    if "\nmethods:" in file.read_text():
        pytest.skip("a configuration of `mmpeft compare`")
    monkeypatch.setattr(sys, "argv", ["mmpeft"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(file), "-c", str(CONFIGS / "method" / "bitfit.yaml"), "--print_config"])
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    config = yaml.safe_load(shown.out)
    assert config["method"]["class_path"].endswith("BitFit")
    assert config["model"]["init_args"]["backbone"]


def test_fit_resume_test_predict_share_one_folder(tiny, tmp_path, capsys):
    steps = ["--checkpoint.every_n_train_steps", "2", "--name", "demo"]
    assert main(["fit", *tiny, "--method.rank", "3", *steps]) == 0
    folder = tmp_path / "runs" / "demo" / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["method"]["init_args"]["rank"] == 3
    assert {"adapter", "checkpoints", "curves.csv", "curves.png", "val_classes.csv"} <= {
        p.name for p in folder.iterdir()
    }
    assert any(folder.glob("events.out.tfevents.*"))
    assert "Outcome" in capsys.readouterr().out

    more = ["--method.rank", "3", "--name", "demo", "--ckpt_path", "last"]
    assert main(["fit", *tiny, *more, "--trainer.max_epochs", "2"]) == 0
    assert [row["epoch"] for row in csv.DictReader((folder / "curves.csv").open())] == ["0", "1"]
    assert main(["validate", *tiny, *more]) == 0
    assert main(["test", *tiny, *more]) == 0
    assert main(["predict", *tiny, *more]) == 0
    assert len(list(csv.DictReader((folder / "predictions.csv").open()))) == 10
    assert [p.name for p in folder.parent.iterdir()] == ["version_0"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert (folder / "test_classes.csv").exists()

    error = fails(["test", *tiny, "--name", "demo", "--ckpt_path", "last", "--method", "BitFit"], capsys)
    assert "another method" in error


def test_a_method_by_name_replaces_that_of_a_config(tiny, tmp_path):
    assert main(["fit", *tiny, "--method", "BitFit", "--trainer.fast_dev_run", "true"]) == 0
    arguments = ["--method", "VPT", "--method.deep", "true", "--trainer.precision", "bf16-mixed"]
    assert main(["fit", "-c", "tiny.yaml", *arguments, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "LoRAA"], "Did you mean 'LoRA'"),
        (["--method.rnak", "3"], "Did you mean 'rank'"),
        (["--method.rank", "-1"], "rank must be positive"),
        (["--method.rank", "many"], "many"),
        (["--method.at", "attn.qq"], "Did you mean 'attn.q'"),
        (["--model", "ImageClasifier"], "Did you mean 'ImageClassifier'"),
        (["--model.backbone", "vit_tinny_patch16_224"], "Did you mean 'vit_tiny_patch16_224'"),
        (["--model.label_smooting", "0.1"], "Did you mean 'label_smoothing'"),
        (["--trainer.max_epoch", "3"], "max_epochs"),
        (["-c", "missing.yaml"], "missing.yaml"),
        (["-c", "bad_section.yaml"], "Did you mean 'trainer.max_epochs'"),
        (["-c", "bad_key.yaml"], "max_epochs"),
        (["-c", "bad_field.yaml"], "Did you mean 'rank'"),
        (["-c", "broken.yaml"], "broken.yaml"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_names_the_remedy(tiny, tmp_path, capsys, arguments, words):
    (tmp_path / "bad_section.yaml").write_text("trainr: {max_epochs: 1}\n")
    (tmp_path / "bad_key.yaml").write_text("trainer: {max_epoch: 1}\n")
    (tmp_path / "bad_field.yaml").write_text("method: {class_path: LoRA, init_args: {rnk: 1}}\n")
    (tmp_path / "broken.yaml").write_text("method: [\n")
    assert words in fails(["fit", *tiny, "--trainer.logger", "false", *arguments], capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_missing_pieces_are_named(tiny, capsys):
    assert "--method LoRA" in fails(["fit", "-c", "tiny.yaml", "--trainer.logger", "false"], capsys)
    assert "run `mmpeft fit` first" in fails(["predict", *tiny, "--ckpt_path", "last"], capsys)
    assert "Did you mean 'fit'" in fails(["fitt"], capsys)


def test_methods_are_listed(capsys):
    assert main(["methods", "*lora*"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA" in shown
    assert "BitFit" not in shown
    assert "Did you mean" in fails(["methods", "*loraa*"], capsys)
