"""The plan of every model of diffusers and transformers: how many of its linears have 4 bits.

What a change of the planner does to models that no other test knows shows here.
``python tests/networks/test_plan_of_libraries.py`` writes the file anew; its diff is what changed.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tahf4_compiler as tahf4

FILE = Path(__file__).parents[1] / "data" / "plans_of_libraries.json"
KINDS = ("Model", "Transformer", "UNet", "ControlNet", "Prior", "DiT")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "n_layers")
Makers = Iterator[tuple[str, Callable[[], nn.Module]]]


def of_diffusers() -> Makers:
    import diffusers

    for name in dir(diffusers):
        if any(kind in name for kind in KINDS) and "Autoencoder" not in name and "Pipeline" not in name:
            found = getattr(diffusers, name)
            if inspect.isclass(found) and issubclass(found, diffusers.ModelMixin) and found is not diffusers.ModelMixin:
                yield name, found


def of_transformers() -> Makers:
    """Default configurations, with four layers where they are all of one kind and there are more."""
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    def make(kind: str) -> nn.Module:
        config = CONFIG_MAPPING[kind]()
        for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
            for name in () if getattr(part, "layer_types", None) else LAYERS:
                if isinstance(layers := getattr(part, name, None), int):
                    setattr(part, name, min(layers, 4))
        return AutoModel.from_config(config)

    for kind in MODEL_MAPPING_NAMES:
        yield kind, lambda kind=kind: make(kind)


def lengths(model: nn.Module) -> Iterator[str]:
    """Yield names of lengths of the outermost lists of modules, with the model that has them."""
    yield "whole"
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    lists = {path: list(m) for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    alone = list(lists)[:4] if len(lists) > 1 else []
    for one in ["all", "none", *alone] if lists else []:
        for path, blocks in lists.items():
            model.set_submodule(path, nn.ModuleList(blocks[: 1 if one in ("all", path) else 2]))
        yield {"all": "1 each", "none": "2 each"}.get(one, f"1 in {one}")


def plans(makers: Makers) -> dict[str, str]:
    """Return for each model "linears in 4 bits/all linears" of each length, or the error that it cannot be made."""
    found = {}
    for name, make in makers:
        try:
            with torch.device("meta"):
                model = make()
        except Exception as error:
            found[name] = type(error).__name__
            continue
        counts = {}
        for length in lengths(model):
            decisions = [d.decision for d in tahf4.plan_modules(model)]
            counts[length] = f"{length}: {decisions.count('hif4')}/{len(decisions)}"
        found[name] = ", ".join(counts.values())
    return found


LIBRARIES = {"diffusers": of_diffusers, "transformers": of_transformers}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_plan_of_every_model_is_the_recorded_one(library):
    recorded = json.loads(FILE.read_text())[library]
    if (installed := importlib.metadata.version(library)) != recorded["version"]:
        pytest.skip(f"{library} is {installed}; {FILE.name} has the plans of {recorded['version']}")
    found = plans(LIBRARIES[library]())
    assert set(found) == set(recorded["plans"])
    # What could not be made may be made where a further package is installed.
    made = {name: plan for name, plan in recorded["plans"].items() if not plan.endswith("Error")}
    assert {name: found[name] for name, plan in made.items() if found[name] != plan} == {}


if __name__ == "__main__":
    everything = {
        library: {"version": importlib.metadata.version(library), "plans": plans(makers())}
        for library, makers in LIBRARIES.items()
    }
    FILE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
