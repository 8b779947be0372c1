"""Types of the names of mmpeft.vision.depth; written by `python -m tests.support.stubs`."""

from mmpeft.vision.depth.data import SceneDepthData as SceneDepthData
from mmpeft.vision.depth.task import DepthEstimator as DepthEstimator
