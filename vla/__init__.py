"""Vision-language models through open_clip.

Importing this package registers the anatomies and does not load open_clip.
"""

from mmpeft.sites.named import Library, add_library
from mmpeft.vla import anatomy  # noqa: F401 - registers the anatomies

add_library(Library("open_clip", "mmpeft.vla.named", domain="vla"))
