"""`mmpeft export SOURCE --to FORMAT --out PATH`: a run or an adapter, in the form that other programs read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from mmpeft._arguments import own_arguments
from mmpeft._extras import needed_by
from mmpeft.errors import ConfigError, nearest
from mmpeft.formats.forms import FORMATS, add_forms
from mmpeft.run.domains import classes, own_table, table
from mmpeft.run.place import CONFIG, newest_checkpoint

OF_A_RUN = {"peft": "mmpeft.run.exports:peft", "merged": "mmpeft.run.exports:merged"}
"""What every run can be written as; domains have more in their tables `EXPORTS`."""
OF_A_MODEL: dict[str, str] = {
    **dict.fromkeys(FORMATS, "mmpeft.run.exports:of_model"),
    "merged": "mmpeft.run.exports:merged_model",
}
FORMER = {"export-clip": "open_clip", "export-pipeline": "diffusers", "merge": "merged"}
"""Commands that this one replaces, and what each wrote."""
MEANING = """formats:
  peft         a folder for Hugging Face PEFT
  merged       the whole model with the adapter merged in, as its own library reads it
  timm         a classifier's folder for timm.create_model("local-dir:…"), with the names of its classes
  open_clip    an image-text pair's folder for open_clip.create_model("local-dir:…"); class names as weights beside it
  onnx         the model for onnxruntime, with the adapter merged in where it can be
  mlx          a language model's folder for mlx_lm
  adapterhub   a folder for AdapterHub's library `adapters`
  diffusers, kohya, comfy   a LoRA file of a pipeline for diffusers, for ComfyUI, A1111, Forge, and for ComfyUI

What is written is read back by its reader's own code where that is installed, and compared.
docs/readers.md says which program reads what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write a run or an adapter in another form; `argv` starts with the sub-command."""
    verb = (sys.argv[1:] if argv is None else argv)[0]
    options = _parser(verb).parse_args(own_arguments(argv))
    options.source = options.source or options.former_source
    options.out = options.out or options.dst
    options.to = {"pipeline": "merged"}.get(options.to, options.to)
    for name in ("source", "out"):
        if getattr(options, name) is None:
            raise ConfigError(f"mmpeft export needs {'SOURCE' if name == 'source' else '--out PATH'}")
    if verb in FORMER:
        print(
            f"note: `mmpeft {verb}` is now `mmpeft export {options.source} --to {options.to} --out …`", file=sys.stderr
        )
    known = targets(options)
    if options.to not in known:
        hint = nearest(options.to, known)
        raise ConfigError(f"--to {options.to}: {options.source} can be written as {', '.join(sorted(known))}.{hint}")
    module, _, function = known[options.to].partition(":")
    with needed_by(f"`mmpeft export --to {options.to}`", module):
        getattr(import_module(module), function)(options)
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mmpeft export",
        usage="mmpeft export SOURCE --to FORMAT --out PATH [--model M | --pipeline P] [options]",
        description="Write a run or an adapter in the form that other programs read.",
        epilog=MEANING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, nargs="?", help="a run's folder or .ckpt file, or an adapter of any format"
    )
    parser.add_argument("dst", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", "--adapter", type=Path, dest="former_source", help=argparse.SUPPRESS)
    parser.add_argument("--to", default=FORMER.get(verb, "peft"), metavar="FORMAT", help="see below (default: peft)")
    parser.add_argument("--out", type=Path, help="the file or folder to write")
    parser.add_argument("--best", action="store_true", help="of a run, the checkpoint of the best validation")
    parser.add_argument(
        "--model", default="", help="what an adapter was tuned on: a Python call that returns it, as module:function"
    )
    parser.add_argument("--pipeline", help="the same for text-to-image: a hub repository, a folder, embedded:…")
    parser.add_argument("--component", default="", help="the layers of one model in a pipeline's file, such as unet")
    parser.add_argument("--prefix", default="", help="what a pipeline calls the model: unet, transformer, text_encoder")
    parser.add_argument("--encoders", type=int, default=0, help="text encoders of the pipeline, with --prefix")
    add_forms(parser)
    return parser


def targets(options: argparse.Namespace) -> Mapping[str, str]:
    """What a source can be written as: format → `module:function`, called with the options.

    Raises:
        ConfigError: nothing tells what the source was tuned on.
    """
    if options.model:
        return OF_A_MODEL
    if options.pipeline:
        return {name: target for name, (_, target) in table("PIPELINE_EXPORTS").items()}
    config = config_of(options.source)
    if config is None:
        raise ConfigError(
            f"{options.source} is not in the folder of a run: say what it was tuned on by --model module:function, or "
            "by --pipeline for text-to-image adapters"
        )
    return {**OF_A_RUN, **own_table(domain_of(config), "EXPORTS")}


def config_of(source: Path) -> Path | None:
    """The configuration of the run that a checkpoint, a folder or an adapter lies in."""
    newest = newest_checkpoint(source) if source.is_dir() else None
    places = [source, source.parent, source.parent.parent, *([newest.parent.parent] if newest else [])]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)


def domain_of(config: Path) -> str:
    """The domain of the task that a run's configuration names."""
    from mmpeft.run.stranger import read_config

    model = read_config(config).get("model")
    name = str(model.get("class_path") if isinstance(model, dict) else model).rpartition(".")[2]
    if name not in classes():
        raise ConfigError(f"{config} is of the task {name!r}, which no installed domain has")
    return classes()[name][0]
