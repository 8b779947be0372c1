"""Merged models and ONNX graphs in the hands of timm, open_clip, diffusers and onnxruntime, as a table.

    python -m benchmarks.readers.libraries [--write docs/readers.md]

Each library reads what was written by its own functions and answers the same input; a number is how far its answer is
from the tuned model's, as ‖theirs - ours‖ / ‖ours - base's‖.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmpeft
from benchmarks.readers.page import put
from mmpeft.errors import MMPEFTError

EXACT = 1e-3
START, END = "<!-- libraries: python -m benchmarks.readers.libraries -->", "<!-- end of libraries -->"
METHODS: dict[str, mmpeft.Method] = {
    "LoRA": mmpeft.LoRA(rank=4),
    "DoRA": mmpeft.DoRA(rank=4),
    "BitFit": mmpeft.BitFit(create=False),
    "full": mmpeft.Full(),
    "AdaptFormer": mmpeft.AdaptFormer(bottleneck=4),
    "VPT": mmpeft.VPT(tokens=4),
}
VIT = "vit_tiny_patch16_224"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2},
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


class Part(nn.Module):
    """One answer of a model, by positional inputs alone, as exporters want it."""

    def __init__(self, model: Any, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.answer(self.model, *inputs)


@dataclass(frozen=True)
class Kind:
    """A model, its library's readers of a merged file or folder, and its answers by name."""

    build: Callable[[], nn.Module]
    readers: dict[str, Callable[[Path], nn.Module]]
    answers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def kinds(folder: Path) -> dict[str, Kind]:
    """The models of the table; open_clip reads a configuration from `folder`."""
    import open_clip
    import timm
    from diffusers import UNet2DConditionModel

    (folder / "tiny-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    known = {"num_classes": SIZE["num_classes"]}
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    latents, texts = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    words = torch.randint(1, 60, (2, 8), generator=generator)
    return {
        "ViT": Kind(
            lambda: timm.create_model(VIT, **SIZE),
            {
                "timm, `checkpoint_path`": lambda file: timm.create_model(VIT, **SIZE, checkpoint_path=str(file)),
                "timm, `pretrained_cfg_overlay`": lambda file: timm.create_model(
                    VIT, **SIZE, pretrained=True, pretrained_cfg_overlay={"file": str(file), **known}
                ),
            },
            {"": (lambda model, x: model(x), (images,))},
        ),
        "CLIP": Kind(
            lambda: open_clip.create_model("tiny-clip"),
            {"open_clip, `pretrained`": lambda file: open_clip.create_model("tiny-clip", pretrained=str(file))},
            {
                "images": (lambda model, x: model.encode_image(x), (images,)),
                "texts": (lambda model, x: model.encode_text(x), (words,)),
            },
        ),
        "UNet": Kind(
            lambda: UNet2DConditionModel(**UNET),
            {"diffusers, `from_pretrained`": lambda folder: UNet2DConditionModel.from_pretrained(folder)},
            {"": (lambda model, x, t, c: model(x, t, c).sample, (latents, torch.tensor([3, 7]), texts))},
        ),
    }


MERGED, IN_PLACE = "onnxruntime, merged", "onnxruntime, adapter in place"


def row(kind: Kind, method: mmpeft.Method, folder: Path) -> dict[str, str]:
    """What each reader makes of one tuning; empty if the method does not attach."""
    torch.manual_seed(0)
    model = kind.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    before = answered(model, kind)
    try:
        tuning = mmpeft.attach(model, method)
    except MMPEFTError:
        return {}
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    model.eval()
    wanted = answered(model, kind)
    single = any(reader.startswith(("timm", "open_clip")) for reader in kind.readers)
    place = folder / ("model.safetensors" if single else "model")
    found = {}
    try:
        tuning.save_merged(place)
        for name, read in kind.readers.items():
            found[name] = judged(before, wanted, lambda read=read: answered(read(place).eval(), kind))
    except MMPEFTError as error:
        found |= dict.fromkeys(kind.readers, f"not written: {error}")
    found[IN_PLACE] = judged(before, wanted, lambda: run(model, kind, folder))
    try:
        tuning.merge()
    except MMPEFTError as error:
        return found | {MERGED: f"not written: {error}"}
    return found | {MERGED: judged(before, wanted, lambda: run(model, kind, folder))}


@torch.no_grad()
def answered(model: nn.Module, kind: Kind) -> dict[str, Tensor]:
    return {name: answer(model, *inputs) for name, (answer, inputs) in kind.answers.items()}


def run(model: nn.Module, kind: Kind, folder: Path) -> dict[str, Tensor]:
    """The answers of onnxruntime on what torch exports of a model."""
    import onnxruntime

    found = {}
    for name, (answer, inputs) in kind.answers.items():
        file = folder / f"{name}.onnx"
        torch.onnx.export(Part(model, answer).eval(), inputs, str(file), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        given = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
        found[name] = torch.from_numpy(session.run(None, given)[0])
    return found


def judged(before: dict[str, Tensor], wanted: dict[str, Tensor], read: Callable[[], dict[str, Tensor]]) -> str:
    """`exact`, how far an answer is off, or what the reader refuses."""
    try:
        got = read()
    except Exception as error:  # whatever a library raises is its refusal
        return f"refused: {type(error).__name__} {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    errors = [float((got[n] - y).norm() / (y - before[n]).norm()) for n, y in wanted.items() if (y != before[n]).any()]
    worst = max(errors)
    return "exact" if worst < EXACT else f"{worst:.2g}"


def page(only: Sequence[str] = ()) -> str:
    """The whole section."""
    packages = ("timm", "open_clip_torch", "diffusers", "onnxruntime", "torch")
    lines = [START, "", f"Run on {datetime.date.today()} with {', '.join(f'{n} {version(n)}' for n in packages)}."]
    lines += ["A number is the relative error of the change of the answer.", ""]
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in kinds(Path(scratch)).items():
            columns = [*kind.readers, MERGED, IN_PLACE]
            lines += [f"### {name}", "", f"| |{'|'.join(columns)}|", "|---|" + "---|" * len(columns)]
            said: dict[str, None] = {}
            for method in only or METHODS:
                with tempfile.TemporaryDirectory() as folder:
                    found = row(kind, METHODS[method], Path(folder))
                if found:
                    lines.append(f"|{method}|{'|'.join(found[column].partition(':')[0] for column in columns)}|")
                    said |= {f"{method}: {cell}": None for cell in found.values() if ":" in cell}
                    print(name, method, found, file=sys.stderr)
            lines += ["", *(f"- {sentence.replace('|', '/')}" for sentence in said), ""]
    return "\n".join([*lines, END]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser("python -m benchmarks.readers.libraries", description=__doc__)
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    text = page()
    if options.write:
        put(text, options.write)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
