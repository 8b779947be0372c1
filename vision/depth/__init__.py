"""Depth from one image: `task` is the model and its loss, `data` scenes of known depth, `draw` what a run shows."""

from mmpeft import _lazy

__getattr__, __dir__ = _lazy.exports(__name__, {"DepthEstimator": "task", "SceneDepthData": "data"})
