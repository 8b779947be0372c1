"""Where transformers' models can be tuned: decoders, encoders, encoder-decoders, and their ViT, CLIP and SigLIP.

A family is known by the names of the modules in its blocks, so that a new model that keeps Llama's or BERT's
names needs no new line. Registered by class name: importing this file imports no transformers. What is said
here of a module is checked by running the models in `tests/unit/test_anatomy_transformers.py`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mmpeft.errors import SiteError
from mmpeft.functional.rows import count_rows
from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import own_modules, own_parameters
from mmpeft.llm.attention import consults, view
from mmpeft.llm.prompt import bidirectional, cross_attended, prompted, stripped, unlengthened
from mmpeft.llm.rotary import shifted
from mmpeft.llm.written_out import cosine, refusal
from mmpeft.parts.attention import attend
from mmpeft.sites import Connect, Site, anatomy
from mmpeft.sites.builder import Builder, is_a, weight_shape

TEXT = "positions and the attention mask are made before the blocks; tokens put in between would have neither"
EMBEDDINGS = {
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "token_embedding",
    "patch_embedding",
    "projection",
}
HEAD = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "classification_head"}


@dataclass(frozen=True)
class Sublayer:
    """Module names of one sub-layer, below the block.

    `linears` maps what a projection is for to its name: `q`, or `q,k,v` where they stand one behind the other
    in one projection, or `q|k|v` where every head has its three together. `stream` is the norm that reads the
    residual stream (in a post-norm block the sub-layer itself), `after` a norm on the output before the residual
    sum, `entry` the module that reads the input where no module holds the whole sub-layer.
    """

    role: str
    path: str
    linears: dict[str, str]
    stream: str = ""
    after: str = ""
    entry: str = ""


def _attn(
    path: str, qkv: str | dict[str, str], out: str, stream: str = "", role: str = "attn", **known: str
) -> Sublayer:
    """An attention sub-layer whose four projections are below `path`."""
    linears = {name: f"{path}.{name}{qkv}" for name in "qkv"} if isinstance(qkv, str) else dict(qkv)
    return Sublayer(role, path, {**linears, "out": f"{path}.{out}"}, stream or path, **known)


def _mlp(path: str, stream: str, after: str = "", **linears: str) -> Sublayer:
    """A feed-forward sub-layer whose projections are below `path`; `gate_up` is one projection, the gate first."""
    named = {name.replace("_", ","): f"{path}.{module}" for name, module in linears.items()}
    return Sublayer("mlp", path, named, stream, after)


def _bert(role: str, path: str) -> Sublayer:
    names = {"q": f"{path}.self.query", "k": f"{path}.self.key", "v": f"{path}.self.value"}
    end, entry = f"{path}.output.dense", f"{path}.self"
    return Sublayer(role, end, {**names, "out": end}, stream=entry, entry=entry)


def _t5(mlp: str) -> list[tuple[Sublayer, ...]]:
    own = _attn("layer.0.SelfAttention", "", "o", "layer.0.layer_norm")
    cross = _attn("layer.1.EncDecAttention", "", "o", "layer.1.layer_norm", role="cross")
    path, norm = f"{mlp}.DenseReluDense", f"{mlp}.layer_norm"
    others = (cross,) if mlp == "layer.2" else ()
    return [
        (own, *others, _mlp(path, norm, up="wi_1", gate="wi_0", down="wo")),
        (own, *others, _mlp(path, norm, up="wi", down="wo")),
    ]


_SELF, _NORM1, _NORM2 = "self_attn", "input_layernorm", "post_attention_layernorm"
_GATED = {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}
_FC = {"up": "fc1", "down": "fc2"}
_FUSED, _HEADS = "q,k,v", "q|k|v"

LAYOUTS: list[tuple[Sublayer, ...]] = [
    (  # Gemma 2 and 3: norms on both sides of each sub-layer
        _attn(_SELF, "_proj", "o_proj", _NORM1, after=_NORM2),
        _mlp("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm", **_GATED),
    ),
    (  # OLMo 2: norms on the outputs alone
        _attn(_SELF, "_proj", "o_proj", _SELF, after=_NORM2),
        _mlp("mlp", "mlp", "post_feedforward_layernorm", **_GATED),
    ),
    # Llama, Qwen 2 and 3, Mistral, Gemma, SmolLM, ...
    (_attn(_SELF, "_proj", "o_proj", _NORM1), _mlp("mlp", _NORM2, **_GATED)),
    (  # Phi-3 and 4
        _attn(_SELF, {_FUSED: f"{_SELF}.qkv_proj"}, "o_proj", _NORM1),
        _mlp("mlp", _NORM2, gate_up="gate_up_proj", down="down_proj"),
    ),
    # Phi-1 and 2: both sub-layers read the same norm
    (_attn(_SELF, "_proj", "dense", _NORM1), _mlp("mlp", _NORM1, **_FC)),
    (_attn("attn", {_FUSED: "attn.c_attn"}, "c_proj", "ln_1"), _mlp("mlp", "ln_2", up="c_fc", down="c_proj")),  # GPT-2
    (  # GPT-NeoX, Pythia
        _attn("attention", {_HEADS: "attention.query_key_value"}, "dense", _NORM1),
        _mlp("mlp", _NORM2, up="dense_h_to_4h", down="dense_4h_to_h"),
    ),
    *(  # BERT, RoBERTa, with and without cross-attention: no module holds a sub-layer without its residual sum
        (
            _bert("attn", "attention"),
            *others,
            Sublayer(
                "mlp",
                "output.dense",
                {"up": "intermediate.dense", "down": "output.dense"},
                stream="intermediate",
                entry="intermediate",
            ),
        )
        for others in ((_bert("cross", "crossattention"),), ())
    ),
    *_t5("layer.2"),
    *_t5("layer.1"),
    (_attn("attention", "_proj", "o_proj", "layernorm_before"), _mlp("mlp", "layernorm_after", **_FC)),  # ViT
    (_attn(_SELF, "_proj", "out_proj", "layer_norm1"), _mlp("mlp", "layer_norm2", **_FC)),  # CLIP, SigLIP
]


@anatomy("transformers.modeling_utils.PreTrainedModel")
def transformer(model: nn.Module) -> list[Site]:
    """Any transformers model whose blocks have a known layout.

    Raises:
        SiteError: no block has one.
    """
    builder = _Builder(model)
    depths: dict[str, int] = {}
    for path, block in list(builder.modules()):
        layout = next((layout for layout in LAYOUTS if _fits(block, layout)), None)
        if layout is not None:
            builder.tower = builder.tower_of(path)
            depth = depths.get(builder.tower, 0)
            depths[builder.tower] = depth + 1
            if depth == 0:
                builder.add(path.rpartition(".")[0], "stack")
            builder.layer(path, layout, depth)
    if not depths:
        known = "Llama, Phi, GPT-2, GPT-NeoX, BERT, T5, ViT and CLIP"
        raise SiteError(f"{type(model).__name__} has no block of a known layout; known are those of {known}")
    paths = [path for path, _ in builder.modules()]
    found = builder.finish(
        embed={path for path in paths if path.rpartition(".")[2] in EMBEDDINGS},
        heads={path for path in paths if HEADS & set(path.split("."))},
    )
    where, prompt = _prompt(builder, found)
    words = {s.path for s in found if s.kind == "embedding" and s.role == "embed" and f"{s.path}.".startswith(where)}
    return [replace(s, connect=prompt) if s.path in words else s for s in found]


def _prompt(builder: _Builder, found: list[Site]) -> tuple[str, Connect | None]:
    """How a prompt gets before the text, and where the text's embedding is; None where no way is known."""
    stacks = {s.tower: s.path for s in found if s.role == "stack" and s.tower != "image"}
    towers = set(stacks)
    attentions = [s for s in found if s.role == "kv" and s.tower in towers]
    causal = [getattr(builder.module(s.path), "is_causal", False) for s in attentions]
    asked = [consults(builder.module(s.path)) for s in attentions]
    if towers == {"lm"} and all(causal) and all(asked):
        path = _model_around(builder, stacks["lm"])
        layers = len(list(builder.module(stacks["lm"]).children()))
        if layers == len(attentions) and _told_positions(builder.module(path)):
            return f"{path}.".lstrip("."), Connect(path, prompted, layers=True)
        return "", None  # where blocks are of another kind, some have no keys to put the prompt's in front of
    around = builder.module(_model_around(builder, stacks["lm"])) if towers == {"lm"} else None
    if around is not None and getattr(getattr(around, "config", None), "is_decoder", False):
        return "", None  # a cache, in which the prompt would be again with every word
    stacks = {tower: path.rpartition(".")[0] for tower, path in stacks.items()}
    whole = {tower: is_a(builder.module(path), "PreTrainedModel") for tower, path in stacks.items()}
    if towers == {"encoder", "decoder"} and all(whole.values()):  # T5
        path = stacks["encoder"]
        return f"{path}.", Connect(path, bidirectional, beside=((stacks["decoder"], cross_attended),))
    if towers == {"lm"} and not any(causal):
        path = stacks["lm"]
        if whole["lm"]:  # T5's encoder alone
            return f"{path}.", Connect(path, stripped)
        model = path.rpartition(".")[0]  # BERT: embeddings and pooler are beside the encoder
        if is_a(builder.module(model), "PreTrainedModel"):
            return f"{model}.".lstrip("."), Connect(model, stripped, beside=((path, unlengthened),))
    return "", None


def _model_around(builder: _Builder, path: str) -> str:
    """The nearest model of transformers around a stack of blocks: it takes words or embeddings, and positions."""
    while path and not is_a(builder.module(path), "PreTrainedModel"):
        path = path.rpartition(".")[0]
    return path


def _told_positions(model: nn.Module) -> bool:
    """Whether all that a model knows of positions is told by `position_ids`, so that a text can be moved."""
    config = getattr(model, "config", None)
    if getattr(config, "alibi", False) or getattr(config, "attention_chunk_size", None):
        return False  # by distance out of the mask; windows of which a moved text would have others
    counted = any(isinstance(m, nn.Embedding) and "attention_mask" in _arguments(m) for _, m in own_modules(model))
    return not counted and "position_ids" in _arguments(model)


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(original_class(module).forward).parameters)


def _has(block: nn.Module, path: str) -> bool:
    module: Any = block
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return False
    return True


def _fits(block: nn.Module, layout: tuple[Sublayer, ...]) -> bool:
    """Whether a block has every module that a layout names."""
    return all(
        _has(block, name) for sub in layout for name in (*sub.linears.values(), sub.stream, *filter(None, (sub.after,)))
    )


class _Builder(Builder):
    def tower_of(self, path: str) -> str:
        """`image` and `text` of a pair, `encoder` and `decoder` of a sequence-to-sequence model, else `lm`."""
        names, config = path.split("."), self.model.config
        if "vision_model" in names or "text_model" in names:
            return "image" if "vision_model" in names else "text"
        if getattr(config, "is_encoder_decoder", False):
            return next((name for name in names if name in ("encoder", "decoder")), "")
        if hasattr(config, "patch_size"):
            return "image"
        return "text" if str(config.model_type).endswith("_text_model") else "lm"  # type: ignore[union-attr]

    def outside(self, path: str, around: str) -> str:
        return self.tower_of(path)

    def layer(self, path: str, layout: tuple[Sublayer, ...], depth: int) -> None:
        """One block: its own site, its sub-layers and their projections, the tokens it sees."""
        width = self.features(f"{path}.{layout[0].linears['out']}")[0]
        self.block(path, depth, width)
        for sub in layout:
            for uses, name in sub.linears.items():
                self.projection(f"{path}.{name}", sub, uses, depth, path)
            known = {"stream": sub.stream, "out": sub.after, "entry": sub.entry}
            paths = {key: f"{path}.{name}" for key, name in known.items() if name}
            self.add(f"{path}.{sub.path}", sub.role, depth, width=width, **paths)
            if sub.role != "mlp":
                self.keys_and_values(path, sub, depth, width)
        refuse = "" if self.tower == "image" else TEXT
        self.add(path, "tokens", depth, width=width, prefix=self.prefix(), refuse=refuse)

    def keys_and_values(self, path: str, sub: Sublayer, depth: int, width: int) -> None:
        """The `kv` site of an attention: the module whose config names the attention function."""
        where = f"{path}.{sub.entry or sub.path}"
        module = self.module(where)
        head = next((size for name in HEAD if (size := getattr(module, name, 0))), 0)
        keys, values = (
            next(s for s in self.sites if s.role == f"{sub.role}.{name}" and s.depth == depth and f"{path}." in s.path)
            for name in "kv"
        )
        heads = count_rows(keys.rows, self.features(keys.path)[0]) // head
        connect, refuse = Connect("config", view, shift=shifted), ""
        if not consults(module):
            connect = Connect("", cosine if hasattr(module, "logit_scale") else attend)
            refuse = refusal(module, width, self.features(values.path)[1] if sub.role == "cross" else 0)
        self.add(where, "kv", depth, width=head, heads=heads, connect=connect, refuse=refuse)

    def projection(self, path: str, sub: Sublayer, uses: str, depth: int, block: str) -> None:
        """One projection, for one use or for several."""
        total = self.features(path)[0]
        if "|" in uses:
            period = total // int(self.model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
            self.interleaved(path, [f"{sub.role}.{use}" for use in uses.split("|")], period, depth)
            return
        roles = [f"{sub.role}.{use}" for use in uses.split(",")]
        sizes = [total // len(roles)] * len(roles)
        if len(roles) == 3:  # queries are as wide as what the output projection reads; keys and values may be fewer
            queries = self.features(f"{block}.{sub.linears['out']}")[1]
            sizes = [queries, (total - queries) // 2, (total - queries) // 2]
        if len(roles) == 1:
            self.linear(path, roles[0], depth)
        else:
            self.fused(path, roles, sizes, depth)

    def features(self, path: str) -> tuple[int, int]:
        """(outputs, inputs) of a projection."""
        module: Any = self.module(path)
        shape = weight_shape(module)
        return (int(shape[1]), int(shape[0])) if hasattr(module, "nf") else (int(shape[0]), int(shape[1]))

    def prefix(self) -> int:
        """Tokens before the patches."""
        one = ("cls_token", "class_embedding", "distillation_token")
        return sum(name.endswith(one) for name, _ in own_parameters(self.model))
