"""What a pass is, and how passes written by somebody else join the pipeline.

A pass is a frozen dataclass (the decorator makes it one). Its fields are its options; its class says where it stands::

    @tahf4.register_pass(after="plan", before="quantize")
    class CountGelus(tahf4.Pass):
        \"\"\"Count the GELUs of a graph.\"\"\"

        approximate: str = "tanh"  # an option: options={"count_gelus.approximate": "none"}

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                context.matched(node)
            return tahf4.PassResult(graph_module, modified=False)
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import OptionError, PassError, PipelineError
from ..plugins import entry_points
from .context import Context

__all__ = ["Pass", "PassResult", "register_pass", "registered_passes", "unregister_pass"]


@dataclass(frozen=True)
class Pass:
    """Base class of passes. Subclass it, give it a docstring, and write ``__call__``.

    Class attributes:
        name: of the pass; by default the class name in snake case.
        after: names of passes that run before this one, where the pipeline has them.
        before: names of passes that run after this one.
        replaces: name of a pass that this one stands in for, or None.
        requires: checks ``(graph_module, context) -> str | None`` that run before; a string is what is wrong.
        ensures: the same, after.
        exact: whether results stay what they were, up to rounding; held to the option ``verify_tolerance``.
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[str | None] = None
    requires: ClassVar[tuple[Callable[..., str | None], ...]] = ()
    ensures: ClassVar[tuple[Callable[..., str | None], ...]] = ()
    exact: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the pass after its class."""
        super().__init_subclass__(**kwargs)
        for names in ("after", "before"):
            if isinstance(given := cls.__dict__.get(names), str):
                setattr(cls, names, (given,))
        for conditions in ("requires", "ensures"):
            if callable(given := cls.__dict__.get(conditions)):
                setattr(cls, conditions, (given,))
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Transform the graph in place; return it with whether it changed."""
        raise PassError(f"pass {self.name!r} ({type(self).__qualname__}) does not define __call__")

    def options(self) -> dict[str, Any]:
        """Return the pass's options and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def with_options(self, values: Mapping[str, Any]) -> Pass:
        """Return the pass with some options replaced.

        Raises:
            OptionError: a name that is no field of the pass, a value of another type than its default, or one that
                ``metadata={"least": ...}`` or ``{"choices": ...}`` of the field leaves out.
        """
        known, checked = self.options(), dict[str, Any]()
        limits = {f.name: f.metadata for f in dataclasses.fields(self)}
        for option, value in values.items():
            if option not in known:
                if (cls := _undecorated(type(self), option)) is not None:
                    raise OptionError(
                        f"{option!r} is no option of pass {self.name!r}, because {cls.__qualname__} is no dataclass: "
                        "write @dataclass(frozen=True) above the class (register_pass does it by itself)"
                    )
                raise OptionError(
                    f"pass {self.name!r} has no option {option!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
            expected = type(known[option])
            value = list(value) if expected is list and type(value) is tuple else value  # as options hold it
            fits = type(value) is expected or (expected is float and type(value) is int)
            if known[option] is not None and not fits:
                raise OptionError(
                    f"option {self.name}.{option} is {value!r}; expected {expected.__name__}, "
                    f"as its default {known[option]!r}"
                )
            least, choices = (limits[option].get(limit) for limit in ("least", "choices"))
            if least is not None and not value >= least:  # nor is NaN
                raise OptionError(f"option {self.name}.{option} is {value!r}; expected at least {least}")
            if choices is not None and value not in choices:
                allowed = " or ".join(map(repr, choices))
                raise OptionError(f"option {self.name}.{option} is {value!r}; expected {allowed}")
            checked[option] = value
        return dataclasses.replace(self, **checked)


def _undecorated(cls: type[Pass], option: str) -> type[Pass] | None:
    """Return the class that annotates an option and is no dataclass itself."""
    for base in cls.__mro__[: cls.__mro__.index(Pass)]:
        kind = inspect.get_annotations(base).get(option)
        if kind is not None and "ClassVar" not in str(kind) and "__dataclass_params__" not in base.__dict__:
            return base
    return None


_registry: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


@overload
def register_pass(cls: P) -> P: ...


@overload
def register_pass(
    *, after: str | Sequence[str] = (), before: str | Sequence[str] = (), replaces: str | None = None
) -> Callable[[P], P]: ...


def register_pass(
    cls: P | None = None,
    *,
    after: str | Sequence[str] = (),
    before: str | Sequence[str] = (),
    replaces: str | None = None,
) -> P | Callable[[P], P]:
    """Add a pass to every pipeline of this process.

    Args:
        cls: a subclass of :class:`Pass`; it is made a frozen dataclass.
        after: names of passes that it runs after.
        before: names of passes that it runs before.
        replaces: name of a pass that it stands in for.

    Raises:
        PipelineError: not a pass, or another class of that name is registered.
    """

    def add(target: P) -> P:
        if not (isinstance(target, type) and issubclass(target, Pass)):
            raise PipelineError(f"register_pass got {target!r}; expected a subclass of tahf4_compiler.Pass")
        if "__dataclass_params__" not in target.__dict__:
            target = dataclass(frozen=True)(target)  # type: ignore[assignment]
        for attribute, value in (("after", after), ("before", before)):
            if value:
                setattr(target, attribute, (value,) if isinstance(value, str) else tuple(value))
        if replaces is not None:
            target.replaces = replaces
        other = _registry.get(target.name)
        if other is not None and (other.__module__, other.__qualname__) != (target.__module__, target.__qualname__):
            raise PipelineError(
                f"two passes are named {target.name!r}: {other.__module__}.{other.__qualname__} and "
                f"{target.__module__}.{target.__qualname__}. Give one another `name`, or call "
                f"unregister_pass({target.name!r})."
            )
        _registry[target.name] = target
        return target

    return add if cls is None else add(cls)


def unregister_pass(name: str) -> None:
    """Take a registered pass out again.

    Raises:
        PipelineError: no registered pass has that name.
    """
    if name not in _registry:
        raise PipelineError(f"no registered pass is named {name!r}; registered: {', '.join(_registry) or 'none'}")
    del _registry[name]


def registered_passes() -> list[type[Pass]]:
    """Return the passes that joined by decorator or by an entry point of the group ``tahf4.passes``."""
    for loaded in entry_points.load(entry_points.PASSES).values():
        for cls in loaded if isinstance(loaded, Iterable) and not isinstance(loaded, type) else [loaded]:
            if cls not in _from_entry_points:
                _from_entry_points.add(register_pass(cls))
    return list(_registry.values())


_from_entry_points: set[type[Pass]] = set()  # unregister_pass holds for them as well
