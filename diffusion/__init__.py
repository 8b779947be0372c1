"""UNet and DiT backbones through diffusers.

Importing this package registers the anatomies and does not load diffusers.
"""

from mmpeft.diffusion import anatomy  # noqa: F401 - registers the anatomies
from mmpeft.sites.named import Library, add_library

add_library(Library("diffusers", "mmpeft.diffusion.named", domain="diffusion"))
