"""Steps that pack a model, keep some of its linears, and attach recipes."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from walk_state import Clock, State, kept, plain_path

import tahf4_compiler as tahf4

__all__ = ["Packing"]

KEEPS = ("", "to_out", r"blocks\.1\.")


class Packing(State):
    """Packing, keeping, recipes."""

    @rule(
        keep=st.sampled_from(KEEPS),
        recipe=st.sampled_from(["", "", "masks", "steps"]),
        part=st.sampled_from([False, False, True]),
    )
    def packs(self, keep: str, recipe: str, part: bool) -> None:
        """Pack the model, or its blocks alone."""
        packed = self.oracle.is_packed()
        if part:
            keep = keep.replace(r"blocks\.", "^")
        if packed or self.hooks or part:
            recipe = ""
        made = self.recipe(steps=recipe == "steps") if recipe else None
        keeps = {path for path in self.oracle.held if keep and kept(keep, _inside(path, part))}
        fused = self.merged and any(self.oracle.held[p].adapter for p in self.oracle.to_pack(made, keeps))
        refusal = None
        if keep and any(
            h.packed is not None and kept(keep, _inside(path, part)) for path, h in self.oracle.held.items()
        ):
            refusal = "is packed"
        elif self.hooks and not packed:
            refusal = "hooked|offloaded|fused" if fused else "hooked|offloaded"
        elif fused:
            refusal = "fused into it"

        def act() -> None:
            plan = tahf4.quantize_(self.model.blocks if part else self.model, made, keep=[keep] if keep else [])
            chosen = {_inside(path, part) for path in self.oracle.pack(made, keeps, part)}
            if recipe == "steps" and self.oracle.is_packed():
                self.counts_steps()
            found = {plain_path(d.module) for d in plan if d.decision == "hif4" and d.reason != "packed"}
            assert found == chosen, f"the plan has {sorted(found ^ chosen)} otherwise"
            self.part = part and (self.part or not packed)

        self.attempt(act, tahf4.PackedError, refusal)

    @rule()
    def unpacks(self) -> None:
        hooked = self.hooks not in ("", "blocks") and self.oracle.is_packed()

        def act() -> None:
            found = {plain_path(path) for path in tahf4.dequantize_(self.model)}
            assert found == set(self.oracle.unpack())
            self.model.requires_grad_(False)  # that of a linear without a bias is not known
            self.part = False

        self.attempt(act, tahf4.PackedError, "hooked" if hooked else None)

    @precondition(lambda self: not self.oracle.is_packed() and not self.hooks)
    @rule(pattern=st.sampled_from(KEEPS))
    def keeps(self, pattern: str) -> None:
        tahf4.keep(self.model, [pattern] if pattern else [])
        self.oracle.kept = {path for path in self.oracle.held if pattern and kept(pattern, path)}
        self.check()

    @precondition(lambda self: not self.oracle.is_packed() and not self.hooks)
    @rule(what=st.sampled_from(["masks", "steps", "none"]))
    def applies_recipe(self, what: str) -> None:
        self.clock, self.oracle.high = Clock() if what == "steps" else None, what == "steps"
        recipe = self.recipe(what == "steps") if what != "none" else None
        tahf4.apply_recipe(self.model, recipe, scheduler=self.clock)
        self.oracle.apply(recipe)
        self.check()

    @precondition(lambda self: self.oracle.is_packed() and not self.hooks)
    @rule(steps=st.booleans())
    def sets_steps(self, steps: bool) -> None:
        """Give a packed model a step in high precision, or take it off."""
        if steps:
            self.counts_steps([0])
        else:
            tahf4.set_high_precision_steps(self.model, ())
            self.oracle.packed_steps = False
        self.check()

    @precondition(lambda self: self.clock is not None)
    @rule()
    def next_step(self) -> None:
        self.clock.step()  # type: ignore[union-attr]
        self.oracle.high = False
        self.check()


def _inside(path: str, part: bool) -> str:
    """Return a linear's path in what is packed."""
    return path.removeprefix("blocks.") if part else path
