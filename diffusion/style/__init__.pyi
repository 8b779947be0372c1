"""Types of the names of mmpeft.diffusion.style; written by `python -m tests.support.stubs`."""

from mmpeft.diffusion.style.slider import SliderTuner as SliderTuner
from mmpeft.diffusion.style.task import StyleTuner as StyleTuner
from mmpeft.diffusion.style.words import WordTuner as WordTuner
