"""Beginnings of graphs that tests of fuse go on with."""

from __future__ import annotations

from tahf4_compiler.passes.fuse import Fuse

ALWAYS = Fuse(always=True)

AFTER = """
    x: f32[4, 64]
    r: f32[4, 64]
    w: hif4[64, 64]
    c, s = tahf4.quantize(x, None, 0)
"""
"""What stays of a product where it becomes a fused one."""

PRODUCT = f"{AFTER}    y = tahf4.linear(c, s, w, None, f32)\n"
"""A product; what follows is drawn into it or is not."""

QUANTIZATION = """
    x: f32[4, 64]
    g: f32[64]
    w: hif4[64, 64]
"""
"""The inputs of a quantization; what comes before it is drawn into it or is not."""

LINEAR = "y = tahf4.linear(c, s, w, None, f32)"
