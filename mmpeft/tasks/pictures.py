"""Pictures side by side, each with a few words: what tasks and comparisons show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmpeft.files import png_of

LONGEST = 18
SMALL = 32
"""Pixels below which a picture is enlarged smoothly, as models are given it: as squares it would not be recognised."""


def picture_grid(
    images: Sequence[Tensor] | Tensor,
    titles: Sequence[str],
    below: Mapping[str, Sequence[str]] = {},
    heading: str = "",
    columns: int = 8,
) -> bytes:
    """A PNG of images [3, H, W], uint8 or float in [0, 1], each under its title.

    Args:
        images: of any sizes.
        titles: one for each image.
        below: lines under the images, by colour: one for each image.
        heading: of the whole picture.
        columns: images in a row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    height = 1.5 * rows + 0.15 * len(below) * rows + (0.35 if heading else 0)
    figure = Figure(figsize=(1.3 * columns, height), dpi=110, layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for cell in cells:
        cell.axis("off")
    for number, (cell, image, title) in enumerate(zip(cells, images, titles)):
        smooth = "bilinear" if max(image.shape[1:]) < SMALL else "nearest"
        cell.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation=smooth)
        cell.set_title(_short(title), fontsize=7 if not below else 9)
        for line, (colour, words) in enumerate(below.items()):
            where = {"xy": (0.5, 0), "xytext": (0, -3 - 10 * line), "textcoords": "offset points"}
            place = {"xycoords": "axes fraction", "ha": "center", "va": "top"}
            cell.annotate(_short(words[number]), **where, **place, color=colour, fontsize=7.5)
    if heading:
        figure.suptitle(heading, fontsize=10)
    return png_of(figure)


def _short(text: str) -> str:
    return text if len(text) < LONGEST else f"{text[: LONGEST - 2]}…"
