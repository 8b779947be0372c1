"""Types of the names of mmpeft.vla; written by `python -m tests.support.stubs`."""

from mmpeft.vla.backbone import create as create
from mmpeft.vla.backbone import preprocessing as preprocessing
from mmpeft.vla.backbone import tokenizer as tokenizer
from mmpeft.vla.contrastive.data import CaptionData as CaptionData
from mmpeft.vla.contrastive.task import ContrastiveTuner as ContrastiveTuner
from mmpeft.vla.export import save_classifier as save_classifier
from mmpeft.vla.export import save_pair as save_pair
from mmpeft.vla.fewshot.consistency import Consistency as Consistency
from mmpeft.vla.fewshot.data import FewShotData as FewShotData
from mmpeft.vla.fewshot.heads import ClipAdapter as ClipAdapter
from mmpeft.vla.fewshot.heads import CoCoOp as CoCoOp
from mmpeft.vla.fewshot.heads import LinearHead as LinearHead
from mmpeft.vla.fewshot.heads import TaskRes as TaskRes
from mmpeft.vla.fewshot.heads import TipAdapter as TipAdapter
from mmpeft.vla.fewshot.task import FewShot as FewShot
from mmpeft.vla.fewshot.wise import WiseCurve as WiseCurve
from mmpeft.vla.pretrain import CaptionedEmojiData as CaptionedEmojiData
from mmpeft.vla.pretrain import PairPretraining as PairPretraining
from mmpeft.vla.pretrain_regions import RegionPretraining as RegionPretraining
from mmpeft.vla.segmentation.data import SceneSegmentationData as SceneSegmentationData
from mmpeft.vla.segmentation.decoders import CLIPSegDecoder as CLIPSegDecoder
from mmpeft.vla.segmentation.decoders import SANDecoder as SANDecoder
from mmpeft.vla.segmentation.masks import FolderSegmentationData as FolderSegmentationData
from mmpeft.vla.segmentation.task import Segmenter as Segmenter
from mmpeft.vla.vqa.data import SceneQuestionData as SceneQuestionData
from mmpeft.vla.vqa.data import VQAData as VQAData
from mmpeft.vla.vqa.model import Fusion as Fusion
from mmpeft.vla.vqa.task import VisualQuestions as VisualQuestions

COMMANDS: dict[str, tuple[str, str]]
DATA: dict[str, str]
EXPORTS: dict[str, str]
PARTS: dict[str, str]
TASKS: dict[str, str]
