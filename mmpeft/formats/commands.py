"""The shell's way to adapter files: `mmpeft inspect` and `mmpeft convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from mmpeft.errors import ConfigError, shown
from mmpeft.formats.exchange import Exported, convert, inspect
from mmpeft.formats.forms import FORMATS
from mmpeft.formats.inspection import FileInfo
from mmpeft.types import AnyFunc

MODEL_HELP = "a Python call that returns the base model, as module:function, e.g. my_project.models:unet"


def inspect_command(argv: Sequence[str] | None = None) -> int:
    """Print what adapter files hold; 1 if a file cannot be loaded or, with a model, does not fit it."""
    parser = argparse.ArgumentParser("mmpeft inspect", description="Describe adapter files of any known format.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a safetensors file, or an adapter's folder"
    )
    parser.add_argument("--model", default="", help=f"match the layers against {MODEL_HELP}")
    options = parser.parse_args(_arguments(argv))
    model = model_of(options.model) if options.model else None
    found = [inspect(file, model) for file in options.files]
    for info in found:
        Console().print(table_of(info))
    return int(any(info.refused or info.unmatched for info in found))


def convert_command(argv: Sequence[str] | None = None) -> int:
    """Rewrite an adapter file in another format."""
    parser = argparse.ArgumentParser(
        "mmpeft convert", description="Rewrite an adapter file in another format, verified."
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="a safetensors file or a PEFT folder")
    parser.add_argument("dst", type=Path, metavar="DST", help="the file or folder to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--prefix", default="", help="the model's name in a pipeline: unet, transformer, text_encoder")
    parser.add_argument("--model", default="", help=f"needed to read kohya files: {MODEL_HELP}")
    options = parser.parse_args(_arguments(argv))
    model = model_of(options.model) if options.model else None
    say(convert(options.src, options.dst, options.to, model=model, prefix=options.prefix))
    return 0


def table_of(info: FileInfo) -> Table:
    """What `inspect` found, as a table of two columns."""
    table = Table("", escape(shown(str(info.path))), title=None, show_lines=False)

    def row(name: str, text: str) -> None:
        table.add_row(name, _text(text))

    row("format", info.format)
    row("method", info.method)
    row("layers", str(info.layers))
    for name, values in (
        ("rank", info.ranks),
        ("scale", info.scales),
        ("type", info.dtypes),
        ("part of", info.components),
    ):
        known = {key: count for key, count in values.items() if key != ""}
        if known:
            row(name, ", ".join(f"{key} ×{count}" for key, count in known.items()))
    if info.whole:
        row("saved whole", ", ".join(info.whole))
    row("size", f"{info.bytes:,} bytes")
    if info.matched is not None and info.unmatched is not None:
        row("fits the model", f"{len(info.matched)} of {info.layers} layers")
        for path in info.unmatched[:5]:
            row("no place for", path)
    for note in info.notes:
        row("note", note)
    if info.refused:
        table.add_row("[bold]not loadable[/bold]", _text(info.refused))
    return table


def _text(text: str) -> Text:
    """Text from a file, as it stands: brackets in a name are no markup, control characters are seen."""
    return Text(shown(text))


def _arguments(argv: Sequence[str] | None) -> list[str]:
    return (sys.argv[1:] if argv is None else list(argv))[1:]


def model_of(target: str) -> nn.Module:
    """The model that a Python call returns.

    Raises:
        ConfigError: there is no such call, or it returns something else.
    """
    module, _, function = target.partition(":")
    try:
        build: AnyFunc = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--model {target!r}: {error}; expected {MODEL_HELP}") from error
    model = build()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {target!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def say(written: Exported) -> None:
    """Print what was written, and who has read it back."""
    by = " and ".join(written.verified_by) or "nobody"
    print(f"{written.path}: {written.format}, {written.layers} layers, {written.bytes:,} bytes; read back by {by}")
    print(f"largest relative difference {written.difference:.1e}")
    for note in written.notes:
        print(f"note: {note}")
