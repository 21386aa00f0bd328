"""Nodes for ComfyUI that load packed models.

Copy or link this folder into ``ComfyUI/custom_nodes``; ``tahf4_compiler`` itself is installed in ComfyUI's environment.
Outside of ComfyUI it registers no node.
"""

from importlib.util import find_spec
from typing import Any

if find_spec("folder_paths") is None or find_spec("comfy") is None:  # no ComfyUI in this process
    NODE_CLASS_MAPPINGS: dict[str, Any] = {}
    NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
elif find_spec("tahf4_compiler") is None:
    raise ImportError(
        "the nodes of tahf4 need the package tahf4-compiler, which this Python does not have: install a checkout or a "
        "wheel with the Python that runs ComfyUI (python -m pip install PATH_TO_TAHF4) and start ComfyUI again"
    )
else:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
