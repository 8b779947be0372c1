"""Writes what lies in this folder. Written by 0.1.0's main (16858b7); not to be run again except to add.

    python -m tests.compat.former.write <folder of this file> [name ...]

What is here already is left alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import mmpeft
from mmpeft.cli import main
from tests.compat.former.shown import images, outputs, reload, vit

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
TRAINER: dict[str, Any] = {
    "default_root_dir": "runs",
    "accelerator": "cpu",
    "max_epochs": 1,
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
PAIR = "embedded:clip_emoji"
DIGITS = {"class_path": "DigitsData", "init_args": {"batch_size": 4, "eval_batch_size": 4}}


def method(name: str, **fields: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": fields}


def run(task: str, data: Any, how: Any, **options: Any) -> dict[str, Any]:
    model = {"class_path": task, "init_args": {"optimizer": SGD, "warmup": 0.0, **options}}
    return {"model": model, "data": data, "method": how, "trainer": TRAINER, "seed_everything": 3}


RUNS = {
    "classification": run(
        "ImageClassifier",
        DIGITS,
        method("FishMask", density=0.0002, samples=4),
        backbone="embedded:vit_emoji",
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    ),
    "bias": run("ImageClassifier", DIGITS, method("BitFit", at="norm"), backbone="embedded:vit_emoji"),
    "segmentation": run(
        "Segmenter",
        method("SceneSegmentationData", scenes=4, eval_scenes=2, image_size=64, batch_size=2, eval_batch_size=2),
        method("LoRA", at="image:attn.q", rank=1),
        backbone=PAIR,
        decoder=method("CLIPSegDecoder", width=8, heads=2),
        template="a drawing of a {}",
        image_size=64,
    ),
    "questions": run(
        "VisualQuestions",
        method("SceneQuestionData", scenes=4, eval_scenes=2, image_size=64, batch_size=2, eval_batch_size=2),
        method("Houlsby", at="image:attn", bottleneck=1),
        backbone=PAIR,
        fusion=method("Fusion", width=8, depth=1, heads=2),
        image_size=64,
    ),
    "fewshot": run(
        "FewShot",
        method(
            "FewShotData",
            source=method("EmojiKinds", least=40, least_test=8, most=40, most_test=8),
            shots=1,
            batch_size=4,
            eval_batch_size=4,
        ),
        method("Union", methods=[method("CoOp", tokens=2), method("VPT", at="image:tokens", tokens=2)]),
        backbone=PAIR,
        templates=["a drawing of a {}"],
        views=1,
        consistency=method("Consistency"),
    ),
    "contrastive": run(
        "ContrastiveTuner",
        method("CaptionData", train="pairs.csv", val="pairs.csv", test="pairs.csv", batch_size=2, eval_batch_size=4),
        method("SSF", at="image:norm"),
        backbone=PAIR,
        tune_scale=True,
    ),
    "style": run(
        "StyleTuner",
        method("EmojiStyle", images=4, test_images=4, resolution=32, batch_size=2, eval_batch_size=2),
        method("DoRA", at="attn.q", rank=1),
        pipeline="embedded:unet_emoji",
        text_method=method("LoRA", at="attn.q", rank=1),
        show=method("Show", prompts=[], steps=2),
    ),
}

COMPARE = {
    "title": "two runs of a step",
    "metric": "test/accuracy",
    "seeds": [0],
    "axes": {"size": "data.init_args.batch_size"},
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {"backbone": "embedded:vit_emoji", "optimizer": SGD, "label_smoothing": 0.1},
    },
    "data": DIGITS,
    "trainer": {"max_steps": 1, "limit_val_batches": 0, "limit_test_batches": 1, "accelerator": "cpu"},
    "methods": {
        "LoRA": {"method": method("LoRA", at="attn.{q,v}", rank=1)},
        "probe": {"method": method("LinearProbe"), "lr": 0.1},
    },
}

CONTINUAL = {
    "title": "tasks of two classes and one",
    "seeds": [0],
    "run": {"backbone": "embedded:vit_emoji", "initial": 2, "increment": 1, "epochs": 1, "lr": 0.005},
    "data": {
        "class_path": "EmojiKinds",
        "init_args": {"style": "openmoji", "batch_size": 4, "least": 35, "least_test": 10, "most": 35, "most_test": 10},
    },
    "methods": {"O-LoRA": {"learner": method("OLoRA", method=method("LoRA", rank=1, alpha=1.0, at="attn.{q,v}"))}},
}

ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: mmpeft.LoRA(at="attn.{q,v}", rank=2),
    "dora": lambda: mmpeft.DoRA(at="mlp.*", rank=1),
    "bitfit": mmpeft.BitFit,
    "houlsby": lambda: mmpeft.Houlsby(bottleneck=2),
    "ssf": mmpeft.SSF,
    "ia3": mmpeft.IA3,
    "vpt": lambda: mmpeft.VPT(tokens=2, deep=True),
    "prefix": lambda: mmpeft.PrefixTuning(tokens=2, hidden=4),
    "lokr": lambda: mmpeft.LoKr(at="attn.*", rank=1),
    "mask": lambda: mmpeft.RandomMask(density=0.01),
    "union": lambda: mmpeft.LoRA(at="attn.q", rank=1) + mmpeft.BitFit(at="norm") + mmpeft.LinearProbe(),
}


def pairs() -> None:
    """Four pictures with texts."""
    rows = ["image,text"]
    for i, text in enumerate(("a red apple", "a blue car", "a green tree", "a grey house")):
        Image.new("RGB", (8, 8), ((200, 30, 30), (30, 30, 200), (30, 160, 30), (90, 90, 90))[i]).save(f"{i}.png")
        rows.append(f"{i}.png,{text}")
    Path("pairs.csv").write_text("\n".join(rows) + "\n")


def fit(name: str) -> None:
    """One run by the command line, without what no test looks at, and its outputs."""
    Path("fit.yaml").write_text(yaml.safe_dump(RUNS[name]))
    assert main(["fit", "-c", "fit.yaml", "--name", name]) == 0
    Path("fit.yaml").unlink()
    made, kept = Path("runs") / name / "version_0", Path("kept") / name
    kept.parent.mkdir(exist_ok=True)
    made.rename(kept)
    shutil.rmtree("runs")
    for path in kept.iterdir():
        if path.name not in ("config.yaml", "checkpoints", "adapter"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_file(outputs(*reload(kept)), kept / "outputs.safetensors")


def compare() -> None:
    """A comparison of two runs."""
    Path("compare.yaml").write_text(yaml.safe_dump(COMPARE))
    assert main(["compare", "-c", "compare.yaml", "--out", "compare", "--size", "2"]) == 0
    for name in ("plot.png", "table.md", "results.csv"):
        Path("compare", name).unlink()


def continual() -> None:
    """A sequence of tasks after the first of them."""
    from mmpeft.vision.continual import runner

    class Interrupted(Exception):
        pass

    measured = runner.ContinualClassifier._measured

    def first(self: Any, task: Any) -> Any:
        if task.number:
            raise Interrupted
        return measured(self, task)

    Path("continual.yaml").write_text(yaml.safe_dump(CONTINUAL))
    for name in ("whole", "begun"):
        if name == "begun":
            runner.ContinualClassifier._measured = first  # type: ignore[method-assign]
        try:
            assert main(["continual", "-c", "continual.yaml", "--out", f"continual/{name}"]) == 0
        except Interrupted:
            continue
        finally:
            runner.ContinualClassifier._measured = measured  # type: ignore[method-assign]
    for path in Path("continual/whole").iterdir():
        if path.name != "results.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def adapters() -> None:
    """Adapters of a tiny ViT, every tensor moved, and what the tuned model says."""
    folder = Path("adapters")
    folder.mkdir()
    torch.manual_seed(0)
    base = vit()
    save_file(base.state_dict(), folder / "base.safetensors")
    said = {"base": base(images())}
    for name, make in ADAPTERS.items():
        model = vit()
        model.load_state_dict(base.state_dict())
        how = make()
        tuning = mmpeft.attach(model, how)
        generator = torch.Generator().manual_seed(1)
        for parameter in tuning.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        tuning.save(folder / name)
        said[name] = model.eval()(images())
    save_file({name: value.detach() for name, value in said.items()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    place, *wanted = sys.argv[1:]
    os.chdir(place)
    steps: dict[str, Callable[[], None]] = {
        "pairs.csv": pairs,
        "adapters": adapters,
        "compare": compare,
        "continual": continual,
        **{f"kept/{name}": (lambda name=name: fit(name)) for name in RUNS},  # type: ignore[misc]
    }
    for step, write in steps.items():
        if not Path(step).exists() and (not wanted or step in wanted):
            write()
