"""Pictures with the classes they were given."""

from __future__ import annotations

from collections.abc import Sequence

from mmpeft.files import png_of


def labelled(pictures: Sequence[object], rows: Sequence[Sequence[tuple[str, float]]]) -> bytes:
    """A PNG of pictures in a grid, each over bars of its best classes.

    Args:
        pictures: PIL images.
        rows: for each, `(class, probability)` from the best down.
    """
    from matplotlib.figure import Figure

    columns = min(len(pictures), 4)
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(3 * columns, 3.9 * lines), dpi=110, layout="constrained")
    cells = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3, 1] * lines)
    for cell in cells.flat:
        cell.axis("off")
    for number, (picture, row) in enumerate(zip(pictures, rows)):
        line, column = divmod(number, columns)
        cells[2 * line, column].imshow(picture)
        bars = cells[2 * line + 1, column]
        bars.axis("on")
        names, values = zip(*reversed(row))
        bars.barh(range(len(row)), values, color="tab:blue", alpha=0.5)
        bars.set(xlim=(0, 1), yticks=[], xticks=[])
        for place, (name, value) in enumerate(zip(names, values)):
            bars.text(0.02, place, f"{name}  {value:.2f}", va="center", fontsize=8)
    return png_of(figure)
