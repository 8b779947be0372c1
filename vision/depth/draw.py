"""Images beside their depth."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmpeft.files import png_of


def depth_png(images: Tensor, maps: Mapping[str, Tensor]) -> bytes:
    """A PNG: a row for each image [B, 3, H, W] in [0, 1], beside it its depth [B, 1, H, W] of each kind."""
    from matplotlib.figure import Figure

    titles = ["image", *maps]
    figure = Figure(figsize=(2.3 * len(titles) + 0.8, 2.3 * len(images)), dpi=100, layout="constrained")
    cells = figure.subplots(len(images), len(titles), squeeze=False)
    near, far = (float(end) for end in next(iter(maps.values())).aminmax())
    for row, image in enumerate(images.cpu().permute(0, 2, 3, 1)):
        cells[row][0].imshow(image.numpy())
        for cell, depth in zip(cells[row][1:], maps.values()):
            shown = cell.imshow(depth[row, 0].float().cpu().numpy(), cmap="magma_r", vmin=near, vmax=far)
        for cell, title in zip(cells[row], titles):
            cell.axis("off")
            if row == 0:
                cell.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=cells[:, 1:], label="depth", fraction=0.03)
    return png_of(figure)
