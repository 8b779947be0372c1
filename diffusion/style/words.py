"""Textual inversion: new words for a style or a subject, as files that other tools read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AddedToken

from mmpeft.diffusion.family import Family
from mmpeft.diffusion.style.task import StyleTuner
from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.files import write_atomic
from mmpeft.formats.content import dump_tensors, read_tensors
from mmpeft.methods import Frozen, Method, TextualInversion
from mmpeft.tuning import Tuning
from mmpeft.types import AnyModule, Argument, Facts, Untyped

FOLDER = "words"
ENCODERS = {"text_encoder": ("tokenizer", "clip_l"), "text_encoder_2": ("tokenizer_2", "clip_g")}
"""Text encoder → its tokenizer, and what files for two encoders call it."""
NAMELESS = ("emb_params", "*")
"""Keys of files whose name is the word: sd-scripts' and A1111's."""
PIPELINES = ("PixelPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")


class WordTuner(StyleTuner):
    """`StyleTuner` on prompts with new words, whose embeddings train: alone, or beside methods on the models.

    A word is one embedding or several in a row; each starts as the mean of those of what describes it. With `Full` at
    `cross.{k,v}` beside it this is custom diffusion. Written to `adapter/words`, a file a word, in the layout of
    diffusers, A1111 and ComfyUI.
    Papers: https://arxiv.org/abs/2208.01618, https://arxiv.org/abs/2212.04488
    """

    def __init__(
        self,
        pipeline: str,
        words: dict[str, str] | None = None,
        vectors: int = 1,
        method: Method | None = None,
        text_method: Method | None = None,
        **options: Argument,
    ) -> None:
        """
        Args:
            pipeline: as for `StyleTuner`: Stable Diffusion 1 and 2, SDXL, or one over pixels.
            words: new word → what it starts as: `{"<openmoji>": "drawing"}`.
            vectors: embeddings a word, and tokens of a prompt that it takes.
            method: what is trained in the denoiser; None for nothing.
            text_method: what else is trained in the text encoders.
            options: those of `StyleTuner`.

        Raises:
            ConfigError: no word, one with spaces or without a description, or no vector.
        """
        if not words or not all(re.fullmatch(r"\S+", word) and start.strip() for word, start in words.items()):
            raise ConfigError(f"words are new words without spaces, each with a description of it, got {words!r}")
        if vectors < 1:
            raise ConfigError(f"vectors is a number of embeddings a word >= 1, got {vectors}")
        rows = TextualInversion(words=len(words) * vectors)
        super().__init__(pipeline, method or Frozen(), rows + text_method if text_method else rows, **options)
        self.words, self.vectors, self.words_alone = dict(words), vectors, text_method is None

    def open(self) -> Family:
        family = super().open()
        add_words(family, self.words, self.vectors)
        return family

    def meaning(self) -> Facts:
        return {"words": [f"{word} ({self.vectors})" for word in self.words]}

    def save_texts(self, folder: Path) -> None:
        if not self.words_alone:
            super().save_texts(folder)
        write_words(self.family, self.words, folder / FOLDER, self.text_tunings, self.vectors)


def tables(family: Family) -> dict[str, tuple[Untyped, nn.Module, str]]:
    """Text encoder → its tokenizer, itself, and its name in files.

    Raises:
        ConfigError: the pipeline has encoders that no such file is for.
    """
    name = type(family.pipeline).__name__
    if name not in PIPELINES:
        raise ConfigError(f"new words are for {', '.join(PIPELINES)}, not for {name}")
    known = {part: ENCODERS[part] for part in family.encoders}
    return {part: (getattr(family.pipeline, t), family.encoders[part], key) for part, (t, key) in known.items()}


def tokens_of(word: str, vectors: int) -> list[str]:
    """The tokens of a word of several vectors, as diffusers' pipelines spell it: `<a> <a>_1 <a>_2`."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def spelled(counts: Mapping[str, int], prompt: str | list[str], tokenizer: Untyped = None) -> str | list[str]:
    """Prompts with all the tokens of each word that stands there whole, the longest one first, in either case.

    Takes the place of diffusers' `maybe_convert_prompt`, which replaces parts of words too, and finds the further
    vectors only of words without capitals.
    """
    if not isinstance(prompt, str):
        return [str(spelled(counts, one)) for one in prompt]
    words = sorted(counts, key=len, reverse=True)

    def tokens(found: re.Match[str]) -> str:
        word = found[0] if found[0] in counts else words[(found.lastindex or 1) - 1]
        before, after = prompt[: found.start()][-1:], prompt[found.end() :][:1]
        apart = [" " if re.match(r"\w", beside) else "" for beside in (before, after)]  # a token is a whole word, too
        return " ".join(tokens_of(word, counts[word])).join(apart)

    return re.sub("|".join(map(_whole, words)), tokens, prompt, flags=re.IGNORECASE)


def _whole(word: str) -> str:
    """A pattern for a word that is no part of a longer one; what begins and ends with signs may touch letters."""
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.search(r"\w$", word) else "")
    return f"{before}({re.escape(word)}){after}"


@torch.no_grad()
def add_words(family: Family, words: Mapping[str, str | Mapping[str, Tensor]], vectors: int = 1) -> None:
    """Give tokenizers and encoders new words: each starts as its description, or has embeddings [n, d] by encoder.

    Raises:
        ConfigError: a tokenizer knows the word already, or knows nothing of its description.
    """
    for part, (tokenizer, encoder, _) in tables(family).items():
        encoder_any: AnyModule = encoder
        table = encoder_any.get_input_embeddings().weight
        rows: list[Tensor] = []
        for word, start in words.items():
            if isinstance(start, str):
                ids = list(tokenizer(start, add_special_tokens=False)["input_ids"])
                if not ids:
                    raise ConfigError(f"the tokenizer makes nothing of {start!r}, what {word!r} should start as")
                own = table[ids].mean(0).expand(vectors, -1)
            else:
                own = start[part].to(table)
            rows.extend(own)
            tokens = [AddedToken(token, single_word=True, normalized=False) for token in tokens_of(word, len(own))]
            if tokenizer.add_tokens(tokens) != len(own):
                raise ConfigError(f"the {part}'s tokenizer knows {word!r} already; choose another word")
        if len(tokenizer) - len(table) != len(rows):
            raise ConfigError(
                f"the {part} has embeddings for {len(table)} words and its tokenizer {len(tokenizer) - len(rows)}; new "
                "rows would not be those of the new words"
            )
        encoder_any.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder_any.get_input_embeddings().weight[-len(rows) :] = torch.stack(rows)
        encoder.requires_grad_(False)
    known: dict[str, int] = getattr(family.pipeline.maybe_convert_prompt, "args", ({},))[0]
    counts = {w: vectors if isinstance(start, str) else len(next(iter(start.values()))) for w, start in words.items()}
    family.pipeline.maybe_convert_prompt = partial(spelled, known | counts)


@torch.no_grad()
def write_words(family: Family, words: Facts, folder: Path, tunings: Mapping[str, Tuning], vectors: int = 1) -> None:
    """A file a word: `{word: embeddings}` [n, d] for one encoder, `{clip_l: …, clip_g: …}` for two."""
    known = tables(family)
    found: dict[str, Tensor] = {}
    for part, (tokenizer, encoder, _) in known.items():
        ids = [tokenizer.convert_tokens_to_ids(tokens_of(word, vectors)) for word in words]
        encoder_any: AnyModule = encoder
        with tunings[part].use():
            found[part] = encoder_any.get_input_embeddings()(torch.tensor(ids, device=encoder_any.device)).float()
    for number, word in enumerate(words):
        if len(known) == 1:
            tensors = {word: next(iter(found.values()))[number]}
        else:
            tensors = {key: found[part][number] for part, (_, _, key) in known.items()}
        name = re.sub(r"[^\w.-]", "", word) or f"word{number}"
        write_atomic(folder / f"{name}.safetensors", dump_tensors(tensors, {"format": "pt", "word": word}))


def read_words(path: Path, encoders: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Word → its embeddings [n, d] by encoder, from a file or a folder; `encoders` are names in files by encoder.

    Raises:
        AdapterFileError: no file, or one that is not for these encoders.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise AdapterFileError(f"{path} holds no .safetensors file of a word")
    found: dict[str, dict[str, Tensor]] = {}
    for file in files:
        tensors, facts = read_tensors(file)
        by_encoder = {part: tensors[key] for part, key in encoders.items() if key in tensors}
        if len(encoders) == 1 and len(tensors) == 1 and not by_encoder:
            by_encoder = {part: tensor for part in encoders for tensor in tensors.values()}
            (key,) = tensors
            facts = facts if key in NAMELESS else {"word": key, **facts}
        by_encoder = {part: torch.atleast_2d(tensor) for part, tensor in by_encoder.items()}
        counts = {tensor.shape[0] for tensor in by_encoder.values() if tensor.dim() == 2}
        if set(by_encoder) != set(encoders) or len(counts) != 1 or any(t.dim() > 2 for t in by_encoder.values()):
            shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
            raise AdapterFileError(
                f"{file} holds {shapes}; expected as many vectors [n, d] for each of {', '.join(encoders)}"
            )
        found[facts.get("word", file.stem)] = by_encoder
    return found


def load_words(family: Family, path: Path) -> list[str]:
    """Add the words in a file or a folder to a pipeline; their names.

    Raises:
        AdapterFileError: a file for another pipeline.
    """
    known = tables(family)
    words = read_words(path, {part: key for part, (_, _, key) in known.items()})
    for word, tensors in words.items():
        for part, tensor in tensors.items():
            encoder: AnyModule = known[part][1]
            width = encoder.get_input_embeddings().weight.shape[1]
            if tensor.shape[1] != width:
                raise AdapterFileError(
                    f"{path}: {word!r} has {tensor.shape[1]} features, the {part} has {width}; it is for another "
                    "pipeline"
                )
    add_words(family, words)
    return list(words)
