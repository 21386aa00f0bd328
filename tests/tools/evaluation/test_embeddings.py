"""The table of roundings on a network of sentence embeddings, on a small random one."""

from __future__ import annotations

import torch
from tahf4_compiler.tools.evaluation.embeddings import rows, sentences
from transformers import BertConfig, BertModel


def test_every_row_is_judged_against_the_original():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model = BertModel(config).eval().requires_grad_(False)

    def tokens(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 60, (24, 9), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(9) < 7).long().expand(24, 9)}

    chosen = (("rotation", None), ("reconstruction", {"mask": None}))
    found = {name: cosines for name, cosines, _ in rows(model, tokens(0), tokens(1), chosen)}
    assert list(found) == ["rotation", "reconstruction"] and all(c.shape == (24,) for c in found.values())
    assert 0.9 < found["rotation"].mean() < found["reconstruction"].mean() < 1


def test_the_sentences_are_the_same_each_time():
    found = sentences()
    assert len(found) > 200 and found == sentences() and len(set(found)) == len(found)
