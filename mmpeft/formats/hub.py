"""AdapterHub folders, as the library `adapters` writes them: `adapter.safetensors` beside `adapter_config.json`.

Bottlenecks are `<block>.<place>.adapters.<name>.adapter_down.0` and `.adapter_up`, LoRA and (IA)³ are
`<module>.loras.<name>.lora_A` and `.lora_B`; the config says the rest. With h what a sub-layer adds to its input r,
and LN the norm behind the sum, where a model has one there:

    serial      h ← h + U σ(D h)                          Houlsby (`double_seq_bn`)
    stream      r + h ← (r + h) + U σ(D (r + h))          Pfeiffer (`seq_bn`) where there is no LN; with it LN (r + h)
    parallel    h ← h + s U σ(D r)                        He (`par_bn`)

https://github.com/adapter-hub/adapters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError
from mmpeft.formats import hub_lora
from mmpeft.formats.content import Content, check_values, read_json, read_tensors
from mmpeft.formats.tails import module_of
from mmpeft.hosting.modules import CHILD
from mmpeft.types import Facts

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter.safetensors", "model_head.safetensors"
PICKLED = "pytorch_adapter.bin"
ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "tanh": "tanh", "linear": "identity"}
Way = Literal["serial", "stream", "parallel"]
METHODS: dict[str, str] = {"serial": "Houlsby", "stream": "Pfeiffer", "parallel": "ParallelAdapter"}


@dataclass(frozen=True)
class Layout:
    """How `adapters` calls the two places in a block of a model, and whether a norm follows the residual sums.

    `roles` are the linears of its options `intermediate_lora` and `output_lora`; `fused` is the linear of q, k and v.
    """

    attention: str
    network: str
    post_norm: bool
    roles: tuple[str, str] = ("mlp.up", "mlp.down")
    fused: str = ""


BERT = Layout("attention.output", "output", True)
GPT = Layout("attention_adapters", "output_adapters", False)
LLAMA = replace(GPT, roles=("mlp.down", "mlp.up"))  # as the library has it
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("bert", "roberta"), BERT),
    "gpt2": replace(GPT, fused="c_attn"),
    "llama": LLAMA,
}
"""`model_type` → layout of the models whose answers were compared."""


@dataclass(frozen=True)
class Bottleneck:
    """`U σ(D x + b_d) + b_u` at one place in one block, times a constant or a learned scale."""

    depth: int
    place: str
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: Tensor | float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        own = {"down.weight": self.down, "down.bias": self.down_bias, "up.weight": self.up, "up.bias": self.up_bias}
        return own | ({"scale": self.scale} if isinstance(self.scale, Tensor) else {})

    def scaled(self) -> Bottleneck:
        """The same with its scale in U."""
        return replace(self, up=self.up * self.scale, up_bias=self.up_bias * self.scale, scale=1.0)


@dataclass(frozen=True)
class Bottlenecks(Content):
    """A folder of bottlenecks, all of one activation and in one way."""

    way: Way = "serial"
    activation: str = "relu"
    branches: list[Bottleneck] = field(default_factory=list)

    @property
    def method(self) -> str:
        return METHODS[self.way]

    def check(self, where: object) -> None:
        super().check(where)
        check_values(of_branches(self), where)


def branches(content: Content) -> list[Bottleneck]:
    """The bottlenecks of a content; none of most."""
    return content.branches if isinstance(content, Bottlenecks) else []


def of_branches(content: Content) -> dict[str, Tensor]:
    """Tensors of bottlenecks, each by a key of its own."""
    found: dict[str, Tensor] = {}
    for branch in branches(content):
        found |= {f"{name} of {branch.place} in block {branch.depth}": t for name, t in branch.tensors().items()}
    return found


def is_config(config: Facts) -> bool:
    """Whether a config is one of AdapterHub's."""
    return "peft_type" not in config and "model_type" in config and isinstance(config.get("config"), dict)


def read_folder(folder: Path) -> Content:
    """The adapter in a folder of AdapterHub; modules keep their names, bottlenecks have places.

    Raises:
        AdapterFileError: pickled, incomplete, or of a kind that is another method than any here.
    """
    facts = read_json(folder / CONFIG)
    config: Facts = facts["config"]
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise AdapterFileError(
            f"{folder / PICKLED} is pickled; reading it would run code it holds. Write it as safetensors: `python -c "
            f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{PICKLED}', weights_only=True), "
            f"'{WEIGHTS}')\"` in {folder}"
        )
    kind = str(config.get("architecture") or "bottleneck")
    if kind not in ("bottleneck", "lora"):
        raise AdapterFileError(f"{folder / CONFIG}: architecture {kind!r} is not read; bottleneck and lora are")
    tensors, _ = read_tensors(folder / WEIGHTS)
    if kind == "lora":
        layout = LAYOUTS.get(str(facts["model_type"]))
        content = hub_lora.read(config, layout.fused if layout else "", _slots(tensors, "loras", folder), folder)
    else:
        content = _bottlenecks(config, facts, tensors, folder)
    if (folder / HEAD).exists():
        content = replace(content, base=read_tensors(folder / HEAD)[0])
    return content


def _slots(tensors: Mapping[str, Tensor], mark: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """By what precedes `.<mark>.<name>.`, the tensors that follow."""
    found: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        path, middle, rest = key.partition(f".{mark}.")
        name, _, own = rest.partition(".")
        names.add(name)
        if not middle or not own:
            raise AdapterFileError(f"{folder / WEIGHTS}: {key!r} is no part of such an adapter; it would be lost")
        found.setdefault(path, {})[own] = tensor
    if len(names) > 1:
        raise AdapterFileError(f"{folder / WEIGHTS} holds {len(names)} adapters, {sorted(names)}; expected one")
    return found


# -- bottlenecks --------------------------------------------------------------------------------------------


def _bottlenecks(config: Facts, facts: Facts, tensors: Mapping[str, Tensor], folder: Path) -> Content:
    where = folder / CONFIG
    layout = LAYOUTS.get(str(facts["model_type"]))
    if layout is None:
        raise AdapterFileError(
            f"{where}: bottlenecks in a {facts['model_type']} are not read; those in {', '.join(LAYOUTS)} are"
        )
    way = _way(config, layout, where)
    name = str(config.get("non_linearity")).lower()
    if name not in ACTIVATIONS or (name == "gelu" and "version" not in facts):
        raise AdapterFileError(f"{where}: non_linearity {name!r} is not read; known: {', '.join(ACTIVATIONS)}")
    scale = config.get("scaling", 1.0)
    if scale != "learned" and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise AdapterFileError(f"{where}: scaling {scale!r} is not read; a number and 'learned' are")
    found = []
    for path, own in _slots(tensors, "adapters", folder).items():
        depth, place = _place(path, layout, folder)
        names = {"adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"}
        names |= {"scaling"} if scale == "learned" else set()
        if set(own) != names:
            odd = sorted(set(own) ^ names)
            raise AdapterFileError(f"{folder}: {path} has {sorted(own)}; {odd} should be there or not, by its config")
        d, bd, u, bu = (own[n] for n in ("adapter_down.0.weight", "adapter_down.0.bias", *SECOND))
        if d.dim() != 2 or u.shape != d.T.shape or bd.shape != (len(d),) or bu.shape != (len(u),):
            raise AdapterFileError(
                f"{folder}: {path} has down {list(d.shape)} and up {list(u.shape)}; not one bottleneck"
            )
        branch = Bottleneck(depth, place, d, bd, u, bu, own["scaling"] if scale == "learned" else float(scale))
        found.append(branch if way == "parallel" else branch.scaled())
    return Bottlenecks("adapterhub", way=way, activation=ACTIVATIONS[name], branches=found)


SECOND = ("adapter_up.weight", "adapter_up.bias")
OTHERS = {
    "ln_before": "a norm of its own before the bottleneck",
    "ln_after": "a norm of its own behind the bottleneck",
    "use_gating": "a gate",
    "phm_layer": "Kronecker products with a rule of its own (Compacter)",
    "inv_adapter": "invertible layers behind the table of words",
    "cross_adapter": "bottlenecks behind cross-attention",
}
"""Options that make another method of a bottleneck."""


def _way(config: Facts, layout: Layout, where: Path) -> Way:
    """How bottlenecks enter a block, by the options.

    Raises:
        AdapterFileError: in a way that no method here has.
    """
    for option, why in OTHERS.items():
        if config.get(option):
            raise AdapterFileError(f"{where}: {option} means {why}; no method here is that, and it cannot be loaded")
    names = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
    parallel, before, after, residual = (config.get(n, d) for n, d in zip(names, (False, False, True, True)))
    if parallel:
        if after and layout.post_norm:
            return "parallel"
        why = "here a parallel bottleneck reads what its sub-layer reads, there the sum before the norm"
    elif not before:
        if after and residual in (True, False):
            return "serial"
        why = "the residual sum is left out"
    else:
        one_sum = (residual is False and after is False) or (not layout.post_norm and residual is True and after)
        if one_sum and config.get("output_adapter") and not config.get("mh_adapter"):
            return "stream"
        why = "the norm runs before the bottleneck and once more behind it, or in the middle of a block"
    told = ", ".join(f"{n}={config.get(n)}" for n in names)
    raise AdapterFileError(f"{where}: {told}: {why}; no method here is that, and it cannot be loaded")


def _place(path: str, layout: Layout, folder: Path) -> tuple[int, str]:
    """Block and place that a key names."""
    for place, own in (("attn", layout.attention), ("mlp", layout.network)):
        block = path.removesuffix(f".{own}")
        number = block.rpartition(".")[2]
        if block != path and number.isdigit():
            return int(number), place
    raise AdapterFileError(f"{folder / WEIGHTS}: {path!r} is no place for a bottleneck in such a model")


# -- by a model ---------------------------------------------------------------------------------------------


def named(content: Content, model: nn.Module, where: object) -> Content:
    """A folder's updates by the model's own module paths."""
    modules = [name for name, _ in model.named_modules() if CHILD not in name.split(".")]
    return replace(
        content,
        layers=[replace(layer, path=module_of(layer.path, modules)) for layer in content.layers],
        scalings=[replace(scaling, path=module_of(scaling.path, modules)) for scaling in content.scalings],
    )
