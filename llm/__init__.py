"""Language models (and transformers' own ViT, CLIP and SigLIP) through transformers.

Importing this package registers the anatomies and does not load transformers.
"""

from mmpeft.llm import anatomy, resizing  # noqa: F401 - registers the anatomies, and what is refused
from mmpeft.sites.named import Library, add_library

add_library(Library("transformers", "mmpeft.llm.named", domain="llm"))
