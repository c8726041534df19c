"""Time the merge of eight LoRA adapters of rank 16 of one layer to one of rank 64, from factors to factors.

    python benchmarks/lora_output.py [width]

By `mean` in the plain norm, and by several methods in the norm of the statistics of 2,048 tokens per expert. For
comparison, `mean` by a dense update and its SVD (float32), which is what the factors save.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_esm.checkpoints import Checkpoint
from hf_esm.merging.spans import best_factors, span_of
from hf_esm.methods import InputStatistics, Stack, resolve_method


METHODS = ("mean", "tsv-m", "iso-c", "esm")  # RegMean inverts a matrix of the layer's width: minutes, and no factors
EXPERTS, RANK, WRITTEN, TOKENS = 8, 16, 64, 2048


class Factors(Checkpoint):
    """One linear map of a LoRA adapter."""

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.a, self.b


def seconds(function: Callable[[], Any]) -> float:
    """Return the least time of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(width: int) -> None:
    """Print the times for a layer of this width."""
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(RANK, width, generator=draw), torch.randn(width, RANK, generator=draw)) for _ in range(EXPERTS)
    ]
    experts = {str(task): Factors(a, b) for task, (a, b) in enumerate(pairs)}
    inputs = [torch.randn(TOKENS, width, generator=draw) for _ in range(EXPERTS)]
    statistics = [InputStatistics(factor, factor.mean(0), TOKENS) for factor in inputs]

    def merge(method: str, known: list[Tensor]) -> tuple[Tensor, Tensor]:
        span = span_of(experts, "layer")
        stack = Stack(
            "layer", "layer", span.cores, is_linear=True, statistics=statistics if known else [], num_outputs=width
        )
        left, a, _ = best_factors(resolve_method(method).merge(stack).update, WRITTEN, known)
        return span.basis @ left, a

    def merge_densely() -> Tensor:
        u, s, vh = torch.linalg.svd(sum(b @ a for a, b in pairs) / EXPERTS, full_matrices=False)
        return (u[:, :WRITTEN] * s[:WRITTEN]) @ vh[:WRITTEN]

    print(
        f"{EXPERTS} adapters of rank {RANK}, {width} x {width}, {torch.get_num_threads()} threads: to rank {WRITTEN}"
    )
    print(f"  mean, plain norm  {seconds(lambda: merge('mean', [])):6.2f} s")
    for method in METHODS:
        print(f"  {method:17} {seconds(lambda method=method: merge(method, inputs)):6.2f} s")
    print(f"  mean, dense SVD   {seconds(merge_densely):6.2f} s")


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
