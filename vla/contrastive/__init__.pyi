"""Types of the names of mmpeft.vla.contrastive; written by `python -m tests.support.stubs`."""

from mmpeft.vla.contrastive.data import CaptionData as CaptionData
from mmpeft.vla.contrastive.task import ContrastiveTuner as ContrastiveTuner
from mmpeft.vla.contrastive.task import recall as recall
