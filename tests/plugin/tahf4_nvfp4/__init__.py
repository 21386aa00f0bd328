"""An example of a plug-in for tahf4: a pass that joins every pipeline, and a number format that is asked for."""

from .count_gelus import CountGelus
from .quantize import Nvfp4Quantize

__all__ = ["CountGelus", "Nvfp4Quantize"]
