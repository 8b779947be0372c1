"""What was tuned, for tools that know nothing of it: open_clip's folder, and class names as classifier weights."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.files import write_atomic
from mmpeft.formats.merged import merged_copy
from mmpeft.training.run import load_run
from mmpeft.tuning import Tuning
from mmpeft.vla.backbone import CONFIG, MODEL, folder_of, preprocessing
from mmpeft.vla.fewshot.heads import Head

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
WEIGHTS, NAMES = "classifier.safetensors", "classes.json"


def save_pair(tuning: Tuning, backbone: str, folder: str | Path) -> float:
    """Write the merged pair in open_clip's layout, for `open_clip.create_model("local-dir:<folder>")`.

    open_clip reads it back before it counts as written. Returned is the largest difference between unit features of
    the tuned model and of what was read back.

    Raises:
        Refused: a part is no change of weights. AdapterFileError: open_clip reads something else.
    """
    folder, source = Path(folder), folder_of(backbone)
    plain: Any = merged_copy(tuning)
    size, mean, std = preprocessing(plain)
    if source is not None:
        config = json.loads((source / CONFIG).read_text("utf-8"))
    else:
        config = {"model_cfg": open_clip.get_model_config(backbone.partition("/")[0])}
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), "mean": list(mean), "std": list(std)}
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in plain.state_dict().items()}
    write_atomic(folder / MODEL, save(tensors))
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    for name in TOKENIZER if source else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    back: Any = open_clip.create_model(f"local-dir:{folder}")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *size, generator=generator)
    text = torch.randint(1, plain.vocab_size - 1, (2, plain.context_length), generator=generator)
    training = tuning.model.training
    tuning.model.eval()
    with torch.no_grad():
        pairs = [
            (m.encode_image(image, normalize=True), m.encode_text(text, normalize=True))
            for m in (tuning.model.to("cpu"), back.eval())
        ]
    tuning.model.train(training)
    difference = max(float((a - b).abs().max()) for a, b in zip(*pairs))
    if not difference < 1e-4:
        (folder / MODEL).unlink()
        raise AdapterFileError(f"open_clip reads another model from {folder}: features differ by {difference:.1e}")
    return difference


@torch.no_grad()
def save_classifier(task: Any, folder: str | Path) -> float:
    """Write the text features of a task's classes, W [C, d] and their names: scores are `logit_scale · f Wᵀ`.

    Returned is the largest difference between scores by the file and by the task for random unit features.

    Raises:
        ConfigError: the scores of this head are no product with fixed weights.
    """
    folder = Path(folder)
    task.prepare()
    width = task.frozen_text.shape[1]
    if task.head.by_image or type(task.head).forward is not Head.forward:
        raise ConfigError(f"{type(task.head).__name__} is no product with fixed weights: nothing to write as such")
    text: Tensor = task.text_features(torch.zeros(1, width)).cpu()
    tensors = {"weight": text.contiguous(), "logit_scale": task.scale.cpu().reshape(1)}
    write_atomic(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomic(folder / NAMES, (json.dumps(task.classes, indent=1, ensure_ascii=False) + "\n").encode())
    kept = load_file(folder / WEIGHTS)
    probe = torch.nn.functional.normalize(torch.randn(8, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores = kept["logit_scale"] * probe @ kept["weight"].t()
    return float((scores - task(probe.to(task.device)).cpu()).abs().max())


def main(argv: Sequence[str] | None = None) -> int:
    """`mmpeft export-clip`: write a run's merged pair, and its class names as weights where it has some."""
    parser = argparse.ArgumentParser("mmpeft export-clip", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder or a .ckpt file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args((sys.argv[1:] if argv is None else list(argv))[1:])
    task: Any = load_run(options.checkpoint)[0]
    if not hasattr(task, "backbone") or not hasattr(task.model, "encode_text"):
        raise ConfigError(f"{options.checkpoint} is a run of {type(task).__name__}, which tunes no image-text pair")
    if task.method.mergeable:
        difference = save_pair(task.tuning, task.backbone, options.out)
        print(f"{options.out / MODEL}: read back by open_clip, features differ by {difference:.1e}")
    else:
        print(f"{task.method}: no change of weights, so no merged pair")
    if hasattr(task, "head"):
        difference = save_classifier(task, options.out)
        print(f"{options.out / WEIGHTS}: {len(task.classes)} classes, scores differ by {difference:.1e}")
    return 0
