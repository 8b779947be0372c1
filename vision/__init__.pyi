"""Types of the names of mmpeft.vision; written by `python -m tests.support.stubs`."""

from mmpeft.vision.backbone import create as create
from mmpeft.vision.backbone import normalisation as normalisation
from mmpeft.vision.classification.task import ImageClassifier as ImageClassifier
from mmpeft.vision.continual.data import EmojiKinds as EmojiKinds
from mmpeft.vision.continual.methods.aper import APER as APER
from mmpeft.vision.continual.methods.coda_prompt import CODAPrompt as CODAPrompt
from mmpeft.vision.continual.methods.dual_prompt import DualPrompt as DualPrompt
from mmpeft.vision.continual.methods.ease import EASE as EASE
from mmpeft.vision.continual.methods.finetune import Finetune as Finetune
from mmpeft.vision.continual.methods.finetune import Joint as Joint
from mmpeft.vision.continual.methods.inf_lora import InfLoRA as InfLoRA
from mmpeft.vision.continual.methods.l2p import L2P as L2P
from mmpeft.vision.continual.methods.lae import LAE as LAE
from mmpeft.vision.continual.methods.o_lora import OLoRA as OLoRA
from mmpeft.vision.continual.methods.ranpac import RanPAC as RanPAC
from mmpeft.vision.continual.methods.sd_lora import SDLoRA as SDLoRA
from mmpeft.vision.continual.methods.simple_cil import SimpleCIL as SimpleCIL
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
EXPORTS: dict[str, str]
PARTS: dict[str, str]
TASKS: dict[str, str]
