"""Tokens, and places among them for the features of pictures and sound."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmpeft.llm.inputs.request import MODALITIES, ROWS, TOKENS, Request
from mmpeft.types import Kwargs

_OTHER = ("pixel_values", "input_features", "input_values", "inputs", "flattened_patches", "pixel_values_videos")


def _vocabulary(request: Request, *parts: str) -> int:
    """Rows of the embedding that reads the tokens."""
    if not parts:
        try:
            table = request.model.get_input_embeddings()  # type: ignore[operator]  # of transformers
        except (NotImplementedError, AttributeError):
            table = None
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
    config = request.part(*parts) if parts else request.config
    return int(getattr(config, "vocab_size", None) or request.find("vocab_size", default=100))


def _special(request: Request) -> set[int]:
    """Every id that some config gives a meaning."""
    found: set[int] = set()
    for config in request.configs():
        for name, value in vars(config).items():
            if name.endswith(("_id", "_ids", "_index", "_token")):
                values = value if isinstance(value, list | tuple) else [value]
                found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    return found


def _tokens(request: Request, vocabulary: int) -> Tensor:
    special = _special(request)
    plain = [t for t in range(3, vocabulary) if t not in special] or [0]
    return torch.tensor(plain)[request.whole(0, len(plain), ROWS, TOKENS)]


def _input_ids(request: Request) -> Tensor | None:
    other = request.main in _OTHER or request.kind in ("pop2piano",)
    if request.config.is_encoder_decoder and other and "input_ids" not in request.required:
        return None
    vocabulary = _vocabulary(request, *_text_part(request))
    tokens = _tokens(request, min(vocabulary, 60) if request.kind in _BOOKS_LAST else vocabulary)
    books = request.find("num_codebooks") if request.kind in _BOOKS_LAST else None
    if books and request.kind.startswith("kyutai"):
        books += 1  # the text beside them
    return tokens[..., None].repeat(1, 1, books) if books else tokens


_BOOKS_LAST = ("csm", "kyutai_speech_to_text")


def _text_part(request: Request) -> tuple[str, ...]:
    return ("text",) if request.part("text") is not request.config else ()


def _decoder_input_ids(request: Request) -> Tensor | None:
    if not request.config.is_encoder_decoder and "decoder_input_ids" not in request.required:
        return None
    decoder = request.part("decoder")
    decoder = request.part("text") if decoder is request.config else decoder
    tokens = _tokens(request, int(getattr(decoder, "vocab_size", None) or _vocabulary(request)))
    channels = getattr(decoder, "num_channels", None) if request.kind == "dia" else None
    if request.kind.startswith("musicgen"):  # the books of a row are rows of their own
        return tokens.repeat(int(decoder.num_codebooks), 1)
    return tokens[..., None].repeat(1, 1, channels) if channels else tokens


def _ones(request: Request) -> Tensor:
    return torch.ones(ROWS, TOKENS, dtype=torch.long)


def _wants_mask(request: Request) -> bool:
    return "attention_mask" in request.required or request.kind in ("qwen2_audio", "pi0")


def _text(request: Request) -> Tensor:
    return _tokens(request, int(request.find("vocab_size", default=100)))


def _if_required(name: str, maker: Callable[[Request], object]) -> Callable[[Request], object]:
    return lambda request: maker(request) if name in request.required else None


def _boxes(request: Request) -> Tensor:
    start = request.whole(0, 100, ROWS, TOKENS, 2)
    return torch.cat([start, start + request.whole(1, 100, ROWS, TOKENS, 2)], -1)


def _crossed(request: Request) -> Tensor | None:
    """What a decoder that stands alone crosses to."""
    if request.kind not in ("blip_2_qformer",):
        return None
    return request.noise(ROWS, TOKENS, int(request.config.encoder_hidden_size))


def _image_places(request: Request) -> Tensor:
    """The tokens behind the first that stand for the picture."""
    count = int(request.find("latent_query_num"))
    places = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    places[:, 1 : 1 + count] = 1
    return places


def _classes(request: Request) -> dict[str, Tensor]:
    """Names to look for in a picture: two a row, each a short text, and the task."""
    words = torch.cat([_text(request), _text(request)])
    return {
        "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words),
        "tasks_input_ids": _text(request),
        "tasks_attention_mask": _ones(request),
        "classes_structure": torch.tensor([2] * ROWS),
    }


TEXTS: dict[str, Callable[[Request], object]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_input_ids,
    "bbox": _boxes,
    "use_cache": lambda request: False,
    "image_embeds_position_mask": _image_places,
    "image_attention_mask": lambda request: torch.ones(ROWS, TOKENS, 1) if request.kind == "idefics" else None,
    "encoder_hidden_states": _crossed,
    "attention_mask": lambda request: _ones(request) if _wants_mask(request) else None,
    "qformer_input_ids": _if_required("qformer_input_ids", _text),
    "classes_input_ids": _classes,
    "task_inputs": lambda request: request.whole(3, 100, ROWS, int(request.find("task_seq_len", default=77))),
}


def place_features(request: Request, made: Kwargs) -> None:
    """Put a placeholder among the tokens for every feature of a picture or a sound, in rows of one length."""
    ids = made.get("input_ids")
    if ids is None:
        return
    kinds = torch.zeros_like(ids)
    for number, modality in enumerate(MODALITIES, 1):
        place = request.find(f"{modality}_token_id", f"{modality}_token_index")
        count = _features(request, modality, made) if place is not None else 0
        if count:
            added = torch.full((ROWS, count // ROWS), place)
            ids = torch.cat([ids[:, :1], added, ids[:, 1:]], 1)
            kinds = torch.cat([kinds[:, :1], torch.full_like(added, number), kinds[:, 1:]], 1)
    made["input_ids"] = ids
    if "mm_token_type_ids" in request.names:
        made["mm_token_type_ids"] = kinds
    if "token_type_ids" in request.required:
        made["token_type_ids"] = torch.zeros_like(ids)
    if "attention_mask" in made:
        made["attention_mask"] = torch.ones_like(ids)


def _features(request: Request, modality: str, made: Kwargs) -> int:
    """How many features the tower of a modality gives for what was made, by running it."""
    run = request.tower(modality)
    taken = inspect.signature(run).parameters if run else {}
    if modality == "audio" and "input_features" in made and (run is None or "input_ids" in taken):
        return _counted(request, made)  # it needs the tokens first
    if run is None:
        return 0
    given = {name: made[name] for name in taken if name in made}
    if modality == "audio" and given:
        for name, parameter in taken.items():  # that the whole makes out of its own arguments
            if parameter.default is parameter.empty and name.endswith("mask") and name not in made:
                given[name] = torch.ones(ROWS, next(iter(given.values())).shape[-1], dtype=torch.long)
    if modality == "video" and not any("video" in name for name in given):
        return 0
    if not any(torch.is_tensor(v) and v.is_floating_point() for v in given.values()):
        return 0
    where = next(request.model.parameters()).device
    with torch.no_grad():
        found = run(**{name: value.to(where) if torch.is_tensor(value) else value for name, value in given.items()})
    pooled = getattr(found, "pooler_output", None)
    if pooled is None and (deep := getattr(found, "deepstack_features", None)):
        pooled = deep[0][1]
    found = getattr(found, "last_hidden_state", found) if pooled is None else pooled
    found = list(found) if isinstance(found, list | tuple) else [found]
    wide = 0 if "images_per_sample" in given else -1  # where a map keeps its height and width
    count = sum(f.numel() // f.shape[wide] for f in found if torch.is_tensor(f))
    filled = request.find("audio_soft_tokens_per_image", default=0) if modality == "audio" and count else 0
    return max(count, ROWS * int(filled))


def _counted(request: Request, made: Kwargs) -> int:
    """How many features the tower of sound says that it gives."""
    counts = [f for m in request.model.modules() if (f := getattr(m, "_get_feat_extract_output_lengths", None))]
    if not counts:
        return 0
    mask = next((made[n] for n in made if n.endswith("mask") and n != "attention_mask"), None)
    frames = made["input_features"].shape[-1] if mask is None else int(mask[0].sum())
    found = counts[0](torch.tensor(frames))
    return ROWS * int(found[-1] if isinstance(found, tuple) else found)
