"""Run VBench in a Python that has it; that Python needs nothing of this project.

``python -c TEXT REQUEST``, where the request is JSON with ``videos`` (a folder), ``prompts`` (file name -> text),
``dimensions``, ``device`` and ``output`` (a folder). VBench writes ``scores_eval_results.json`` there. Exit code 3:
VBench is not installed.
"""

import json
import os
import sys


def main() -> None:
    """Score."""
    request = json.loads(sys.argv[1])
    try:
        import vbench
    except ModuleNotFoundError as error:
        if error.name != "vbench":
            raise
        sys.exit(3)
    import torch

    information = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
    # A device, no text, as VBench's own evaluate.py gives it: for the text "cuda" motion_smoothness may shrink frames.
    device = torch.device(request["device"])
    vbench.VBench(device, information, request["output"]).evaluate(
        videos_path=request["videos"],
        name="scores",
        prompt_list=request["prompts"],
        dimension_list=request["dimensions"],
        mode="custom_input",
    )


if __name__ == "__main__":
    main()
