"""Folders, tables, shards and data sets of small pictures with captions, and loaders over them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data.sampling import ResumableLoader
from mmpeft.diffusion.data import CaptionedImages
from mmpeft.errors import DataError

TEXTS = ["a cat", "a red car", "a tree"]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def images(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 80),) * 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes)):
        noise(*size, seed=i).save(path)
    return paths


def captioned(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 80),) * 3) -> Path:
    for i, path in enumerate(images(folder, sizes)):
        path.with_suffix(".txt").write_text(TEXTS[i] if i < len(TEXTS) else f"picture {i}")
    return folder


def metadata(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def listed(folder: Path) -> Path:
    paths = images(folder)
    return metadata(folder, [{"file_name": path.name, "text": text} for path, text in zip(paths, TEXTS)])


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path) -> str:
    folder.mkdir()
    first = {"./v1.0/0.png": encoded(noise(80, 80, 0)), "./v1.0/0.txt": b"a cat\n"}
    second = {
        "1.png": encoded(noise(80, 80, 1)),
        "1.json": b'{"text": "a red car"}',
        "2.png": encoded(noise(80, 80, 2)),
        "2.txt": b"a tree",
        "2.json": b'{"text": "of less account"}',
        "stats.json": b"{}",
    }
    shard(folder / "a-0.tar", first)
    shard(folder / "a-1.tar", second)
    return str(folder / "a-*.tar")


def table(folder: Path) -> datasets.Dataset:
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in images(folder)], "text": TEXTS}
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), text=datasets.Value("string")))


def parquet(folder: Path) -> str:
    table(folder / "images").to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def parquet_folder(folder: Path) -> str:
    table(folder / "images").to_parquet(folder / "out" / "train-00000-of-00001.parquet")
    return str(folder / "out")


def saved(folder: Path) -> str:
    table(folder / "images").save_to_disk(folder / "saved")
    return str(folder / "saved")


def hub(folder: Path) -> str:
    return f"{listed(folder)}:train"  # `datasets` reads it


SOURCES: dict[str, Callable[[Path], Any]] = {
    "metadata": listed,
    "txt": captioned,
    "shards": shards,
    "parquet": parquet,
    "parquet-folder": parquet_folder,
    "save_to_disk": saved,
    "datasets": hub,
}


def opened(root: Any, resolution: int = 64, multiple: int = 8, **options: Any) -> CaptionedImages:
    data = CaptionedImages(str(root), **options)
    data.setup("fit")
    data.configure(resolution, multiple)
    return data


def of_rank(data: Any, rank: int, world: int) -> ResumableLoader:
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world, "rank": rank})
    return data.train_dataloader()


def epoch(loader: ResumableLoader, number: int) -> list[Any]:
    loader.sampler.set_epoch(number)
    return list(loader)


def same(left: list[Any], right: list[Any]) -> bool:
    def flat_of(batch: dict[str, Any]) -> list[Any]:
        return [x for v in batch.values() for x in (flat_of(v) if isinstance(v, dict) else [v])]

    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(flat_of(a), flat_of(b), strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


MIXED = [(80, 80)] * 5 + [(64, 100)] * 4 + [(100, 66)] * 3 + [(90, 70)]


def refused(message: str, root: Any, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        opened(root, **options)
