"""The commands of this domain: their options. What they do is imported once the options are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpeft._arguments import own_arguments, positive
from mmpeft.formats.forms import FORMATS

PIPELINE = "a hub repository, a folder, or embedded:<name> (default: what the adapter's run was tuned on)"
DTYPES = ("float32", "bfloat16", "float16")


def sample(argv: Sequence[str] | None = None) -> int:
    """Draw prompts by a pipeline with any number of adapters; one picture with all images."""
    parser = argparse.ArgumentParser("mmpeft sample", description=sample.__doc__)
    parser.add_argument("--prompt", nargs="+", required=True, help="one text or several")
    parser.add_argument(
        "--adapter", type=Path, nargs="*", default=[], help="adapters of any known format, run as a weighted sum"
    )
    parser.add_argument("--weights", type=float, nargs="*", help="one for each adapter (default: 1 each)")
    parser.add_argument("--strength", type=float, default=1.0, help="of all adapters together (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="draw the base, half and full strength side by side")
    parser.add_argument("--words", type=Path, nargs="*", default=[], help="textual inversions, or folders of them")
    parser.add_argument("--pipeline", help=PIPELINE)
    parser.add_argument("--dtype", choices=DTYPES, help="of the pipeline (default: that of the adapter's run)")
    parser.add_argument("--count", type=positive, default=1, help="images a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument(
        "--size", type=positive, help="height and width in pixels (default: the run's or the pipeline's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="picture to write (default: %(default)s)")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.diffusion.style.command import run

    return run(options)


def mix(argv: Sequence[str] | None = None) -> int:
    """Write several LoRAs of a pipeline as one: `Σ w_k ΔW_k`, or with weights by input column that are learned.

    A sum of LoRA files needs neither the pipeline nor its weights.
    """
    parser = argparse.ArgumentParser("mmpeft mix", description=mix.__doc__)
    parser.add_argument("--adapter", type=Path, nargs="+", required=True, help="two LoRAs or more, of any known format")
    parser.add_argument("--weights", type=float, nargs="*", help="one for each adapter (default: 1 each)")
    parser.add_argument("--prompt", nargs="*", default=[], help="ZipLoRA: what each adapter is for, one prompt each")
    parser.add_argument("--steps", type=positive, default=100, help="ZipLoRA: steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="ZipLoRA: learning rate (default: %(default)s)")
    parser.add_argument("--penalty", type=float, default=0.01, help="ZipLoRA: weight of overlap (default: %(default)s)")
    parser.add_argument(
        "--images", type=positive, default=8, help="ZipLoRA: images drawn by each (default: %(default)s)"
    )
    parser.add_argument("--pipeline", help=f"{PIPELINE}; a weighted sum of LoRA files needs none")
    parser.add_argument("--to", choices=FORMATS, default="diffusers", help="format (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of images and noise (default: %(default)s)")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.diffusion.style.mix import run

    return run(options)
