"""Types of the names of mmpeft.diffusion; written by `python -m tests.support.stubs`."""

from mmpeft.diffusion import anatomy as anatomy
from mmpeft.diffusion.anatomy import PRESETS as PRESETS
from mmpeft.diffusion.backbone import create as create
from mmpeft.diffusion.data.emoji import EmojiStyle as EmojiStyle
from mmpeft.diffusion.data.images import CaptionedImages as CaptionedImages
from mmpeft.diffusion.families import family_of as family_of
from mmpeft.diffusion.family import Family as Family
from mmpeft.diffusion.objective import Levels as Levels
from mmpeft.diffusion.objective import TimestepSampling as TimestepSampling
from mmpeft.diffusion.pretrain import DrawnCaptionsData as DrawnCaptionsData
from mmpeft.diffusion.pretrain import PipelinePretraining as PipelinePretraining
from mmpeft.diffusion.style.grid import Show as Show
from mmpeft.diffusion.style.slider import SliderTuner as SliderTuner
from mmpeft.diffusion.style.task import StyleTuner as StyleTuner
from mmpeft.diffusion.style.words import WordTuner as WordTuner

COMMANDS: dict[str, tuple[str, str]]
DATA: dict[str, str]
EXPORTS: dict[str, str]
PIPELINE_EXPORTS: dict[str, str]
TASKS: dict[str, str]
