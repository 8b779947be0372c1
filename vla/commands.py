"""The commands of this domain: their options. What they do is imported once the options are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpeft._arguments import own_arguments, positive


def classify(argv: Sequence[str] | None = None) -> int:
    """`mmpeft classify`: name what is in pictures of one's own, by class names alone or by a trained few-shot run."""
    parser = argparse.ArgumentParser("mmpeft classify", description=classify.__doc__)
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="picture files")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a few-shot run: its folder or a .ckpt file")
    source.add_argument("--classes", help="comma-separated class names, for zero-shot classification")
    parser.add_argument(
        "--backbone", default="embedded:clip_emoji", help="the pair for --classes (default: %(default)s)"
    )
    parser.add_argument("--template", default="a photo of a {}.", help="what is said around a name, for --classes")
    parser.add_argument("--top", type=positive, default=3, help="classes to show (default: %(default)s)")
    _picture(parser, "classified.png")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.vla.fewshot.command import run

    return run(options)


def segment(argv: Sequence[str] | None = None) -> int:
    """`mmpeft segment`: find things of any names in a picture of one's own, by a trained segmentation run."""
    parser = argparse.ArgumentParser("mmpeft segment", description=segment.__doc__)
    _run(parser, "a segmentation run")
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--classes", help="comma-separated names, any; default: those of the run")
    _picture(parser, "segmented.png")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.vla.segmentation.command import run

    return run(options)


def ask(argv: Sequence[str] | None = None) -> int:
    """`mmpeft ask`: ask a trained run about a picture of one's own."""
    parser = argparse.ArgumentParser("mmpeft ask", description=ask.__doc__)
    _run(parser, "a run of VisualQuestions")
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--question", nargs="+", required=True, help="what to ask, each question in quotes")
    parser.add_argument("--top", type=positive, default=3, help="answers to print (default: %(default)s)")
    _picture(parser, "answered.png")
    options = parser.parse_args(own_arguments(argv))
    from mmpeft.vla.vqa.command import run

    return run(options)


def _run(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"{what}: its folder or a .ckpt file")


def _picture(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), help="picture to write (default: %(default)s)")
