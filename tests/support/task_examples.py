"""The smallest run of every task there is: what a new task adds here is tested by the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

PAIR, VIT = "embedded:clip_emoji", "embedded:vit_emoji"
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}


def of(class_path: str, **arguments: Any) -> dict[str, Any]:
    """A class with its arguments, as a configuration has it."""
    return {"class_path": class_path, "init_args": arguments}


def _run(task: str, data: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
    return {"model": of(task, **{"optimizer": SGD, **options}), "data": data, "method": method, "seed": 3}


SCENES: dict[str, Any] = {"scenes": 4, "eval_scenes": 2, "image_size": 64, "batch_size": 2, "eval_batch_size": 2}
DRAWINGS = of("EmojiStyle", images=4, test_images=4, resolution=32, batch_size=2, eval_batch_size=2)
SHOW = of("Show", prompts=[], steps=2)
UNET = "embedded:unet_emoji"
EXAMPLES: dict[str, dict[str, Any]] = {
    "ImageClassifier": _run("ImageClassifier", of("EmojiData", shots=1, batch_size=4), "LoRA(rank=1)", backbone=VIT),
    "DepthEstimator": _run("DepthEstimator", of("SceneDepthData", **SCENES), "BitFit", backbone=VIT, image_size=64),
    "ContrastiveTuner": _run(
        "ContrastiveTuner",
        of("CaptionData", train="pairs.csv", val="pairs.csv", batch_size=2),
        "SSF(at='image:norm')",
        backbone=PAIR,
    ),
    "FewShot": _run(
        "FewShot",
        of(
            "FewShotData",
            source=of("EmojiKinds", least=40, least_test=8, most=40, most_test=8),
            shots=1,
            batch_size=4,
            eval_batch_size=4,
        ),
        "CoOp(tokens=2)",
        backbone=PAIR,
        views=1,
    ),
    "Segmenter": _run(
        "Segmenter",
        of("SceneSegmentationData", **SCENES),
        "LoRA(at='image:attn.q', rank=1)",
        backbone=PAIR,
        decoder=of("CLIPSegDecoder", width=8, heads=2),
        image_size=64,
    ),
    "VisualQuestions": _run(
        "VisualQuestions",
        of("SceneQuestionData", **SCENES),
        "Houlsby(at='image:attn', bottleneck=1)",
        backbone=PAIR,
        fusion=of("Fusion", width=8, depth=1, heads=2),
        image_size=64,
    ),
    "StyleTuner": _run("StyleTuner", DRAWINGS, "LoRA(at='attn.q', rank=1)", pipeline=UNET, show=SHOW),
    "SliderTuner": _run(
        "SliderTuner",
        DRAWINGS,
        "LoRA(at='attn.q', rank=1)",
        pipeline=UNET,
        show=SHOW,
        concept="a face",
        more="a smiling face",
        less="a sad face",
    ),
    "WordTuner": _run(
        "WordTuner", DRAWINGS, "LoRA(at='cross.k', rank=1)", pipeline=UNET, show=SHOW, words={"<emoji>": "drawing"}
    ),
}
"""Configurations by the names in the domains' tables `TASKS`."""

PRETRAINING: dict[str, dict[str, Any]] = {
    "EmojiPretraining": _run(
        "EmojiPretraining",
        of("EmojiPairs", batch_size=2),
        "Full",
        architecture={
            "img_size": 64,
            "patch_size": 16,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "class_token": False,
            "global_pool": "avg",
        },
    )
    | {"sgd": False},
    "PairPretraining": _run(
        "PairPretraining",
        of("CaptionedEmojiData", batch_size=4),
        "Full",
        model_cfg={
            "embed_dim": 192,
            "vision_cfg": {"timm_model_name": "vit_emoji_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
            "text_cfg": {
                "context_length": 32,
                "vocab_size": 1024,
                "hf_tokenizer_name": "local",
                "width": 32,
                "heads": 2,
                "layers": 1,
            },
        },
    ),
    "RegionPretraining": _run("RegionPretraining", of("CaptionedEmojiData", batch_size=4), "Full", mosaic=1.0),
    "PipelinePretraining": _run(
        "PipelinePretraining",
        of("DrawnCaptionsData", batch_size=2),
        "Full",
        name="tiny",
        denoiser="PixArtTransformer2DModel",
        config={
            "sample_size": 32,
            "patch_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "caption_channels": 192,
            "use_additional_conditions": False,
        },
    ),
}
for _facts in PRETRAINING.values():
    if not _facts.pop("sgd", True):
        del _facts["model"]["init_args"]["optimizer"]  # the task's own, whose groups no other takes


def write_pairs(folder: Path) -> None:
    """Four pictures with texts, and the table that names them."""
    colours = {"a red apple": "red", "a blue car": "blue", "a green tree": "green", "a grey house": "grey"}
    for number, colour in enumerate(colours.values()):
        Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")
    rows = ["image,text", *(f"{number}.png,{text}" for number, text in enumerate(colours))]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
