"""Vision backbones and tasks through timm and torchvision.

Importing this package loads nothing: names load when first used.
"""

from mmpeft import _lazy

TASKS = {
    "ImageClassifier": "mmpeft.vision.classification.task:ImageClassifier",
    "DepthEstimator": "mmpeft.vision.depth.task:DepthEstimator",
    "EmojiPretraining": "mmpeft.vision.pretrain:EmojiPretraining",
}
DATA = {
    "DigitsData": "mmpeft.vision.data.digits:DigitsData",
    "EmojiData": "mmpeft.vision.data.emoji:EmojiData",
    "EmojiKinds": "mmpeft.vision.continual.data:EmojiKinds",
    "EmojiPairs": "mmpeft.vision.pretrain:EmojiPairs",
    "FolderData": "mmpeft.vision.data.folder:FolderData",
    "HubData": "mmpeft.vision.data.hub:HubData",
    "SceneDepthData": "mmpeft.vision.depth.data:SceneDepthData",
    "VTABData": "mmpeft.vision.data.vtab:VTABData",
}
PARTS = {
    "APER": "mmpeft.vision.continual.methods.aper:APER",
    "CODAPrompt": "mmpeft.vision.continual.methods.coda_prompt:CODAPrompt",
    "DualPrompt": "mmpeft.vision.continual.methods.dual_prompt:DualPrompt",
    "EASE": "mmpeft.vision.continual.methods.ease:EASE",
    "Finetune": "mmpeft.vision.continual.methods.finetune:Finetune",
    "InfLoRA": "mmpeft.vision.continual.methods.inf_lora:InfLoRA",
    "Joint": "mmpeft.vision.continual.methods.finetune:Joint",
    "L2P": "mmpeft.vision.continual.methods.l2p:L2P",
    "LAE": "mmpeft.vision.continual.methods.lae:LAE",
    "OLoRA": "mmpeft.vision.continual.methods.o_lora:OLoRA",
    "RanPAC": "mmpeft.vision.continual.methods.ranpac:RanPAC",
    "SDLoRA": "mmpeft.vision.continual.methods.sd_lora:SDLoRA",
    "SimpleCIL": "mmpeft.vision.continual.methods.simple_cil:SimpleCIL",
}
COMMANDS = {
    "continual": ("mmpeft.vision.commands:continual", "learn a sequence of tasks by several methods"),
}


EXPORTS = {"timm": "mmpeft.vision.export:to_timm", "onnx": "mmpeft.vision.export:to_onnx"}


def register() -> None:
    """Tell the core where models of timm and torchvision can be tuned, and by what names they are known."""
    from mmpeft.sites.named import Library, add_library
    from mmpeft.vision import anatomy  # noqa: F401 - registers the anatomies

    add_library(Library("timm", "mmpeft.vision.named", domain="vision"))
    add_library(Library("torchvision", "mmpeft.vision.named_torchvision", domain="vision"))


__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "create": "backbone",
        "normalisation": "backbone",
        "ContinualClassifier": "continual.runner",
        **TASKS,
        **DATA,
        **PARTS,
    },
)
