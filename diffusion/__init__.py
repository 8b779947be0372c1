"""UNet and DiT backbones through diffusers.

Importing this package loads nothing: names load when first used.
"""

from mmpeft import _lazy

TASKS = {
    "PipelinePretraining": "mmpeft.diffusion.pretrain:PipelinePretraining",
    "SliderTuner": "mmpeft.diffusion.style.slider:SliderTuner",
    "StyleTuner": "mmpeft.diffusion.style.task:StyleTuner",
    "WordTuner": "mmpeft.diffusion.style.words:WordTuner",
}
DATA = {
    "CaptionedImages": "mmpeft.diffusion.data.images:CaptionedImages",
    "DrawnCaptionsData": "mmpeft.diffusion.pretrain:DrawnCaptionsData",
    "EmojiStyle": "mmpeft.diffusion.data.emoji:EmojiStyle",
}
COMMANDS = {
    "sample": ("mmpeft.diffusion.commands:sample", "draw by a pipeline with adapters, at any strength"),
    "mix": ("mmpeft.diffusion.commands:mix", "write several LoRAs of a pipeline as one: a sum, or ZipLoRA"),
}


EXPORTS = dict.fromkeys(("peft", "diffusers", "kohya", "comfy", "merged"), "mmpeft.diffusion.style.export:of_run")
PIPELINE_EXPORTS = dict.fromkeys(EXPORTS, "mmpeft.diffusion.style.export:of_adapter")


def register() -> None:
    """Tell the core where models of diffusers can be tuned, and by what names they are known."""
    from mmpeft.diffusion import anatomy  # noqa: F401 - registers the anatomies
    from mmpeft.sites.named import Library, add_library

    add_library(Library("diffusers", "mmpeft.diffusion.named", domain="diffusion"))


__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "create": "backbone",
        "Family": "family",
        "family_of": "families",
        "PRESETS": "anatomy",
        "Show": "style.grid",
        "Levels": "objective",
        "TimestepSampling": "objective",
        **TASKS,
        **DATA,
    },
    modules=("anatomy",),
)
