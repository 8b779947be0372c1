"""Vision-language models through open_clip.

Importing this package loads nothing: names load when first used.
"""

from mmpeft import _lazy

TASKS = {
    "ContrastiveTuner": "mmpeft.vla.contrastive.task:ContrastiveTuner",
    "FewShot": "mmpeft.vla.fewshot.task:FewShot",
    "PairPretraining": "mmpeft.vla.pretrain:PairPretraining",
    "RegionPretraining": "mmpeft.vla.pretrain_regions:RegionPretraining",
    "Segmenter": "mmpeft.vla.segmentation.task:Segmenter",
    "VisualQuestions": "mmpeft.vla.vqa.task:VisualQuestions",
}
DATA = {
    "CaptionData": "mmpeft.vla.contrastive.data:CaptionData",
    "CaptionedEmojiData": "mmpeft.vla.pretrain:CaptionedEmojiData",
    "FewShotData": "mmpeft.vla.fewshot.data:FewShotData",
    "FolderSegmentationData": "mmpeft.vla.segmentation.masks:FolderSegmentationData",
    "SceneQuestionData": "mmpeft.vla.vqa.data:SceneQuestionData",
    "SceneSegmentationData": "mmpeft.vla.segmentation.data:SceneSegmentationData",
    "VQAData": "mmpeft.vla.vqa.data:VQAData",
}
PARTS = {
    "CLIPSegDecoder": "mmpeft.vla.segmentation.decoders:CLIPSegDecoder",
    "ClipAdapter": "mmpeft.vla.fewshot.heads:ClipAdapter",
    "CoCoOp": "mmpeft.vla.fewshot.heads:CoCoOp",
    "Consistency": "mmpeft.vla.fewshot.consistency:Consistency",
    "Fusion": "mmpeft.vla.vqa.model:Fusion",
    "LinearHead": "mmpeft.vla.fewshot.heads:LinearHead",
    "SANDecoder": "mmpeft.vla.segmentation.decoders:SANDecoder",
    "TaskRes": "mmpeft.vla.fewshot.heads:TaskRes",
    "TipAdapter": "mmpeft.vla.fewshot.heads:TipAdapter",
    "WiseCurve": "mmpeft.vla.fewshot.wise:WiseCurve",
}
COMMANDS = {
    "classify": (
        "mmpeft.vla.commands:classify",
        "name what is in your pictures, zero-shot or by a few-shot run",
    ),
    "segment": (
        "mmpeft.vla.commands:segment",
        "find things of any names in a picture by a segmentation run",
    ),
    "ask": ("mmpeft.vla.commands:ask", "ask a trained run about a picture"),
}


EXPORTS = {"open_clip": "mmpeft.vla.export:to_open_clip", "onnx": "mmpeft.vla.export:to_onnx"}


def register() -> None:
    """Tell the core where models of open_clip can be tuned, and by what names they are known."""
    from mmpeft.sites.named import Library, add_library
    from mmpeft.vla import anatomy  # noqa: F401 - registers the anatomies

    add_library(Library("open_clip", "mmpeft.vla.named", domain="vla"))


__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "create": "backbone",
        "tokenizer": "backbone",
        "preprocessing": "backbone",
        "save_pair": "export",
        "save_classifier": "export",
        **TASKS,
        **DATA,
        **PARTS,
    },
)
