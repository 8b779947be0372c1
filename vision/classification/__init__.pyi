"""Types of the names of mmpeft.vision.classification; written by `python -m tests.support.stubs`."""

from mmpeft.vision.classification.task import ImageClassifier as ImageClassifier
from mmpeft.vision.classification.task import metrics as metrics
