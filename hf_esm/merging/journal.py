"""The journal of a pass over the weights, by which an interrupted pass is resumed."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DamagedFileError
from ..utils import reading
from .updates import WeightReport


class Journal:
    """Reports of the weights that a pass has merged, and checksums of their updates, one JSON object a line, for a
    pass that resumes it.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, reports: Mapping[str, WeightReport], digests: Mapping[str, str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: [asdict(reports[name]), digests[name]] for name in reports}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[str, WeightReport]:
        """Return the reports of an interrupted pass; without the file of its weights, there are none.

        Half a line at the end is cut off.

        Raises:
            HfEsmError: if a line, or a weight that it names, is not what was written.
        """
        updates = self.path.with_suffix(".safetensors")
        if not self.path.is_file() or not updates.is_file():
            self.path.unlink(missing_ok=True)
            return {}
        reports: dict[str, WeightReport] = {}
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if lines != whole:
            os.truncate(self.path, sum(map(len, whole)))
        remedy = f"Remove {self.path.parent} to start again."
        with reading(self.path, remedy=remedy):
            digests: dict[str, str] = {}
            for line in whole:
                for name, (report, digest) in json.loads(line).items():
                    reports[name], digests[name] = WeightReport(**report), digest
        if not digests:
            return {}
        try:
            with safe_open(updates, "pt") as file:
                intact = all(checksum(file.get_tensor(name)) == digest for name, digest in digests.items())
        except (SafetensorError, OSError):
            intact = False
        if not intact:
            raise DamagedFileError(f"{updates} was changed after the merge was interrupted. {remedy}")
        return reports


def checksum(tensor: Tensor) -> str:
    """Return the checksum of a tensor's content."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
