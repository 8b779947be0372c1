"""Images with a question each and what was answered."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from torch import Tensor


def answered(images: Tensor, lines: Sequence[tuple[str, str, str]]) -> bytes:
    """A PNG of images [B, 3, H, W] in [0, 1] over `(question, truth, answer)`; wrong answers are red."""
    from matplotlib.figure import Figure

    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.3 * rows), dpi=100, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for cell in cells.flat:
        cell.axis("off")
    for cell, image, (question, truth, answer) in zip(cells.flat, images.cpu(), lines):
        cell.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
        wrong = bool(truth) and truth != answer
        said = f"{answer} (it is {truth})" if wrong else answer
        cell.set_title(textwrap.fill(question, 28), fontsize=9)
        cell.text(
            0.5, -0.04, said, transform=cell.transAxes, ha="center", va="top", color="tab:red" if wrong else "black"
        )
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
