"""Time single layers of ESM (default settings), from the experts' files to the scratch file, and the lower bounds.

Called by merge_speed.py. Every row has as many matrices as its depth says, of T experts (bfloat16, updates of rank 16
and noise; in the rows of adapters, float32 without the noise) with statistics of 2,048 tokens. They are merged by the
package's first pass. The floor adds up what no exact route avoids on this machine, except for adapters:

    bytes       the updates and statistics read, the merged update written, at the rates measured for the same files
    products    the operations of the products, symmetric ones counted half, at the measured rate of float64 products
    eigen       the wanted eigenvectors of T problems of the smaller side, and all of one for each polar factor, in the
                time that LAPACK takes alone (float64)

The literal side computes the same formulas by LAPACK's thin SVDs in float32: of every output shift (with the shrinkage
as rows of the inputs) and of both stacks, from tensors in memory. It is left out above 8,192 rows, where it takes a
quarter of an hour. The last columns are for the same merge with `tolerance` 0.001: seconds, the literal side's time
divided by them, how far the merged update is from the exact one, and the share of the energy of one task's exact
directions that the directions found with the tolerance hold. Half an hour in all on two cores.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_esm import ActivationStatistics, EssentialMerge
from hf_esm.architecture import LinearMap
from hf_esm.checkpoints.base import Checkpoint
from hf_esm.linalg import essential_subspace, largest_eigenpairs
from hf_esm.merging.weights import Worker, merge_weights
from hf_esm.methods.essential import share_subtracted
from hf_esm.methods.stack import InputStatistics
from hf_esm.utils.devices import algebra_device, fast_products


TOKENS = 2048
SHAPES = [(384, 384), (768, 3072), (1024, 1024), (2048, 2048), (8192, 2048)]
SHAPES += [(4096, 4096), (4096, 11008), (11008, 4096)]
METHOD = EssentialMerge()
TOLERANCE = 0.001


class Stored(Checkpoint):
    """Matrices of one shape in one file."""

    def __init__(self, path: Path, depth: int):
        self.file, self.title = safe_open(path, "pt"), path.stem
        self.names = {f"layer.{i}.weight": f"layer.{i}.weight" for i in range(depth)}
        self.skeleton = nn.Module()  # without blocks, so that no weight has a depth
        self.linear = {name: LinearMap(name, name.removesuffix(".weight")) for name in self.names}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


class Adapters(Stored):
    """Updates of low rank, as adapters give them."""

    def update(self, name: str, base: Tensor) -> Tensor:
        return self.file.get_tensor(f"{name}.B") @ self.file.get_tensor(f"{name}.A")


def measure_layers() -> None:
    """Print the tables: by shape, then by T, width and depth."""
    device = algebra_device(Accelerator())
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{where}; float64 products {product_rate(device) / 1e9:.0f} GFLOP/s")
    if device.type == "cpu":
        print("No GPU was found.")
    print(
        "d_out x d_in    T depth   seconds   floor (bytes, products, eigen)  of the floor  literal   ratio"
        "  tolerance  ratio   apart    held"
    )
    several = torch.get_num_threads()  # small weights are merged side by side, one thread each
    for rows, columns in SHAPES:
        line(rows, columns, 8, several if rows * columns < 4_000_000 else 1, device, literal=rows <= 8192)
    print("adapters of rank 16")
    for width in (1024, 4096):
        line(width, width, 8, several if width == 1024 else 1, device, literal=True, adapters=True)
    print("growth with T, width and depth")
    for tasks in (2, 4, 8, 16):
        line(1024, 1024, tasks, several, device)
    for width in (512, 1024, 1536):
        line(width, width, 4, several, device)
    for depth in (several, 2 * several, 4 * several):
        line(1024, 1024, 4, depth, device)


def line(
    rows: int,
    columns: int,
    tasks: int,
    depth: int,
    device: torch.device,
    literal: bool = False,
    adapters: bool = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan, statistics = write_problem(Path(folder), rows, columns, tasks, depth, adapters)
        rounds = 1 if rows * columns > 8_000_000 else 3

        def merge() -> None:
            merge_weights(plan, statistics, Path(folder), worker=Worker(device=device))

        taken = best(merge, rounds)
        parts = floor(rows, columns, tasks, depth, device)
        text = f"{rows:5} x {columns:<6} {tasks:3} {depth:5} {taken:9.3f}   {sum(parts):8.3f} "
        text += f"({', '.join(f'{part:.3f}' for part in parts)})".ljust(26) + f"{taken / sum(parts):9.2f}"
        if literal:
            updates = [e.update("layer.0.weight", plan.base.tensor("layer.0.weight")) for e in plan.experts.values()]
            updates = [update.to(device) for update in updates]
            inputs = [of["layer.0.weight"].factor.to(device) for of in statistics.values()]
            slow = depth * best(lambda: merge_literally(updates, inputs), 1)
            text += f"{slow:16.2f} {slow / taken:7.1f}"
            exact = first_update(Path(folder))
            plan.method = replace(METHOD, tolerance=TOLERANCE)
            fast = best(merge, rounds)
            difference = float((first_update(Path(folder)) - exact).norm() / exact.norm())
            text += (
                f"{fast:11.3f} {slow / fast:6.1f} {difference:7.3f} {share_held(inputs[0], updates[0], tasks):7.4f}"
            )
        print(text, flush=True)


def first_update(folder: Path) -> Tensor:
    (path,) = folder.glob("updates-0*.safetensors")
    with safe_open(path, "pt") as file:  # the next run replaces the file
        return file.get_tensor("layer.0.weight").clone()


def share_held(inputs: Tensor, update: Tensor, tasks: int) -> float:
    """Return the energy of directions found with the tolerance, as a share of that of the exact directions."""
    rank = max(int(min(update.shape) * METHOD.rank_share) // tasks, 1)
    with fast_products(TOLERANCE):
        directions = essential_subspace(inputs, update, rank, METHOD.shrinkage, TOLERANCE).directions.to(update.dtype)
    seen = update.T @ directions
    ridge = METHOD.shrinkage * inputs.square().sum() / inputs.shape[1]
    held = (inputs @ seen).square().sum() + ridge * seen.square().sum()
    return float(held / essential_subspace(inputs, update, rank, METHOD.shrinkage).squares.sum())


def best(work: Callable, rounds: int = 2) -> float:
    """Return the shortest of some runs, in seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_problem(
    folder: Path, rows: int, columns: int, tasks: int, depth: int, adapters: bool = False
) -> tuple[SimpleNamespace, dict[str, ActivationStatistics]]:
    """Write the inputs of pass one: a plan over files, and statistics."""
    draw = torch.Generator().manual_seed(0)
    names = [f"layer.{i}.weight" for i in range(depth)]
    base = {name: torch.randn(rows, columns, generator=draw) / math.sqrt(columns) for name in names}
    save_file({name: weight.bfloat16() for name, weight in base.items()}, folder / "base.safetensors")
    experts, statistics = {}, {}
    for task in map(str, range(tasks)):
        tuned = {}
        for name, weight in base.items():
            b, a = 1e-3 * torch.randn(rows, 16, generator=draw), torch.randn(16, columns, generator=draw)
            noise = 1e-3 * torch.randn(rows, columns, generator=draw)
            tuned |= {f"{name}.B": b, f"{name}.A": a} if adapters else {name: (weight + b @ a + noise).bfloat16()}
        save_file(tuned, folder / f"{task}.safetensors")
        experts[task] = (Adapters if adapters else Stored)(folder / f"{task}.safetensors", depth)
        factor = torch.randn(TOKENS, columns, generator=draw)
        entries = {name: InputStatistics(factor, factor.mean(0), TOKENS) for name in names}
        path = ActivationStatistics(entries, {name: name for name in names}).save(folder / f"{task}.stats.safetensors")
        statistics[task] = ActivationStatistics.load(path)
    plan = SimpleNamespace(
        base=Stored(folder / "base.safetensors", depth),
        experts=experts,
        method=METHOD,
        heads=SimpleNamespace(shared=names),
        unchanged=frozenset(),
    )
    return plan, statistics


def floor(rows: int, columns: int, tasks: int, depth: int, device: torch.device) -> tuple[float, float, float]:
    """Return seconds for bytes, products and eigenproblems; operations are multiplications and additions."""
    small, tokens = min(rows, columns), min(TOKENS, columns)
    rank = max(int(small * METHOD.rank_share) // tasks, 1)
    stacked = rank * tasks
    read = 2 * rows * columns * (tasks + 1) + 4 * tasks * tokens * columns
    reading, writing = file_rates()
    bytes_ = read / reading + 4 * rows * columns / writing
    if rows > columns:  # moments of the inputs, Gram matrix of the update, both together, directions
        shifts = columns**2 * tokens + columns**2 * rows + 3 * columns**3 + 2 * rows * columns * rank
    else:  # output shift, its Gram matrix and that of the update
        shifts = 2 * tokens * rows * columns + rows**2 * tokens + rows**2 * columns
    shifts += 2 * rows * columns * rank  # coordinates
    polar = (rows + columns) * 3 * stacked**2  # Gram matrix and its root, applied
    products = tasks * shifts + polar + 2 * rows * columns * stacked
    eigen = tasks * eigen_seconds(small, rank, device) + 2 * eigen_seconds(stacked, stacked, device)
    return depth * bytes_, depth * products / product_rate(device), depth * eigen


@cache
def product_rate(device: torch.device) -> float:
    """Measure the operations per second of a float64 product."""
    a = torch.randn(2048, 2048, dtype=torch.float64, device=device)
    return 2 * 2048**3 / best(lambda: a @ a, 4)


@cache
def eigen_seconds(size: int, wanted: int, device: torch.device) -> float:
    """Measure LAPACK's time, or the GPU library's, for the largest eigenpairs of a symmetric matrix in float64."""
    probe = torch.randn(size, size, dtype=torch.float64, device=device)
    probe = probe @ probe.T
    return best(lambda: largest_eigenpairs(probe, wanted), 2 if size > 2000 else 4)


@cache
def file_rates() -> tuple[float, float]:
    """Measure the bytes per second read from a file that was just written, and written to a file."""
    tensor = torch.zeros(2**26)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.safetensors"

        def write() -> None:
            with path.open("wb") as file:
                file.write(tensor.numpy().data)
                file.flush()

        writing = best(write)
        save_file({"x": tensor}, path)
        reading = best(lambda: safe_open(path, "pt").get_tensor("x").sum())
    return tensor.nbytes / reading, tensor.nbytes / writing


def merge_literally(updates: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Merge by ESM with default settings, one thin SVD after the other, float32."""
    rows, columns = updates[0].shape
    rank = max(int(min(rows, columns) * METHOD.rank_share) // len(updates), 1)
    left, values, right = [], [], []
    for update, x in zip(updates, inputs, strict=True):
        ridge = METHOD.shrinkage * x.square().sum() / columns
        augmented = torch.cat([x, ridge.sqrt() * torch.eye(columns, device=x.device)])
        essential = torch.linalg.svd(augmented @ update.T, full_matrices=False)[2][:rank].T
        u, s, v = torch.linalg.svd(essential.T @ update, full_matrices=False)
        left, values, right = [*left, essential @ u], [*values, s], [*right, v]
    u, _, v = torch.linalg.svd(torch.cat(left, dim=1), full_matrices=False)
    p, _, q = torch.linalg.svd(torch.cat(right), full_matrices=False)
    merged = (u @ v * torch.cat(values)) @ (p @ q)
    norm = torch.stack([update.norm() for update in updates]).norm()
    total = sum(updates[1:], start=updates[0])
    merged *= METHOD.factor * norm / merged.norm()
    return merged - total * share_subtracted(METHOD.sum_subtracted, total.norm(), norm)
