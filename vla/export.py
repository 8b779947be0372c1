"""What was tuned, for tools that know nothing of it: open_clip's folder, and class names as classifier weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
from safetensors.torch import load_file, save
from timm.layers import to_2tuple
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused
from mmpeft.files import write_atomic
from mmpeft.formats.merged import merged_copy
from mmpeft.formats.onnx_out import plain_or_tuned, save_onnx
from mmpeft.run.exports import task_of
from mmpeft.tuning import Tuning
from mmpeft.types import AnyModule
from mmpeft.vla.backbone import CONFIG, MODEL, described, folder_of, preprocessing
from mmpeft.vla.fewshot.heads import Head
from mmpeft.vla.fewshot.task import FewShot

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
WEIGHTS, NAMES = "classifier.safetensors", "classes.json"


def save_pair(tuning: Tuning, backbone: str, folder: str | Path) -> float:
    """Write the merged pair in open_clip's layout, for `open_clip.create_model("local-dir:<folder>")`.

    open_clip reads it back before it is put into place. Returned is the largest difference between unit features of
    the tuned model and of what was read back.

    Raises:
        Refused: a part is no change of weights, or the image tower is of a size that open_clip does not build.
        AdapterFileError: open_clip reads something else.
    """
    folder, source = Path(folder), folder_of(backbone)
    plain: AnyModule = merged_copy(tuning)
    wanted = preprocessing(plain)
    (size, mean, std), resizing = wanted, wanted.resizing
    config = json.loads((source / CONFIG).read_text("utf-8")) if source else {"model_cfg": described(backbone)}
    vision = config["model_cfg"]["vision_cfg"]
    own = to_2tuple(vision.get("image_size", 224))
    if size != own and "timm_model_name" in vision:
        raise Refused(
            f"the image tower was tuned at {size} pixels; open_clip builds those of timm at their own {own} alone, "
            "whose position embeddings are others. Export a run that leaves image_size out"
        )
    config["model_cfg"]["vision_cfg"] = {**vision, "image_size": size[0] if size[0] == size[1] else list(size)}
    config["preprocess_cfg"] = {
        **config.get("preprocess_cfg", {}),
        **{"mean": list(mean), "std": list(std)},
        **{"resize_mode": resizing.mode, "interpolation": resizing.interpolation, "fill_color": resizing.fill},
    }
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in plain.state_dict().items()}
    with TemporaryDirectory() as trial:
        new = Path(trial)
        (new / MODEL).write_bytes(save(tensors))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for file in [source / name for name in TOKENIZER] if source else ():
            if file.is_file():
                shutil.copyfile(file, new / file.name)
        difference = _difference(tuning, new, folder)
        for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG):  # what makes it a pair comes last
            write_atomic(folder / file.name, file.read_bytes())
    return difference


def _difference(tuning: Tuning, folder: Path, target: Path) -> float:
    """Between the features of a tuned pair and of what open_clip reads from a folder."""
    try:
        back: AnyModule = open_clip.create_model(f"local-dir:{folder}")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterFileError(f"open_clip does not read what would be in {target}: {reason}") from error
    model: AnyModule = tuning.model.to("cpu")
    size = preprocessing(model)[0]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *size, generator=generator)
    text = torch.randint(1, model.vocab_size - 1, (2, model.context_length), generator=generator)
    training = model.training
    model.eval()
    with torch.no_grad():
        pairs = [
            (m.encode_image(image, normalize=True), m.encode_text(text, normalize=True)) for m in (model, back.eval())
        ]
    model.train(training)
    difference = max(float((a - b).abs().max()) for a, b in zip(*pairs))
    if not difference < 1e-4:
        raise AdapterFileError(
            f"open_clip reads another model than would be in {target}: features differ by {difference:.1e}"
        )
    return difference


@torch.no_grad()
def save_classifier(task: FewShot, folder: str | Path) -> float:
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


def to_open_clip(options: argparse.Namespace) -> None:
    """A run's merged pair, and its class names as weights where it has some."""
    task = _pair_of(options)
    if task.method.mergeable:
        difference = save_pair(task.tuning, task.backbone, options.out)
        print(f"{options.out / MODEL}: read back by open_clip, features differ by {difference:.1e}")
    else:
        print(f"{task.method}: no change of weights, so no merged pair")
    if hasattr(task, "head"):
        try:
            difference = save_classifier(task, options.out)
        except ConfigError as reason:
            print(f"no {WEIGHTS}: {reason}")
        else:
            print(f"{options.out / WEIGHTS}: {len(task.classes)} classes, scores differ by {difference:.1e}")


def to_onnx(options: argparse.Namespace) -> None:
    """Both towers for onnxruntime: unit features of images, and of token numbers."""
    pair: AnyModule = plain_or_tuned(_pair_of(options).prepare())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *preprocessing(pair)[0], generator=generator)
    words = torch.randint(1, pair.vocab_size - 1, (2, pair.context_length), generator=generator)
    for name, given in (("image", images), ("text", words)):
        path = options.out / f"{name}.onnx"
        difference = save_onnx(_Tower(pair, name), given, path, inputs="images" if name == "image" else "tokens")
        print(f"{path}: unit features [B, d]; read by onnxruntime, they differ by {difference:.1e}")


class _Tower(nn.Module):
    """One tower of a pair as a module of one input."""

    def __init__(self, pair: AnyModule, name: str) -> None:
        super().__init__()
        self.pair, self.name = pair, name

    def forward(self, given: Tensor) -> Tensor:
        features: Tensor = getattr(self.pair, f"encode_{self.name}")(given, normalize=True)
        return features


def _pair_of(options: argparse.Namespace) -> AnyModule:
    task: AnyModule = task_of(options)
    if not hasattr(task, "backbone") or not hasattr(task.model, "encode_text"):
        raise ConfigError(f"{options.source} is a run of {type(task).__name__}, which tunes no image-text pair")
    return task
