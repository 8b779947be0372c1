"""Names of what is written: formats, and the forms of DoRA. Parsers of commands read them without importing torch."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

Format = Literal["peft", "diffusers", "kohya", "comfy", "mlx", "adapterhub"]
FORMATS: tuple[Format, ...] = get_args(Format)
FOLDERS = ("peft", "mlx", "adapterhub")
"""Those that are a folder of a config and its tensors, for one model."""
Form = Literal["", "comfy", "difference", "low_rank"]
"""How DoRA is written; as it trained by default."""
FORMS: tuple[str, ...] = get_args(Form)


def add_forms(parser: argparse.ArgumentParser) -> None:
    """Options of a command that exports: how DoRA is written."""
    parser.add_argument(
        "--dora",
        default="",
        choices=[form for form in FORMS if form],
        help="write DoRA with ComfyUI's lengths, as full differences, or as LoRA (default: as it trained)",
    )
    parser.add_argument("--rank", type=int, default=0, help="of --dora low_rank (default: four times the trained one)")
