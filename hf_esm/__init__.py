"""Merge fine-tunes of one checkpoint into one multi-task model, in the Hugging Face ecosystem, without training.

The public names are loaded when they are first used, so that `import hf_esm` itself loads neither torch nor peft. The
PEFT types of `hf_esm.tuners` are registered as soon as both hf_esm and peft are imported, in either order.
"""

import sys
from importlib import import_module
from importlib.abc import Loader
from typing import TYPE_CHECKING, Any

from .errors import DamagedFileError, HfEsmError, HubError, IncompatibleError
from .version import __version__


if TYPE_CHECKING:
    from .calibration import ActivationStatistics, calibrate, collect_statistics
    from .checkpoints import load_task_model, write_lora_adapter
    from .evaluation import (
        Comparison,
        Interference,
        add_comparison,
        compare,
        evaluate,
        measure_interference,
        update_card,
    )
    from .merging import MergeResult, essential_components, fuse_components, merge_models
    from .methods import (
        CAT,
        DARE,
        METHODS,
        TIES,
        TSVC,
        TSVM,
        WUDI,
        AdaMerging,
        ConcreteAdaMerging,
        ConcreteTaskArithmetic,
        EssentialMerge,
        InputStatistics,
        IsoC,
        IsoCTS,
        KnOTS,
        Mean,
        Merged,
        MergeMethod,
        RegMean,
        RoutedMerge,
        Stack,
        TaskArithmetic,
        register_method,
    )
    from .metrics import Metric, Scores
    from .planning import MergeOptions, MergePlan, load_recipe
    from .routing import Explanation, Prediction, RoutedModel, RoutedPipeline
    from .tuners import (
        EssentialComponentsConfig,
        EssentialComponentsModel,
        RoutedExpertsConfig,
        RoutedExpertsModel,
    )


__all__ = [
    "CAT",
    "DARE",
    "METHODS",
    "TIES",
    "TSVC",
    "TSVM",
    "WUDI",
    "ActivationStatistics",
    "AdaMerging",
    "Comparison",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "DamagedFileError",
    "EssentialComponentsConfig",
    "EssentialComponentsModel",
    "EssentialMerge",
    "Explanation",
    "HfEsmError",
    "HubError",
    "IncompatibleError",
    "InputStatistics",
    "Interference",
    "IsoC",
    "IsoCTS",
    "KnOTS",
    "Mean",
    "MergeMethod",
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "Merged",
    "Metric",
    "Prediction",
    "RegMean",
    "RoutedExpertsConfig",
    "RoutedExpertsModel",
    "RoutedMerge",
    "RoutedModel",
    "RoutedPipeline",
    "Scores",
    "Stack",
    "TaskArithmetic",
    "__version__",
    "add_comparison",
    "calibrate",
    "collect_statistics",
    "compare",
    "essential_components",
    "evaluate",
    "fuse_components",
    "load_recipe",
    "load_task_model",
    "measure_interference",
    "merge_models",
    "register_method",
    "update_card",
    "write_lora_adapter",
]


# The wing that each public name is loaded from, as type checkers read it above.
_NAMES = {
    "calibration": ("ActivationStatistics", "calibrate", "collect_statistics"),
    "checkpoints": ("load_task_model", "write_lora_adapter"),
    "evaluation": (
        "Comparison",
        "Interference",
        "add_comparison",
        "compare",
        "evaluate",
        "measure_interference",
        "update_card",
    ),
    "merging": ("MergeResult", "essential_components", "fuse_components", "merge_models"),
    "methods": (
        "CAT",
        "DARE",
        "METHODS",
        "TIES",
        "TSVC",
        "TSVM",
        "WUDI",
        "AdaMerging",
        "ConcreteAdaMerging",
        "ConcreteTaskArithmetic",
        "EssentialMerge",
        "InputStatistics",
        "IsoC",
        "IsoCTS",
        "KnOTS",
        "Mean",
        "MergeMethod",
        "Merged",
        "RegMean",
        "RoutedMerge",
        "Stack",
        "TaskArithmetic",
        "register_method",
    ),
    "metrics": ("Metric", "Scores"),
    "planning": ("MergeOptions", "MergePlan", "load_recipe"),
    "routing": ("Explanation", "Prediction", "RoutedModel", "RoutedPipeline"),
    "tuners": (
        "EssentialComponentsConfig",
        "EssentialComponentsModel",
        "RoutedExpertsConfig",
        "RoutedExpertsModel",
    ),
}


_WING_OF = {name: wing for wing, names in _NAMES.items() for name in names}


_MODULES = {*_NAMES, "architecture", "cli", "data", "hub", "linalg", "utils"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _WING_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_WING_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _PeftFinder:
    """Finder that registers the PEFT types of `hf_esm.tuners` right after peft is first imported, and leaves then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec: Any = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _PeftLoader(spec.loader, self)
                return spec
        return None


class _PeftLoader(Loader):
    """peft's own loader, which is put back into its place, and what follows when it is done."""

    def __init__(self, loader: Any, finder: _PeftFinder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        import_module(".tuners", __name__)


if sys.modules.get("peft") is None:
    sys.meta_path.insert(0, _PeftFinder())
# `import_module` waits for another thread that is importing peft. If peft itself imports hf_esm, the classes of peft
# do not exist yet; then the first use of `hf_esm.tuners` registers the types.
elif not getattr(import_module("peft").__spec__, "_initializing", False):
    import_module(".tuners", __name__)
