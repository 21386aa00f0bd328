"""One training loop for every stage: seeded, averaged, and resumable after a kill at any point.

Every random draw of a step comes from generators seeded by (seed, stage, step), so the weights, the
optimizer and the number of steps done are all there is to save.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ...files.replacing import replacing

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Stage:
    """How one stage trains."""

    name: str
    steps: int
    learning_rate: float
    warmup: int = 50
    """Steps over which the learning rate rises; it falls to 2 % of its peak on a cosine afterwards."""

    average_decay: float = 0.998
    """Decay per step of the exponential moving average of the weights, which is what the stage returns."""

    save_every: int = 100
    """Steps between two checkpoints."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps)))
        return self.learning_rate * rise * fall


def step_generators(seed: int, stage: str, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Return the generators of one training step, a function of the arguments alone."""
    words = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), step])
    generator = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
    return np.random.default_rng(words), generator


def save_atomically(state: object, path: Path) -> None:
    """Write a checkpoint, so that a kill leaves the old one or the new one."""
    with replacing(path) as beside:
        torch.save(state, beside)


def train(
    stage: Stage,
    module: ModuleT,
    loss: Callable[[ModuleT, int, np.random.Generator, torch.Generator], torch.Tensor],
    work_dir: Path,
    seed: int,
    stop_after: int | None = None,
) -> ModuleT:
    """Train a module, from its checkpoint if there is one.

    Args:
        stage: Steps, learning rate and checkpoint interval.
        module: What is trained; changed in place.
        loss: Returns a step's loss from the module, the step and the step's two generators.
        work_dir: Folder of the checkpoint `<stage.name>.pt`.
        seed: Seed of the whole training.
        stop_after: Return early once so many steps of the stage are done, as if killed.

    Returns:
        A copy of the module with the averaged weights.
    """
    path = work_dir / f"{stage.name}.pt"
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]

    bar = tqdm(range(done, stage.steps), initial=done, total=stage.steps, desc=stage.name, mininterval=10.0)
    for step in bar:
        if step == stop_after:
            break
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        value = loss(module, step, *step_generators(seed, stage.name, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(stage.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), module.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)

        done = step + 1
        if done % stage.save_every == 0 or done == stage.steps:
            save_atomically(
                {
                    "module": module.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "done": done,
                },
                path,
            )
    return average.eval()
