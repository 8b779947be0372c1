"""`mmpeft fit | validate | test | predict`: LightningCLI with a method as a key of its own and short class names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import lightning
import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mmpeft._arguments import comma_separated
from mmpeft.data.inputs import Inputs
from mmpeft.errors import ConfigError, MMPEFTError, nearest
from mmpeft.files import free_path, make_folder
from mmpeft.methods import METHODS
from mmpeft.methods.base import Method
from mmpeft.run.arguments import class_names, reset_changed_methods, with_found_configs, with_short_loggers
from mmpeft.run.bar import RunBar
from mmpeft.run.checkpoint import LastCheckpoint
from mmpeft.run.domains import classes, import_named
from mmpeft.run.experiment import reporting_callbacks, run_callbacks
from mmpeft.run.loggers import NEEDS, loggers
from mmpeft.run.place import BEST, LAST, Given, find_run, newest_checkpoint
from mmpeft.run.stranger import KEYS, check_names, read_config
from mmpeft.run.written import spelled_out
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from mmpeft.tasks.module import TuningModule
from mmpeft.types import Argument, Config, Json, Leaf, Untyped

ROOT = "runs"
set_parsing_settings(subclasses_enabled=[Method])
_read_yaml = get_loader("yaml")
set_loader("yaml", lambda text: spelled_out(_read_yaml(text)), exceptions=(yaml.YAMLError,))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build and run; `argv` starts with the sub-command."""
    _run(argv)
    return 0


def of_run(given: Given) -> int:
    """Go on with a finished run, or evaluate it, by its own configuration."""
    place = find_run(given.run, BEST if given.best else LAST)
    facts = read_config(place.config, (*KEYS, "trainer", "name", "checkpoint"))
    check_names(facts, place.config)
    if given.verb != "resume":
        facts = {key: facts[key] for key in KEYS} | {"trainer": _plain(facts["trainer"])}
    if given.has_inputs and given.out is None:
        given = given._replace(out=free_path(place.folder / "predictions"))
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump({key: value for key, value in facts.items() if value is not None}), "utf-8")
        verb = "fit" if given.verb == "resume" else given.verb
        _run([verb, "-c", str(config), "--ckpt_path", str(place.checkpoint), *given.options], given)
    return 0


def _plain(trainer: Json | None) -> Json:
    """The trainer's options that are numbers and words: devices, precision, limits; no callbacks, loggers, plugins."""
    return {key: value for key, value in (trainer or {}).items() if isinstance(value, str | int | float | bool)}


def _run(argv: Sequence[str] | None, given: Given | None = None) -> None:
    arguments = reset_changed_methods(
        with_short_loggers(with_found_configs(sys.argv[1:] if argv is None else argv), NEEDS)
    )
    import_named(class_names(arguments))
    if argv is None:
        sys.argv[1:] = arguments  # from where Lightning reads them, in the processes it starts as well
    TuningCLI(
        given,
        TuningModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={"prog": "mmpeft"},
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"log_every_n_steps": 10, "callbacks": [*run_callbacks(), *reporting_callbacks()]},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=None if argv is None else arguments,
    )


class Parser(LightningArgumentParser):
    """Short errors with the nearest known name, and no abbreviated options."""

    def __init__(self, *args: Argument, **kwargs: Argument) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = explain(message, set(options(self)))
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.write("tip: `mmpeft fit --help` lists all options, `--method.help LoRA` those of a class\n")
        self.exit(2)


class TuningCLI(LightningCLI):
    """Adds `method`, `name` and `checkpoint`, and keeps all a run writes in one folder."""

    def __init__(self, given: Given | None, *args: Argument, **kwargs: Argument) -> None:
        self.given = given
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(
            Method, "method", required=False, help="What is trained and how: a method's name, or class_path and fields."
        )
        parser.link_arguments("method", "model.init_args.method", apply_on="parse")
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help=f"Folder of the run under {ROOT}/. Default: data and method, such as EmojiData-LoRA.",
        )
        parser.add_argument(
            "--logger",
            type=str | None,
            default=None,
            help=f"{', '.join(NEEDS)}, with commas between; `--trainer.logger wandb` is the same.",
        )
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Settle the run's folder: a new one, or that of the checkpoint, so that a resumed run goes on in its own."""
        config = self.config[self.config["subcommand"]]
        root = Path(config.trainer.default_root_dir or ROOT)
        self.folder = root / (config.name or default_name(config))
        self.version: int | str | None = None
        wanted = config.get("ckpt_path")
        fitting = self.config["subcommand"] == "fit"
        if wanted == "last":
            found = newest_checkpoint(self.folder)
            if found is None and not fitting:
                raise ConfigError(f"--ckpt_path last: no {LAST} in {self.folder}/*/checkpoints; run `mmpeft fit` first")
            if found is None:
                rank_zero_warn(
                    f"--ckpt_path last: no checkpoint in {self.folder} yet; training starts from the beginning"
                )
            config.ckpt_path = wanted = found and str(found)
        if wanted:
            path = Path(wanted)
            if "://" not in wanted and not path.is_file():
                raise ConfigError(f"--ckpt_path: no file {wanted}; give a .ckpt file or `last`")
            if path.parent.name == "checkpoints":
                run = path.parent.parent
                number = re.fullmatch(r"version_(\d+)", run.name)
                self.folder, self.version = run.parent, int(number[1]) if number else run.name
        elif not fitting:
            rank_zero_warn("no --ckpt_path given: the method and the head are evaluated untrained")

    def before_instantiate_classes(self) -> None:
        subcommand = self.config["subcommand"]
        self.save_config_kwargs["config_filename"] = "config.yaml" if subcommand == "fit" else f"{subcommand}.yaml"

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raises into its own account of types
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, MMPEFTError):
                cause = cause.__cause__
            raise cause or error from None
        given = self.given
        if given is not None and given.has_inputs:
            self.datamodule.inputs, self.model.output = Inputs(given.paths, given.texts), given.out

    def instantiate_trainer(self, **kwargs: Argument) -> lightning.Trainer:
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True):
            if self.version is None:
                self.version = new_version(self.folder, reserve=not config.get("fast_dev_run"))
            kwargs["logger"] = loggers(self._wanted_loggers(), self.folder, self.version)
        if config.get("enable_progress_bar") is not False and not any(
            isinstance(one, ProgressBar) for one in as_list(self._get(self.config_init, "trainer.callbacks"))
        ):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults["callbacks"], RunBar()]
        kwargs["plugins"] = [*as_list(config.get("plugins")), AtomicCheckpointIO()]
        kwargs["default_root_dir"] = config.get("default_root_dir") or ROOT
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            raise ConfigError(_of_trainer(str(error), str(config.get("accelerator")))) from error

    def _wanted_loggers(self) -> list[str]:
        names = self._get(self.config_init, "logger") or ""
        return comma_separated(str(names))


def _of_trainer(said: str, accelerator: str) -> str:
    """A trainer's complaint in one line."""
    if "No supported gpu backend" in said or "accelerator can not run on your system" in said:
        return f"--trainer.accelerator {accelerator}: there is none here that PyTorch sees; leave it out, or give cpu"
    return " ".join(said.split())


def as_list(value: Leaf) -> list[Leaf]:
    """A list of what was given: nothing, one, or several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def default_name(config: Config) -> str:
    """`<data>-<method>`, or the model's name where the method has none."""
    parts = (config.get("data"), config.get("method") or config.get("model"))
    names = [str(part.class_path).rsplit(".", 1)[-1] for part in parts if part]
    return "-".join(names) or "default"


def new_version(folder: Path, reserve: bool = True) -> int:
    """One more than the newest `version_<n>` of a folder, which is made at once: two runs may start together.

    Raises:
        FileError: the folder cannot be made.
    """
    found = [re.fullmatch(r"version_(\d+)", path.name) for path in folder.glob("version_*")]
    version = 1 + max((int(match[1]) for match in found if match), default=-1)
    while reserve and getattr(rank_zero_only, "rank", 0) == 0 and not make_folder(folder / f"version_{version}"):
        version += 1
    return version


# -- errors -------------------------------------------------------------------------------------------------


def options(parser: Untyped) -> Iterator[str]:
    """Names of all options of a parser and of its sub-commands."""
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from options(inner)


_NOISE = re.compile(
    r"^\s*(- )?(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path)"
)
_UNKNOWN_CLASS = re.compile(
    r"(?:dot import path string|given class_path|Import of).*?['\s]([\w.]+)'?$",
    re.MULTILINE,
)
_UNKNOWN_KEY = re.compile(
    r"(?:[Oo]ption|[Kk]ey|arguments:) ['\"]?(?:--)?([\w.-]+)['\"]?(?: is not|=| |$)",
    re.MULTILINE,
)


def explain(message: str, keys: Iterable[str]) -> str:
    """An error of the parser without its type algebra, and with the nearest of the names it may have meant.

    `keys` are the options of the parser that complains; classes have parsers of their own.
    """
    short = "\n".join(line for line in message.splitlines() if not _NOISE.match(line))
    if "Did you mean" in short:
        return short
    if match := _UNKNOWN_CLASS.search(short):
        method = 'key "method' in short or '.method"' in short
        name = match[1].rsplit(".", 1)[-1]
        return short + nearest(name, METHODS if method else classes())
    if "not" in short or "nrecognized" in short:
        for name in _UNKNOWN_KEY.findall(short):
            known = {key: key.rsplit(".", 1)[-1] for key in keys}
            if name not in known and (found := nearest(name, known) or nearest(name, known.values())):
                return short + found
    return short
