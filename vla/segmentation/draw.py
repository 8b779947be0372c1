"""Masks laid over images, with the names of their classes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmpeft.files import png_of

TITLES = ("image", "truth", "prediction")


def overlays(images: Tensor, masks: Sequence[Tensor], classes: Sequence[str]) -> bytes:
    """A PNG: one row an image, the image first and then each set of masks over it.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        masks: class numbers [B, H, W] each; from len(classes) on no class.
        classes: names.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = colours_of(len(classes))
    titles = TITLES if len(masks) == 2 else ("image", "segments")
    side = 2.3 if len(images) > 1 else 4.5
    figure = Figure(figsize=(side * len(titles) + 1.8, side * len(images)), dpi=100, layout="constrained")
    cells = figure.subplots(len(images), len(titles), squeeze=False)
    shown: dict[int, None] = {}
    for row, image in enumerate(images.cpu().permute(0, 2, 3, 1)):
        panels = [image]
        for mask in masks:
            own = mask[row].cpu()
            inside = own < len(classes)
            shown.update(dict.fromkeys(own[inside].unique().tolist()))
            panels.append(
                torch.where(inside[..., None], 0.4 * image + 0.6 * colours[own.clamp(max=len(classes) - 1)], image)
            )
        for cell, panel, title in zip(cells[row], panels, titles):
            cell.imshow(panel.clamp(0, 1).numpy())
            cell.axis("off")
            if row == 0:
                cell.set_title(title, fontsize=10)
    if shown:
        handles = [Patch(color=tuple(colours[i].tolist()), label=classes[i]) for i in sorted(shown)]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return png_of(figure)


def index_png(mask: Tensor, classes: int) -> bytes:
    """Class numbers [H, W] below 256 as a PNG with a palette: the overlay's colours, black on no class."""
    image = Image.fromarray(mask.to(torch.uint8).cpu().numpy()).convert("P")
    image.putpalette([round(255 * value) for colour in colours_of(classes).tolist() for value in colour])
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def colours_of(classes: int) -> Tensor:
    """A colour in [0, 1] for each class, [C, 3]."""
    from matplotlib import colormaps

    return torch.tensor([colormaps["tab20"](i % 20)[:3] for i in range(classes)]).reshape(-1, 3)
