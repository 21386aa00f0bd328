"""The table of roundings on a network of sentence embeddings, on a small random one."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.tools.evaluation.embeddings import rows, sentences
from tahf4_compiler.tools.evaluation.reactions import load, reactions, tokens
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

    weights = {"mask": "weights", "weight_exponent": 0.5}
    chosen = (("rotation", None), ("weights", weights), ("reconstruction", {"mask": None}))
    found = {name: cosines for name, cosines, _ in rows(model, tokens(0), tokens(1), chosen)}
    assert list(found) == ["rotation", "weights", "reconstruction"] and all(c.shape == (24,) for c in found.values())
    assert 0.9 < found["rotation"].mean() < found["reconstruction"].mean() < 1


def test_the_sentences_are_the_same_each_time():
    found = sentences()
    assert len(found) > 200 and found == sentences() and len(set(found)) == len(found)


def test_reactions_become_tokens():
    found = reactions(20, 3)
    assert len(set(found)) == 20 and found == reactions(20, 3) != reactions(20, 4)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "C", "Cl", "[Na+]", ">>"]
    read = tokens(["ClC.[Na+]>>C", "C"], words)
    assert read["input_ids"].tolist() == [[2, 5, 4, 1, 6, 7, 4, 3], [2, 4, 3, 0, 0, 0, 0, 0]]
    assert read["attention_mask"].sum(1).tolist() == [8, 3]


def test_weights_of_a_folder_are_loaded_whole(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertModel(config, add_pooling_layer=False).eval()
    (tmp_path / "config.json").write_text(config.to_json_string())
    state = {f"bert.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "cls.bias": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    ids = torch.arange(5)[None]
    assert torch.equal(load("Bert", tmp_path)(ids).last_hidden_state, model(ids).last_hidden_state)
    state.pop("bert.encoder.layer.0.output.dense.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="lacks encoder.layer.0.output.dense.weight"):
        load("Bert", tmp_path)
