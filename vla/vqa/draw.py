"""Images with a question each and what was answered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from torch import Tensor

from mmpeft.files import png_of

LINE = 26
"""Characters in a line over an image."""


def answered(images: Tensor | Sequence[Tensor], lines: Sequence[tuple[str, str, str]]) -> bytes:
    """A PNG: over each image its question, under it the answer, in red with the truth where that is another.

    Args:
        images: float [3, H, W] each, in [0, 1].
        lines: `(question, truth, answer)` of each; an empty truth is one that nobody knows.
    """
    from matplotlib.figure import Figure

    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.5 * columns, 3.1 * rows), dpi=100, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for cell in cells.flat:
        cell.axis("off")
    for cell, image, (question, truth, answer) in zip(cells.flat, images, lines):
        cell.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy())
        cell.set_title(textwrap.fill(question, LINE), fontsize=9)
        wrong = bool(truth) and truth != answer
        said = f"{answer} (it is {truth})" if wrong else answer
        colour = "tab:red" if wrong else "tab:green" if truth else "black"
        place = {"transform": cell.transAxes, "ha": "center", "va": "top"}
        cell.text(0.5, -0.03, textwrap.fill(said, LINE), color=colour, fontsize=10, fontweight="bold", **place)
    return png_of(figure)
