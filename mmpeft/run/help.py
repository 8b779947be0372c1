"""The short help of `fit` and of what is done with a run: the options that matter, in groups."""

from __future__ import annotations

from shutil import get_terminal_size
from textwrap import fill
from typing import NamedTuple


class Verb(NamedTuple):
    """A sub-command: how it is called, and what it does."""

    usage: str
    about: str


ABOUT = {
    "fit": Verb("mmpeft fit -c CONFIG [-c CONFIG …] [options]", "Train a model by a method."),
    "resume": Verb(
        "mmpeft resume RUN [options]",
        "Go on with a run that was stopped, bit for bit, or train it longer: --trainer.max_epochs 40.",
    ),
    "validate": Verb("mmpeft validate RUN [--best] [options]", "Evaluate a run on its validation data."),
    "test": Verb("mmpeft test RUN [--best] [options]", "Evaluate a run on its test data."),
    "predict": Verb(
        "mmpeft predict RUN [PATH …] [--text TEXT …] [--out OUT] [--best] [options]",
        """Predict what you give, or without that the run's own data. PATH are pictures and folders of them; of a
text-to-image run they are prompts. --text are questions (VisualQuestions), names of things (Segmenter), or texts to
choose among (ContrastiveTuner).""",
    ),
}
OF_A_RUN = (
    (
        "RUN",
        "a run's folder, such as runs/EmojiData-LoRA/version_0, the folder above (its newest run), or a .ckpt file",
    ),
    ("--best", "the checkpoint of the best validation, checkpoints/best.ckpt; default: the last one"),
)
PREDICT = (
    ("--out OUT", "file or folder to write, which must not be there; default: predictions/ in the run's folder"),
)
GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "what is trained": (
        (
            "-c CONFIG",
            "a file, or a shipped configuration (`mmpeft configs`); later ones override earlier ones",
        ),
        (
            "--model NAME",
            "the task, such as ImageClassifier (`mmpeft models`); --model.help NAME lists its options",
        ),
        ("--model.backbone NAME", "a model of the task's library, embedded:vit_emoji, or a folder (`mmpeft models`)"),
        ("--method METHOD", "a name or a call: LoRA, 'LoRA(rank=8) + BitFit()'; --method.help LoRA lists its fields"),
        ("--data NAME", "the data module, such as FolderData (`mmpeft data`); --data.help NAME lists its options"),
        ("--data.root FOLDER", "where the data are, for data modules that read a folder"),
        ("--data.batch_size N", "samples a training step and process"),
        ("--data.num_workers N", "loading processes; the batches do not depend on it"),
    ),
    "how long and how": (
        ("--trainer.max_epochs N", "epochs; or --trainer.max_steps N"),
        (
            "--model.optimizer.lr LR",
            "learning rate; with warm-up and cosine decay unless --model.lr_scheduler is given",
        ),
        ("--trainer.accumulate_grad_batches N", "batches a step of the optimiser"),
        ("--trainer.gradient_clip_val X", "the largest norm of the gradient"),
        ("--model.recompute WHAT", "compute again in the backward pass to save memory: pointwise or block"),
        ("--seed_everything N", "seed of all that is random; default 0"),
    ),
    "on what": (
        ("--trainer.accelerator WHAT", "cpu, gpu or auto"),
        ("--trainer.devices N", "how many; with several, --trainer.strategy ddp or fsdp"),
        ("--trainer.precision P", "32-true, bf16-mixed or 16-mixed"),
    ),
    "what is written": (
        ("--name NAME", "folder of the run under runs/; default: data and method, such as EmojiData-LoRA"),
        ("--ckpt_path PATH", "a checkpoint to go on from, or `last`"),
        ("--checkpoint.every_n_train_steps N", "write last.ckpt every so many steps; default: each epoch"),
        ("--trainer.logger NAME", "tensorboard, csv, wandb, mlflow, comet, or false"),
        ("--print_config", "print the whole configuration, and do nothing"),
    ),
}
EVALUATING = ("on what",)
LIMITS = (
    ("--trainer.limit_test_batches N", "the first batches alone; of validation and prediction likewise"),
    ("--data.eval_batch_size N", "samples a step"),
)
NAMES = 37


def text_of(verb: str) -> str:
    """The help of one sub-command, as wide as the terminal."""
    known = ABOUT[verb]
    lines = [f"usage: {known.usage}", "", known.about]
    groups = GROUPS if verb in ("fit", "resume") else {name: (*GROUPS[name], *LIMITS) for name in EVALUATING}
    if verb != "fit":
        groups = {"the run": (*OF_A_RUN, *(PREDICT if verb == "predict" else ())), **groups}
    width = max(60, get_terminal_size((120, 24)).columns)
    for title, options in groups.items():
        lines += ["", f"{title}:"]
        for name, said in options:
            lead = f"  {name:<{NAMES}} "
            lines.append(fill(said, width, initial_indent=lead, subsequent_indent=" " * len(lead)))
    if verb not in ("fit", "resume"):
        lines += ["", f"Without RUN, a configuration says what is evaluated: mmpeft {verb} -c CONFIG --ckpt_path last"]
    return "\n".join([*lines, "", f"`mmpeft {verb} --help all` lists all options."])
