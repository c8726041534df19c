"""Learned tensors and their optimizers on disk, so that an interrupted run can go on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..utils import UNSEALED, atomic_file, check_seal, reading, seal


FORMAT = "hf_esm.learned"

_AGAIN = "Remove the file to start again."


class SavedState:
    """One file with tensors that are learned, the state of their optimizers, and a few plain values.

    Attributes:
        path: the file.
        tensors: learned tensors by name. They are written by `save`, and set by `resume`.
        optimizers: by name. Their state is written and set likewise.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        optimizers: Mapping[str, torch.optim.Optimizer],
        accelerator: Accelerator,
    ):
        self.path, self.tensors, self.optimizers, self.accelerator = path, tensors, optimizers, accelerator

    def _optimized(self) -> Iterable[tuple[str, torch.optim.Optimizer, Tensor]]:
        """Yield the prefix of the state's names, the optimizer, and the parameter, of everything that is optimised."""
        for kind, optimizer in self.optimizers.items():
            for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
                yield f"{kind}.{i}.", optimizer, parameter

    def save(self, **values: Any) -> None:
        """Write tensors, optimizers and plain values on the main process, in place of the file before."""
        if self.accelerator.is_main_process:
            tensors = dict(self.tensors)
            for prefix, optimizer, parameter in self._optimized():
                tensors |= {prefix + name: value for name, value in optimizer.state.get(parameter, {}).items()}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with atomic_file(self.path) as partial:
                save_file(tensors, partial, {"format": FORMAT, "header": json.dumps(values)} | UNSEALED)
                seal(partial)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def resume(self) -> dict[str, Any]:
        """Set tensors and optimizers to those of an interrupted run, and return its plain values; empty without one.

        Raises:
            HfEsmError: if the file is damaged, or is of another run.
        """
        if not self.path.is_file():
            return {}
        check_seal(self.path, _AGAIN)
        with reading(self.path, f"{self.path}: cannot be resumed: it", _AGAIN):
            with safe_open(self.path, "pt") as file:
                values = dict(json.loads((file.metadata() or {})["header"]))
                saved = {name: file.get_tensor(name) for name in file.keys()}
            shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
            for prefix, _, parameter in self._optimized():  # momenta are like their parameter, "step" is a number
                own = [name for name in saved if name.startswith(prefix)]
                shapes |= {name: parameter.shape if saved[name].dim() else saved[name].shape for name in own}
            for name, shape in shapes.items():
                if saved[name].shape != shape or not saved[name].isfinite().all():
                    raise ValueError(f"'{name}' is no tensor of finite numbers {tuple(shape)}")
            for name, tensor in self.tensors.items():
                tensor.copy_(saved[name])
        for prefix, optimizer, parameter in self._optimized():
            state = {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
                }
        return values
