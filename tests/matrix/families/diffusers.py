from tests.matrix.example import Example
from tests.matrix.families_diffusers import FAMILIES as _F

FAMILIES = {name: (lambda build=build: Example(*build())) for name, build in _F.items()}
