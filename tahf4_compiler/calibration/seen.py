"""What a calibration has seen: statistics by activation, kept calls, finished prompts."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, OptionError
from ..files.memo import Measured
from ..files.tensors import digest
from ..model.linears import linear_weights
from ..model.parts import whole
from ..model.reasons import Cause
from ..options import Options
from ..packed.plan import plan_modules
from ..weights.checksum import checksum
from .calls import KeptCalls
from .moments import WIDEST
from .sketch import Sketch
from .statistics import Cells, check_percentile, merged

__all__ = ["Seen"]


class Seen:
    """What is known about the activations of some models.

    Attributes:
        models: by expert.
        percentile: of ``|x|``, the default of a recipe.
        step_groups: equal parts of the denoising schedule that are kept apart.
        rows: sample rows kept for each activation, step group and branch.
        options: of the backend.
        checkpoint: file that a run is taken up from, or None.
        activations: statistics by ``(expert, name)``.
        prompts: those that are finished, in order.
        kept: a few calls of each expert, with their arguments, for the error of the network's output.
        observed: how often an activation was observed.
        mask: which tokens count in the call that runs (:mod:`.padding`), None for all.
        joined: over what several processes put together what they saw.
        arguments: of the pipeline's calls, as text; None before the first.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        *,
        percentile: float = 99.9,
        step_groups: int = 1,
        rows: int = 64,
        moments: int = WIDEST,
        options: Options | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Start empty.

        Raises:
            OptionError: an argument is of the wrong type or range.
        """
        if not isinstance(step_groups, int) or step_groups < 1:
            raise OptionError(f"step_groups is {step_groups!r}; expected an integer of at least 1")
        if not isinstance(rows, int) or rows < 0:
            raise OptionError(f"rows is {rows!r}; expected an integer of at least 0")
        if type(moments) is not int or moments < 0 or moments % 64:
            raise OptionError(f"moments is {moments!r}; expected a multiple of 64 channels, or 0 for none")
        check_percentile(percentile)
        self.models = dict(models)
        self.percentile, self.step_groups, self.rows = float(percentile), step_groups, rows
        self.moments = moments
        self.options = options if options is not None else Options()
        self.checkpoint = checkpoint
        self.activations: dict[tuple[str, str], Cells] = {}
        self.prompts: list[str] = []
        self.kept = KeptCalls()
        self.observed = 0
        self.mask: Tensor | None = None
        self.joined: list[str] = []
        self.arguments: str | None = None

    def sketch(
        self, name: str, *, expert: str | None = None, step_group: int | None = None, branch: str | None = None
    ) -> Sketch:
        """Return the merged statistics of an activation.

        Args:
            name: module path of a linear that reads it.
            expert: component name; by default the first that has it.
            step_group: one of them, or None for all.
            branch: one of them, or None for all.

        Raises:
            CalibrationError: nothing was seen there.
        """
        for (owner, _), cells in self.activations.items():
            if name in cells.activation.members and expert in (None, owner):
                chosen = [
                    sketch
                    for (group, side), (sketch, _) in cells.cells.items()
                    if step_group in (None, group) and branch in (None, side)
                ]
                if chosen:
                    return merged(chosen)
        seen = ", ".join(sorted(name for _, name in self.activations)[:3])
        raise CalibrationError(f"nothing was seen of the activation of {name!r} there; there are {seen}, ...")

    def merge(self, other: Seen) -> None:
        """Add what another calibration of the same model saw, for example in another process.

        Raises:
            CalibrationError: the step groups differ, the model is another, or both saw one prompt. Nothing is
                added then.
        """
        if other.step_groups != self.step_groups:
            raise CalibrationError(f"step_groups are {self.step_groups} and {other.step_groups}; expected one number")
        if other.moments != self.moments:
            raise CalibrationError(f"moments are {self.moments} and {other.moments}; expected one number")
        if other is self:
            raise CalibrationError("a calibration cannot be merged with itself: everything would count twice")
        twice = [prompt for prompt in other.prompts if prompt in self.prompts]
        if twice:
            raise CalibrationError(
                f"both calibrations saw {twice[0]!r} ({len(twice)} prompts in all), which would count twice; merge "
                "statistics of different prompts"
            )
        for key, theirs in other.activations.items():
            known = self.activations.get(key)
            fits = key[0] in self.models and (known is None or known.activation.channels == theirs.activation.channels)
            if not fits or not set(theirs.activation.members) <= self.known_paths(key[0]):
                raise CalibrationError(
                    f"the other calibration is of another model: it saw {'/'.join(filter(None, key))} with "
                    f"{theirs.activation.channels} channels, which this model does not have"
                )
        for key, theirs in other.activations.items():
            new = key not in self.activations
            mine = self.activations.setdefault(key, Cells(theirs.activation, self.rows, self.step_groups))
            if new:
                mine.moments = copy.deepcopy(theirs.moments)
            elif mine.moments is not None and theirs.moments is not None:
                mine.moments.merge(theirs.moments)
            else:  # those of some rows are not those of the activation
                mine.moments = None
            for where, (sketch, sample) in theirs.cells.items():
                own_sketch, own_sample = mine.cell(where, sketch.counts.device)
                own_sketch.merge(sketch)
                own_sample.merge(sample)
        self.kept.count(other.kept.counted())
        for expert, calls in other.kept.calls.items():
            self.kept.extend(expert, zip(other.kept.places[expert], calls, strict=True))
        self.prompts += [prompt for prompt in other.prompts if prompt not in self.prompts]

    def known_paths(self, expert: str) -> set[str]:
        """Return the module paths of an expert's linears."""
        return {path for path, _ in linear_weights(self.models[expert])}

    def read_by(self, expert: str, path: str) -> list[Cells]:
        """Return the statistics of all that a linear reads, in the order of their names."""
        keys = sorted(key for key in self.activations if key[0] == expert)
        return [self.activations[key] for key in keys if path in self.activations[key].activation.members]

    def weights(self, expert: str, paths: Sequence[str]) -> list[Tensor]:
        """Return the weights at some module paths of an expert, whole."""
        found = dict(linear_weights(self.models[expert]))
        return [whole(found[path]) for path in paths]

    def weight_sums(self) -> dict[str, int]:
        """Return the checksums of the linears' weights, by ``expert/path``."""
        return {
            f"{expert}/{path}": int(checksum(weight))
            for expert, module in self.models.items()
            for path, weight in linear_weights(module)
        }

    def kept_by_hand(self, expert: str) -> list[str]:
        """Return the linears that a user keeps in high precision with ``tahf4.keep``, by path."""
        return [d.module for d in plan_modules(self.models[expert]) if d.cause is Cause.KEPT]

    def measured(self) -> Measured:
        """Return where numbers are kept that take long to measure: beside the checkpoint, if there is one.

        Several processes measure together and must not differ in what they know: then nothing is kept.
        """
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        path = self.checkpoint
        return Measured(path.with_name(f"{path.name}.measured") if path and not together else None, self._identity)

    def _identity(self) -> str:
        """Return a digest of what was seen, of the calls that were kept, and of all that the models hold."""
        tensors: dict[str, Tensor] = {}
        header = {
            "tahf4": importlib.metadata.version("tahf4-compiler"),
            "torch": torch.__version__,
            "calls": self.kept.header(tensors),
            "tensors": {
                f"{expert}/{name}": int(checksum(value))
                for expert, module in self.models.items()
                for name, value in [*module.named_parameters(), *module.named_buffers()]
            },
            "percentile": self.percentile,
            "moments": self.moments,
            "kept": {expert: self.kept_by_hand(expert) for expert in self.models},
        }
        for i, (_, cells) in enumerate(sorted(self.activations.items())):
            for j, (_, (sketch, sample)) in enumerate(sorted(cells.cells.items())):
                parts = {"maxima": sketch.maxima, "squares": sketch.squares, "priorities": sample.priorities}
                tensors |= {f"{i}.{j}.{name}": part.detach().cpu() for name, part in parts.items()}
        return digest(header, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
