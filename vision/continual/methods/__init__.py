"""Continual learning methods, one file each."""

from mmpeft.vision.continual.methods.aper import APER
from mmpeft.vision.continual.methods.coda_prompt import CODAPrompt
from mmpeft.vision.continual.methods.dual_prompt import DualPrompt
from mmpeft.vision.continual.methods.ease import EASE
from mmpeft.vision.continual.methods.finetune import Finetune, Joint
from mmpeft.vision.continual.methods.inf_lora import InfLoRA
from mmpeft.vision.continual.methods.l2p import L2P
from mmpeft.vision.continual.methods.lae import LAE
from mmpeft.vision.continual.methods.o_lora import OLoRA
from mmpeft.vision.continual.methods.ranpac import RanPAC
from mmpeft.vision.continual.methods.sd_lora import SDLoRA
from mmpeft.vision.continual.methods.simple_cil import SimpleCIL

__all__ = [
    "APER",
    "EASE",
    "L2P",
    "LAE",
    "CODAPrompt",
    "DualPrompt",
    "Finetune",
    "InfLoRA",
    "Joint",
    "OLoRA",
    "RanPAC",
    "SDLoRA",
    "SimpleCIL",
]
