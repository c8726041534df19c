"""Statistics and experts' answers that merges and comparisons share: files by what they depend on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock

from ..calibration import ActivationStatistics
from ..checkpoints import ModelSource, model_identity
from ..data import Sample
from ..errors import HfEsmError
from ..planning import MergeOptions, MergePlan
from ..utils import fingerprint


CACHE_VERSION = 1  # of what the names of the files depend on


@dataclass(frozen=True)
class InputCache:
    """The folder `cache_dir` of a merge.

    Attributes:
        folder: the folder.
        plan: the plan of the merge.
        sources: the models by task; the base is `"base"`.
        options: the options of the merge.
    """

    folder: Path
    plan: MergePlan
    sources: Mapping[str, ModelSource]
    options: MergeOptions

    @classmethod
    def of(cls, plan: MergePlan, sources: Mapping[str, ModelSource], options: MergeOptions) -> Optional["InputCache"]:
        """Return the cache that the options name, if any."""
        return cls(Path(options.cache_dir).expanduser(), plan, sources, options) if options.cache_dir else None

    @cached_property
    def _identities(self) -> dict[str, Any]:
        return {name: model_identity(source) for name, source in self.sources.items()}

    def _key(self, task: str, samples: list[Sample]) -> str:
        # Token ids of a shared vocabulary depend on all models of the merge.
        models = self._identities if self.plan.vocabulary else [self._identities["base"], self._identities[task]]
        shared = self.options.tokenizer if self.plan.vocabulary else None
        return fingerprint(CACHE_VERSION, models, shared, samples)

    def statistics(self, task: str, samples: list[Sample]) -> Path:
        """Return the file of an expert's statistics on these samples, with the features of the base."""
        return self.folder / f"statistics-{self._key(task, samples)}.safetensors"

    def answers(self, task: str, samples: list[Sample]) -> tuple[Path, Path]:
        """Return the files of an expert's answers: the samples as the merged model reads them, and the answers."""
        key = self._key(task, samples)
        return self.folder / f"asked-{key}.safetensors", self.folder / f"answers-{key}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from computing what is computed inside the block: they wait, and then find it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".inputs.lock", thread_local=False):
            yield


def readable_statistics(path: Path) -> bool:
    """Return whether a file holds statistics; one that is damaged is collected again."""
    if not path.is_file():
        return False
    try:
        ActivationStatistics.load(path)
    except HfEsmError:
        return False
    return True
