"""Adapters opened on a pipeline, and what `mmpeft sample` draws with them."""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torchvision.transforms.v2 import functional as tf
from torchvision.utils import make_grid

from mmpeft.combine.strength import strength
from mmpeft.data.sampling import hash_seed
from mmpeft.diffusion.backbone import DTYPES, create
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.family import Family
from mmpeft.diffusion.style.grid import labelled_grid
from mmpeft.diffusion.style.words import FOLDER, load_words
from mmpeft.errors import ConfigError, MMPEFTWarning
from mmpeft.files import write_atomic
from mmpeft.formats.exchange import load_parts
from mmpeft.formats.native import MANIFEST
from mmpeft.run.stranger import arguments_of, read_config
from mmpeft.surgery.choice import use
from mmpeft.surgery.together import Together
from mmpeft.tuning import Tuning, load
from mmpeft.types import Facts, Untyped


def run(options: argparse.Namespace) -> int:
    """Draw prompts by a pipeline with adapters."""
    base = base_of(options.pipeline, options.adapter)
    family = family_of(create(base.pipeline, DTYPES[options.dtype or base.dtype], base.quantization))
    size = options.size or base.size or family.size
    if size % family.multiple:
        raise ConfigError(f"--size is a multiple of {family.multiple} for this pipeline, got {size}")
    family.sides(size)
    for path in options.words:
        load_words(family, path)
    tunings = open_adapters(family, options.adapter)
    weights = options.weights if options.weights is not None else [1.0] * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise ConfigError(f"--weights wants one for each of {len(options.adapter)} adapters, got {len(weights)}")
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    family.check_prompts([*prompts, options.negative])
    family.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def drawn(share: float) -> Tensor:
        noise = [torch.Generator().manual_seed(hash_seed(options.seed, i)) for i in range(len(prompts))]
        with running(tunings, [share * weight for weight in weights]), torch.no_grad():
            found = family.draw(prompts, noise, options.steps, options.guidance, size, options.negative)
        return found.float().cpu()

    if options.compare:
        png = labelled_grid({"base": drawn(0.0), "half": drawn(0.5), "full": drawn(1.0)}, prompts)
        write_atomic(options.out, png)
    else:
        save_grid(drawn(options.strength), options.out, options.count)
    Console().print(f"picture: {options.out}", soft_wrap=True)
    return 0


class Base(NamedTuple):
    """What an adapter was tuned on."""

    pipeline: str
    dtype: str = "float32"
    quantization: Facts | None = None
    size: int | None = None


def base_of(name: str | None, adapters: Sequence[Path]) -> Base:
    """The pipeline that was named, or the one the first adapter's run was tuned on, as it was held there.

    Raises:
        ConfigError: none was named, and there is no run to tell.
    """
    if name:
        return Base(name)
    for path in adapters[:1]:
        config = path.parent / "config.yaml"
        if config.is_file():
            model, data = (arguments_of(read_config(config), key) for key in ("model", "data"))
            if isinstance(model.get("pipeline"), str):
                size = model.get("resolution") or data.get("resolution")
                return Base(model["pipeline"], model.get("dtype", "float32"), model.get("quantization"), size)
    raise ConfigError(
        "--pipeline is needed: a hub repository, a folder, or embedded:<name>. It may be left out for an adapter "
        "in the folder of its run"
    )


def positive(text: str) -> int:
    """A whole number above 0, for a command's option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def open_adapters(family: Family, paths: Sequence[Path]) -> list[list[Tuning]]:
    """For each adapter its tunings: of the denoiser first, then of the text encoders it comes with.

    Every layer of a file is used, or is an error; those of an encoder that this pipeline was opened without are said.

    Raises:
        AdapterFileError: a file that cannot be read, or one with layers of another pipeline.
    """
    found = []
    for number, path in enumerate(paths):
        name = f"adapter{number}"
        if (path / FOLDER).is_dir():
            load_words(family, path / FOLDER)
        if (path / MANIFEST).is_file():
            own = {part: path / part for part in family.places if (path / part / MANIFEST).is_file()}
            _say_absent(family, own, path)
            tuned = [(encoder, own[part]) for part, encoder in family.encoders.items() if part in own]
            found.append([load(model, folder, name) for model, folder in [(family.denoiser, path), *tuned]])
        else:
            models = {family.part: family.denoiser, **family.encoders}
            absent = [part for part in family.places if part not in family.encoders]
            parts = load_parts(models, path, name, aliases=family.aliases, absent=absent)
            found.append([Tuning(tuned.model, tuned.name) for tuned in parts.values()])
    return found


def _say_absent(family: Family, parts: Collection[str], path: Path) -> None:
    """Warn of an adapter's encoders that the pipeline was opened without."""
    absent = [part for part in parts if part not in family.encoders]
    if absent:
        warnings.warn(
            f"{path} tunes {' and '.join(absent)}, which this pipeline was opened without; that part is left out",
            MMPEFTWarning,
            stacklevel=3,
        )


@contextmanager
def running(tunings: Sequence[Sequence[Tuning]], weights: Sequence[float]) -> Iterator[None]:
    """All adapters run, each at its weight."""
    models = {id(tuning.model): tuning.model for own in tunings for tuning in own}.values()
    with ExitStack() as stack:
        for model in models:
            own = {t: w for tuned, w in zip(tunings, weights) for t in tuned if t.model is model}
            if not any(own.values()):
                stack.enter_context(use(model, None))
            elif len(own) == 1:
                stack.enter_context(strength(*own.popitem()))
            else:
                names = tuple(tuning.name for tuning in own)
                stack.enter_context(use(model, Together(names, tuple(own.values()))))
        yield


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A PNG of images [B, 3, H, W] in [0, 1]; small ones are enlarged without smoothing."""
    grid = make_grid(images, nrow=columns if columns > 1 else min(len(images), 4), padding=2, pad_value=1.0)
    times = max(1, 256 // images.shape[-1])
    picture: Untyped = tf.to_pil_image(grid)
    data = io.BytesIO()
    picture.resize((picture.width * times, picture.height * times), 0).save(data, "PNG")
    write_atomic(path, data.getvalue())
