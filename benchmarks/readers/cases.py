"""Tiny models of the shapes that other programs expect, tunings of them, and the files of those."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import mmpeft
from benchmarks.readers.job import Job
from mmpeft.errors import MMPEFTError, SiteError
from mmpeft.formats.exchange import export, export_pipeline
from mmpeft.formats.merged import merged_copy

ATTENTION = "attn.{q,k,v,out}|cross.{q,k,v,out}|mlp.*"
METHODS: dict[str, mmpeft.Method] = {
    "LoRA": mmpeft.LoRA(at=ATTENTION, rank=2, alpha=3),
    "LoRA, two ranks": mmpeft.LoRA(at=ATTENTION, rank=2, alpha=3, rank_pattern={"mlp.*": 4}),
    "LoRA on convolutions": mmpeft.LoRA(at="conv|attn.q", rank=2),
    "DoRA": mmpeft.DoRA(at=ATTENTION, rank=2),
    "DoRA, comfy": mmpeft.DoRA(at=ATTENTION, rank=2),
    "DoRA, difference": mmpeft.DoRA(at=ATTENTION, rank=2),
    "DoRA, low_rank": mmpeft.DoRA(at=ATTENTION, rank=2),
    "LoHa": mmpeft.LoHa(at=ATTENTION, rank=2),
    "LoKr": mmpeft.LoKr(at=ATTENTION, rank=2),
    "BitFit": mmpeft.BitFit(create=False),
    "norms": mmpeft.NormTuning(),
    "full": mmpeft.Full(at="attn.q|cross.k"),
}
TEXT = mmpeft.LoRA(at="attn.{q,k,v,out}|mlp.*", rank=2, alpha=1)


def _clip(projection: bool = False) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=64, max_position_embeddings=16, projection_dim=16, **sizes)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5(width: int) -> Any:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def _unet(attended: str, widths: tuple[int, ...], **more: Any) -> Any:
    down = tuple("CrossAttnDownBlock2D" if one == "a" else "DownBlock2D" for one in attended)
    up = tuple("CrossAttnUpBlock2D" if one == "a" else "UpBlock2D" for one in reversed(attended))
    sizes = {"sample_size": 16, "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4}
    sizes |= {"cross_attention_dim": 16, "down_block_types": down, "up_block_types": up, "block_out_channels": widths}
    return UNet2DConditionModel(**{**sizes, **more})


def _sd() -> dict[str, nn.Module]:
    return {"unet": _unet("aaa-", (8, 8, 16, 16)), "text_encoder": _clip()}


def _sdxl() -> dict[str, nn.Module]:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
    added |= {"projection_class_embeddings_input_dim": 40, "transformer_layers_per_block": (1, 2, 3)}
    unet = _unet("-aa", (8, 16, 16), cross_attention_dim=32, **added)
    return {"unet": unet, "text_encoder": _clip(), "text_encoder_2": _clip(projection=True)}


def _sd3() -> dict[str, nn.Module]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    encoders = {"text_encoder": _clip(True), "text_encoder_2": _clip(True), "text_encoder_3": _t5(32)}
    return {"transformer": transformer, **encoders}


def _flux() -> dict[str, nn.Module]:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {"transformer": transformer, "text_encoder": _clip(), "text_encoder_2": _t5(16)}


def _pixart() -> dict[str, nn.Module]:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        caption_channels=16,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return {"transformer": transformer}


KINDS = {"SD 1.5": _sd, "SDXL": _sdxl, "SD3": _sd3, "Flux": _flux, "PixArt": _pixart}
FORMATS = ("diffusers", "kohya", "comfy")


def models_of(kind: str, seed: int = 0) -> dict[str, nn.Module]:
    """The tunable models of a pipeline, by component; no tensor is all zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = KINDS[kind]()
        for model in models.values():
            for parameter in model.eval().parameters():
                if not parameter.detach().any():
                    nn.init.normal_(parameter, std=0.05)
    return models


def prepared(kind: str, method: str, folder: Path) -> tuple[dict[str, mmpeft.Tuning], dict[str, Tensor]]:
    """Tunings of a pipeline's models, moved off their start, and every tensor that they change, as it becomes."""
    models = models_of(kind)
    base = {f"{name}.{key}": t.clone() for name, model in models.items() for key, t in model.state_dict().items()}
    save_file({key: tensor.clone() for key, tensor in base.items()}, folder / "base.safetensors")
    chosen = models.items() if method == "LoRA and text encoders" else list(models.items())[:1]
    tunings = {}
    for i, (name, model) in enumerate(chosen):
        own = METHODS.get(method, METHODS["LoRA"]) if not name.startswith("text") else TEXT
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(i)  # before attach, which draws as well: the table is the same in every run
            tunings[name] = mmpeft.attach(model, own)
            for parameter in tunings[name].parameters():
                parameter += torch.randn(parameter.shape) * 0.1
    wanted = {
        f"{name}.{key}": tensor
        for name, tuning in tunings.items()
        for key, tensor in merged_copy(tuning).state_dict().items()
        if not torch.equal(tensor, base[f"{name}.{key}"])
    }
    return tunings, wanted


def cases(folder: Path, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[tuple[Job, dict[str, Tensor] | str]]:
    """Every file, with the tensors that it should give, or why it is not written."""
    for kind in kinds:
        methods = ["LoRA", "LoRA and text encoders", *list(METHODS)[1:]]
        for method in methods:
            if kind == "PixArt" and method == "LoRA and text encoders":  # its only encoder is a T5
                continue
            own = folder / f"{kind}-{method}".replace(" ", "_").replace(",", "")
            own.mkdir(parents=True)
            try:
                tunings, wanted = prepared(kind, method, own)
            except SiteError:  # a transformer has no convolutions
                continue
            configs = {name: _config(tuning.model) for name, tuning in tunings.items()}
            form = method.partition("DoRA, ")[2]
            for format in FORMATS:
                file, base = str(own / f"{format}.safetensors"), str(own / "base.safetensors")
                job = Job(kind, format, method, file, base, configs, "")
                try:
                    _write(tunings, Path(file), format, form)
                    yield job, wanted
                except MMPEFTError as error:
                    yield job, str(error)


def _config(model: Any) -> dict[str, Any]:
    return dict(model.config.to_dict() if hasattr(model.config, "to_dict") else model.config)


def _write(tunings: dict[str, mmpeft.Tuning], file: Path, format: Any, form: Any) -> None:
    encoders = 2 if "transformer" in tunings or len(tunings) > 2 else 1
    if format in ("diffusers", "kohya"):
        export_pipeline(tunings, file, format, verify=False, encoders=encoders, dora=form)
        return
    (name, tuning), *rest = tunings.items()
    if rest:
        raise MMPEFTError("a comfy file is for one model")
    export(tuning, file, "comfy", verify=False, prefix=name, dora=form)
