"""One merge's stages, times, warnings and progress."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils import tqdm

from ..calibration import ActivationStatistics
from ..checkpoints import model_identity
from ..errors import HfEsmError
from ..methods import describe_method
from ..planning import MergeOptions, MergePlan, check_disk, check_memory
from ..utils import Work, bytes_of, gather, readable, staging_folder, together
from ..version import __version__


logger = logging.getLogger(__name__)


class MergeRun:
    """Stages, times, warnings and progress of one merge."""

    def __init__(self, options: MergeOptions, accelerator: Accelerator, callback: Optional[Callable]):
        self.options, self.accelerator, self.callback = options, accelerator, callback
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str, joined: bool = True) -> Iterator[None]:
        """Time a stage, which all processes leave together; `joined=False` where the work inside sees to that."""
        start = time.perf_counter()
        with together(self.accelerator) if joined else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        if self.accelerator.is_main_process:
            logger.warning(message)

    def progress(self, description: str) -> Callable[[Iterable], Iterator]:
        """A wrapper for iterables: a named bar on the main process, and the caller's callback."""

        def wrap(items: Any) -> Iterator:
            items = list(items)
            bar = tqdm(items, desc=description, disable=not self.options.progress or not items)
            for done, item in enumerate(bar):
                yield item
                if self.callback is not None and self.accelerator.is_main_process:
                    self.callback(description, done + 1, len(items))

        return wrap


def notices(plan: MergePlan, options: MergeOptions, validation: Any, score_fn: Any) -> list[str]:
    """What was given in vain, and what takes more memory than was allowed."""
    given = [name for name, value in (("validation", validation), ("score_fn", score_fn)) if value is not None]
    found = [f"{name} is only used with alpha='auto'." for name in given if options.alpha != "auto"]
    if options.max_memory and plan.output_bytes > bytes_of(options.max_memory, "max_memory"):
        whole = {"alpha='auto'": options.alpha == "auto", plan.method.name: plan.method.routes}
        size = readable(plan.output_bytes)
        found += [f"{what}: holds the whole merged model, {size} or more, in memory." for what in whole if whole[what]]
    return found


def lacking_resources(plan: MergePlan, output: Optional[Path], max_memory: Any) -> list[str]:
    """What would stop the merge: too little memory or disk."""
    found = []
    for check in (partial(check_memory, plan, max_memory), partial(check_disk, plan, output) if output else None):
        try:
            if check is not None:
                check()
        except HfEsmError as error:
            found.append(str(error))
    return found


def shared_folder(stack: ExitStack, output: Optional[Path], accelerator: Accelerator) -> Path:
    """A folder that all processes work in, removed in the end: beside the output, else a temporary one."""
    folder = None
    with together(accelerator):
        if accelerator.is_main_process:
            place = output or Path(tempfile.gettempdir()) / "hf_esm"
            folder = stack.enter_context(staging_folder(place))
    return gather(accelerator, folder)[0]


def work_in_progress(
    plan: MergePlan,
    sources: Mapping[str, Any],
    statistics: Mapping[str, Optional[ActivationStatistics]],
    samples: Mapping[str, list],
    options: MergeOptions,
    accelerator: Accelerator,
) -> Work:
    """Work in progress, and all that it depends on."""
    if not options.resume_dir:
        return Work(None, {})
    identities = {name: model_identity(source) for name, source in sources.items()}
    found = {t: [asdict(s.provenance), s.keys_of, s.means()] for t, s in statistics.items() if s}
    return Work(
        options.resume_dir,
        {
            "the base": identities.pop("base"),
            "experts": identities,
            "samples or statistics": [found, samples],
            "the method or its settings": describe_method(plan.method),
            "heads": options.heads,
            "a batch_size": options.batch_size,
            "a seed": options.seed,
            "a number of processes": accelerator.num_processes,
            "a version": __version__,
        },
    )
