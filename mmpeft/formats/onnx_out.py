"""Models for onnxruntime: the merged model, or the tuned one as it stands where a method cannot be merged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft._extras import needed_by
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.files import put_files, scratch_folder
from mmpeft.formats.merged import merged_copy
from mmpeft.surgery.attached import Attached
from mmpeft.types import Untyped

CLOSE = 1e-3
"""The largest difference of outputs, relative to the largest output."""
SMALL = 2**30
"""Bytes of weights that go into the file itself; more go into a second one beside it."""


def plain_or_tuned(tuning: Attached) -> nn.Module:
    """The merged model in its library's classes; the tuned one where the method is no change of weights."""
    try:
        return merged_copy(tuning).eval()
    except Refused:
        return tuning.model.eval()


@torch.no_grad()
def save_onnx(model: nn.Module, example: Tensor, path: Path, inputs: str = "images", output: str = "output") -> float:
    """Write a model of one input as ONNX, the batch of any size; return the largest difference in onnxruntime.

    Args:
        model: in evaluation mode.
        example: a batch [B, …] that it takes.
        path: of the file to write.
        inputs: name of the input.
        output: name of the output.

    Raises:
        MissingExtraError: `onnx`, `onnxscript` or `onnxruntime` is not installed.
        AdapterFileError: onnxruntime computes something else; nothing is written then.
    """
    with needed_by("ONNX", "onnx"):
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter asks for it
    batch = torch.export.Dim("batch", min=1, max=4096)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    many = torch.cat([example, example.flip(0)]) if len(example) < 2 else example
    with scratch_folder(path) as folder:
        file = folder / path.name
        torch.onnx.export(
            model,
            (many,),
            str(file),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=[inputs],
            output_names=[output],
            external_data=weights > SMALL,
            verbose=False,
        )
        session: Untyped = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        worst = 0.0
        for given in (many, many[:1], torch.cat([many, many[:1]])):
            (found,) = session.run(None, {inputs: given.numpy()})
            wanted = model(given)
            worst = max(
                worst, float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
            )
        if not worst < CLOSE:
            raise AdapterFileError(f"onnxruntime computes something else than {path.name} should: {worst:.1e} off")
        del session
        put_files(folder, path.parent, last=path.name)
    return worst
