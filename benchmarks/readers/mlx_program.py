"""MLX's own reader and writer of adapters, `mlx_lm`, under its own interpreter; see `folder_jobs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy
from folder_jobs import answer
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

LORA = {"rank": 4, "scale": 1.7, "dropout": 0.0}
BESIDE = {"lora": None, "dora": {"self_attn.q_proj", "mlp.down_proj", "attn.c_attn", "lm_head"}}
TABLES = {"self_attn.v_proj", "model.embed_tokens", "model.wte"}


def answers(model: Any) -> mx.array:
    """Logits [1, 8, words] of one text."""
    return model(mx.arange(1, 9)[None])


def made(model: Any, kind: str, folder: Path) -> None:
    """Tune the model by mlx_lm, with random values, and write its adapter as `mlx_lm.lora` does."""
    drawn = numpy.random.default_rng(0)
    config: dict[str, Any] = {"fine_tune_type": kind.partition(" ")[0], "num_layers": 1, "lora_parameters": LORA}
    if kind == "full":
        model.freeze()
        model.layers[-1].unfreeze()
    else:
        model.freeze()
        keys = TABLES if kind == "lora table" else BESIDE[kind]
        config["lora_parameters"] = LORA if keys is None else {**LORA, "keys": sorted(keys)}
        linear_to_lora_layers(model, 1, config["lora_parameters"], use_dora=kind == "dora")
    found = dict(tree_flatten(model.trainable_parameters()))
    found = {name: t + mx.array(drawn.normal(size=t.shape, scale=0.1).astype("float32")) for name, t in found.items()}
    model.load_weights(list(found.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), found)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def one(verb: str, base: Path, folder: Path, out: Path, kind: str) -> None:
    """Read a folder, or make one."""
    model, _ = load_model(base)
    model.eval()
    found = {"logits.base": answers(model)}
    mx.eval(found)
    if verb == "read":
        load_adapters(model, str(folder))
    else:
        made(model, kind, folder)
    mx.save_safetensors(str(out), found | {"logits.tuned": answers(model)})


if __name__ == "__main__":
    answer(one)
