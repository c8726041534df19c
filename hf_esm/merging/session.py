"""What all steps of a merge use: times, warnings, progress, and the folders that they work in."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator

from ..planning import MergeOptions
from ..utils import Work, gather, naming_full_disk, staging_folder, together, tracked


logger = logging.getLogger(__name__)


class Session:
    """The times, warnings, progress and folders of one merge.

    Attributes:
        options: the options of the merge.
        accelerator: the Accelerate instance that all steps run under.
        callback: called on the main process as `callback(stage, done, total)`.
        output: folder that the caller named for the merged model, if any.
        seconds: time by stage, in seconds.
        stages: the stages of this merge, in order; empty until they are planned.
        warnings: messages for the user.
        work: work in progress in `options.resume_dir`; known once it was looked for.
        folder: where the merged model is written before it is published; known inside `workspace`.
        scratch: where intermediate files are; known inside `workspace`.
    """

    work: Work
    folder: Path
    scratch: Path

    def __init__(
        self,
        options: MergeOptions,
        accelerator: Accelerator,
        callback: Optional[Callable[[str, int, int], None]] = None,
    ):
        self.options, self.accelerator, self.callback = options, accelerator, callback
        self.output = Path(options.output_dir).expanduser() if options.output_dir else None
        self.seconds: dict[str, float] = {}
        self.stages: list[str] = []
        self.warnings: list[str] = []
        self.cleanup = ExitStack()

    @contextmanager
    def stage(self, name: str, joined: bool = True) -> Iterator[None]:
        """Time a stage, and say which it is of how many, if the merge has it at all.

        At the end all processes wait for each other; `joined=False` if the block does so itself.
        """
        if self.options.progress and self.accelerator.is_main_process and name in (self.stages or [name]):
            place = f"stage {self.stages.index(name) + 1} of {len(self.stages)}: " if self.stages else ""
            logger.info("%s%s", place, name)
        start = time.perf_counter()
        with together(self.accelerator) if joined else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def warn(self, *messages: str) -> None:
        """Record warnings, and log them on the main process."""
        for message in messages:
            self.warnings.append(message)
            if self.accelerator.is_main_process:
                logger.warning(message)

    def progress(self, description: str) -> Callable[[Iterable], Iterator]:
        """Return a wrapper for iterables that shows how far they are and calls the caller's callback, on the main
        process.
        """

        def wrap(items: Any) -> Iterator:
            items = list(items)
            for done, item in enumerate(tracked(items, description, self.options.progress)):
                yield item
                if self.callback is not None and self.accelerator.is_main_process:
                    self.callback(description, done + 1, len(items))

        return wrap

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """Provide the folders that all processes work in. An unpublished one is removed at the end."""
        with self.cleanup:
            self.folder = self._shared_folder()
            self.scratch = self.work.folder or self.folder / ".scratch"
            self.cleanup.callback(self.work.release)
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    if self.options.resume_dir:
                        self.work.begin(self.folder)
                    else:
                        self.scratch.mkdir()
            yield

    def _shared_folder(self) -> Path:
        """Make a folder next to the output, or a temporary one, and return its path on every process."""
        folder = None
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                if self.output is not None:
                    folder = self.cleanup.enter_context(staging_folder(self.output))
                else:
                    place = tempfile.TemporaryDirectory(prefix="hf_esm-", ignore_cleanup_errors=True)
                    folder = Path(self.cleanup.enter_context(place))
                    self.cleanup.enter_context(naming_full_disk(folder))
        return gather(self.accelerator, folder)[0]
