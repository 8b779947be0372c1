"""Pack emoji drawings into the package data of `mmpeft.embedded`.

    python -m mmpeft.embedded.build_emoji emoji64.npz emoji.json [--out mmpeft/embedded/data]

`emoji64.npz` holds one uint8 array `[n, 64, 64, 4]` (RGBA) for each drawing style; `emoji.json` is a list of n rows
`{unified, name, names, category, subcategory}` in the same order. The sheets are lossless; under fully transparent
pixels the colour is set to zero, because it cannot be seen and would only cost bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmpeft.errors import DataError
from mmpeft.types import Json

COLUMNS = 48
SIZE = 64
MAX_BYTES = 4 * 2**20
DROPPED_CATEGORY = "Component"  # the five skin-tone swatches: colours, not drawings of something

# Man, woman and adult (boy, girl and child) are one figure with another haircut; signs and arrows turn it.
_FIGURE = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_MODIFIERS = {"200D", "FE0F", "2640", "2642", "27A1", "2194", "2195"}


def figure(unified: str, subcategory: str) -> str:
    """Return a key shared by the drawings that differ only in gender or direction."""
    if subcategory == "family":
        return "family"
    return "-".join(_FIGURE.get(code, code) for code in unified.split("-") if code not in _MODIFIERS)


def kin(rows: list[Json], sheets: dict[str, npt.NDArray[np.uint8]]) -> list[int]:
    """Group emoji that must share a split: same figure, or the same pixels in some style. Returns [n] group ids."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    keys = [[figure(row["unified"], row["subcategory"]) for row in rows]]
    keys += [[image.tobytes().hex() for image in images] for images in sheets.values()]
    for column in keys:
        first: dict[str, int] = {}
        for i, key in enumerate(column):
            low, high = sorted((root(i), root(first.setdefault(key, i))))
            parent[high] = low
    return [root(i) for i in range(len(rows))]


def grid(images: npt.NDArray[np.uint8]) -> Image.Image:
    """Lay `[n, 64, 64, 4]` out row by row in a sheet of 48 columns."""
    rows = -(-len(images) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
    padded[: len(images)] = images
    sheet = padded.reshape(rows, COLUMNS, SIZE, SIZE, 4).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * SIZE, COLUMNS * SIZE, 4), "RGBA")


def write_sheets(style: str, images: npt.NDArray[np.uint8], out: Path) -> list[int]:
    """Write `<style>-<k>.webp`, each below 4 MiB, and return how many emoji each sheet holds."""
    for pieces in range(1, len(images)):
        files = []
        for k, part in enumerate(np.array_split(images, pieces)):
            path = out / f"{style}-{k}.webp"
            grid(part).save(path, lossless=True, method=6, exact=True)
            files.append((path, len(part)))
        if max(path.stat().st_size for path, _ in files) < MAX_BYTES:
            return [count for _, count in files]
    raise DataError(f"No split of style {style!r} gives sheets below {MAX_BYTES} bytes.")


def main() -> None:
    """Read the two files named on the command line and write the sheets and their index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    kept = [i for i, row in enumerate(rows) if row["category"] != DROPPED_CATEGORY]
    rows = [rows[i] for i in kept]
    with np.load(args.npz) as arrays:
        sheets = {style: arrays[style][kept] for style in arrays.files}
    for images in sheets.values():
        images[images[..., 3] == 0] = 0
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {style: write_sheets(style, images, args.out) for style, images in sheets.items()}
    classes = sorted({row["category"] for row in rows})
    subclasses = sorted({row["subcategory"] for row in rows})
    index = {
        "sheets": counts,
        "classes": classes,
        "subcategories": subclasses,
        "unified": [row["unified"] for row in rows],
        "names": [row["name"] for row in rows],
        "keywords": [row["names"] for row in rows],
        "labels": [classes.index(row["category"]) for row in rows],
        "sublabels": [subclasses.index(row["subcategory"]) for row in rows],
        "kin": kin(rows, sheets),
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    (args.out / "emoji.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
