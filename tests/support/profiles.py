"""Colour profiles, made by hand: three primaries, D65 white, one gamma."""

from __future__ import annotations

import struct

import numpy as np

P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D50, D65 = np.array([0.9642, 1, 0.8249]), (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile(primaries: tuple[tuple[float, float], ...] = (), gamma: float = 2.2) -> bytes:
    """A profile of RGB with these primaries; of grey without any."""

    def seen(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    white = _number(*D50)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    if primaries:
        matrix = np.stack([seen(*place) for place in primaries], 1)
        matrix = matrix * np.linalg.solve(matrix, seen(*D65))
        scale = (BRADFORD @ D50) / (BRADFORD @ seen(*D65))
        matrix = np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ matrix
        tags |= {f"{c}XYZ".encode(): b"XYZ \0\0\0\0" + _number(*matrix[:, i]) for i, c in enumerate("rgb")}
        tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
    else:
        tags[b"kTRC"] = curve
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + b"\0" * 78
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I", start + len(body)) + b"lcms" + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _number(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)
