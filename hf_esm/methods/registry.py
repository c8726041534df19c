"""Every merge method by name: those of hf_esm, those that are registered, and those of installed packages."""

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cached_property
from importlib import metadata
from logging import getLogger
from typing import Any, Optional

from ..errors import HfEsmError
from ..utils import check_known, number_fields
from .automatic import AutoMerge
from .averaging import Mean, TaskArithmetic
from .concrete import AdaMerging, ConcreteAdaMerging, ConcreteTaskArithmetic
from .essential import EssentialMerge
from .geometric import SLERP, Karcher, ModelStock, NuSLERP
from .interference import CAT, WUDI
from .isotropic import IsoC, IsoCTS
from .knots import KnOTS
from .regression import RegMean
from .routed import RoutedMerge
from .singular_vectors import TSVC, TSVM
from .sparse import DARE, DARETIES, DELLA, SCE, TIES, Breadcrumbs
from .stack import MergeMethod


ENTRY_POINTS = "hf_esm.methods"


logger = getLogger(__name__)


MethodFactory = Callable[[], MergeMethod]


class MethodRegistry(UserDict[str, MethodFactory]):
    """Factories of merge methods by name.

    The names of entry points are read when the methods are listed or an unknown name is looked up; the code behind one
    is imported when its method is used.
    """

    @cached_property
    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        """Entry points by name; a name that is taken is refused with a warning."""
        entry_points: dict[str, metadata.EntryPoint] = {}
        for entry_point in metadata.entry_points(group=ENTRY_POINTS):
            if entry_point.name in {**self.data, **entry_points}:
                logger.warning("Method %r of %s is ignored: the name is taken.", entry_point.name, entry_point.value)
            else:
                entry_points[entry_point.name] = entry_point
        return entry_points

    def __missing__(self, name: str) -> MethodFactory:
        entry_point = self._entry_points[name]
        try:
            factory = entry_point.load()
        except Exception as error:
            raise HfEsmError(
                f"Method {name!r}: {entry_point.value} cannot be loaded ({type(error).__name__}: {error}). Update or "
                "uninstall the package that it belongs to."
            ) from error
        if name not in self.data:  # the import may have registered it
            self.data[name] = _named(factory, name)
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in self._entry_points

    def __iter__(self) -> Iterator[str]:
        return iter({**self.data, **self._entry_points})

    def __len__(self) -> int:
        return len({**self.data, **self._entry_points})


METHODS = MethodRegistry(
    {
        "auto": AutoMerge,
        "mean": Mean,
        "task-arithmetic": TaskArithmetic,
        "ties": TIES,
        "dare": DARE,
        "dare-ties": DARETIES,
        "breadcrumbs": Breadcrumbs,
        "della": DELLA,
        "sce": SCE,
        "model-stock": ModelStock,
        "slerp": SLERP,
        "nuslerp": NuSLERP,
        "karcher": Karcher,
        "regmean": RegMean,
        "wudi": WUDI,
        "cat": CAT,
        "knots": KnOTS,
        "adamerging": AdaMerging,
        "concrete-task-arithmetic": ConcreteTaskArithmetic,
        "concrete-adamerging": ConcreteAdaMerging,
        "tsv-m": TSVM,
        "tsv-c": TSVC,
        "iso-c": IsoC,
        "iso-cts": IsoCTS,
        "esm": EssentialMerge,
        "esm-roberta": EssentialMerge.roberta,
        "esm-vit": EssentialMerge.vit,
        "esm++": RoutedMerge,
        "esm++-roberta": RoutedMerge.roberta,
        "esm++-vit": RoutedMerge.vit,
    }
)


def register_method(name: str, factory: Optional[MethodFactory] = None) -> Any:
    """Add a merge method, which then works in Python, in recipes, on the command line, in `compare` and in cards.

    A package can offer a method without a call: an entry point of the group `hf_esm.methods`, named like the method,
    refers to the factory.

    Args:
        name: the method's name in recipes and on the command line.
        factory: a `MergeMethod` class, or a function that makes one with default settings. Without it, the result is a
            decorator. A class that has no `name` of its own gets this one.

    Returns the factory, or the decorator.

    Raises:
        HfEsmError: if the name is taken.

    Example:
        >>> from dataclasses import dataclass, field
        >>> import torch
        >>> from hf_esm import METHODS, Merged, MergeMethod, Stack, register_method
        >>> @register_method("median")
        ... @dataclass
        ... class Median(MergeMethod):
        ...     '''The element-wise median of the experts' updates.'''
        ...     factor: float = field(default=1.0, metadata={"help": "multiplies the median", "above": 0})
        ...     def merge(self, stack: Stack) -> Merged:
        ...         return Merged(self.factor * torch.stack(stack.updates).quantile(0.5, dim=0), self.name)
        >>> stack = Stack("dense.weight", "dense.weight", [torch.full((2, 2), x) for x in (0.0, 1.0, 5.0)])
        >>> METHODS["median"](factor=2.0).merge(stack).update
        tensor([[2., 2.],
                [2., 2.]])
    """
    if factory is None:
        return lambda decorated: register_method(name, decorated)
    if not isinstance(name, str) or not name:
        raise HfEsmError(f"A method's name is a text, not {name!r}.")
    if name in METHODS.data:
        raise HfEsmError(f"There is already a method {name!r}. Register yours under another name.")
    METHODS.data[name] = _named(factory, name)
    return factory


def _named(factory: MethodFactory, name: str) -> MethodFactory:
    """Name a class that does not name itself, so that recipes and cards name the method as it was registered."""
    if isinstance(factory, type) and "name" not in vars(factory):
        factory.name = name
    return factory


def resolve_method(method: str | Mapping[str, Any] | MergeMethod) -> MergeMethod:
    """Return a method from its name or from `{"name": …, setting: value}`, or a copy of a method, which may learn.

    Raises:
        HfEsmError: names the unknown method or setting, and the likeliest one that was meant.
    """
    if isinstance(method, MergeMethod):
        if not method.name:
            raise HfEsmError(f"{type(method).__name__} has no name. Register it: register_method(name, the class).")
        return replace(method)
    if isinstance(method, str):
        method = {"name": method}
    if not isinstance(method, Mapping):
        raise HfEsmError(f"method must be a name or settings, not {method!r}; there are {', '.join(METHODS)}.")
    settings = dict(method)
    if "name" not in settings:
        raise HfEsmError(f"method: settings need a name, as in {{'name': 'esm', …}}; there are {', '.join(METHODS)}.")
    name = settings.pop("name")
    check_known([name], METHODS, "method")
    made = METHODS[name]()
    if not isinstance(made, MergeMethod) or made.name not in METHODS:
        raise HfEsmError(
            f"Method {name!r}: its factory made {made!r:.80}, which is not a MergeMethod whose name is registered."
        )
    if dropped := [setting for setting in settings if setting in made.gone]:
        raise HfEsmError(f"Method {name!r} has no setting {dropped[0]!r} any more. {made.gone[dropped[0]]}")
    check_known(settings, [setting.name for setting in fields(made)], "setting", f"Method {name!r}")
    numbers = number_fields(made)
    for setting, value in settings.items():
        if setting in numbers and isinstance(value, str):  # YAML reads 1e-3 as a string
            with suppress(ValueError):
                settings[setting] = float(value)
    return replace(made, **settings)


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """Return a method as recipes hold it: its name and all settings, so that a later default changes nothing."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(method).items()}
    return {"name": method.name, **settings}
