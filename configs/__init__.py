"""The configurations that ship: a folder a domain, `method/` for methods, `pretrain/` for embedded backbones.

Installs as `mmpeft.configs`; `mmpeft.run.shipped` finds one by its name, such as `vision/demo`.
"""
