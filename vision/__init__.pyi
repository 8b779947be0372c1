"""Types of the names of mmpeft.vision; written by `python -m tests.support.stubs`."""

from mmpeft.vision.backbone import create as create
from mmpeft.vision.backbone import normalisation as normalisation
from mmpeft.vision.classification.task import ImageClassifier as ImageClassifier
from mmpeft.vision.continual.data import EmojiKinds as EmojiKinds
from mmpeft.vision.continual.runner import ContinualClassifier as ContinualClassifier
from mmpeft.vision.data.digits import DigitsData as DigitsData
from mmpeft.vision.data.emoji import EmojiData as EmojiData
from mmpeft.vision.data.folder import FolderData as FolderData
from mmpeft.vision.data.hub import HubData as HubData
from mmpeft.vision.data.vtab import VTABData as VTABData
from mmpeft.vision.depth.data import SceneDepthData as SceneDepthData
from mmpeft.vision.depth.task import DepthEstimator as DepthEstimator
from mmpeft.vision.pretrain import EmojiPairs as EmojiPairs
from mmpeft.vision.pretrain import EmojiPretraining as EmojiPretraining

COMMANDS: dict[str, tuple[str, str]]
DATA: dict[str, str]
TASKS: dict[str, str]
