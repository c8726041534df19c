"""Compare methods with mergekit's own: the weights, and time and memory of whole processes.

    python -m venv MK && MK/bin/pip install mergekit==0.1.5 torch==2.13.0
    python benchmarks/against_mergekit.py FOLDER --mergekit MK/bin/python [--hidden 512 --layers 4 --experts 3]
    python benchmarks/against_mergekit.py FOLDER --mergekit MK/bin/python --times-only [--before CHECKOUT --repeat 3]

mergekit has an environment of its own, as its dependencies are not ours. The script makes a Llama of random weights
and experts of it in FOLDER, and merges them by both programs with equal settings: `density_scope: tensor`, and the
method on embeddings, too. Each expert's update is a part that all share and a part of its own, of `--update` times the
base's standard deviation.

    float32    models in float32: the difference of the merged updates, ‖ours − theirs‖ / ‖theirs‖; the share of
               entries that are not the base's, and the ratio of the norms: where both draw at random, no more can be
               compared
    bfloat16   the same models rounded: the share of entries that are equal; and how far the merged update is from that
               of the float32 run, of its norm (mergekit computes in bfloat16, we in float32, rounded once)
    seconds    of the `--timed` cases in bfloat16, by the command lines, a new process for each and each program in
               turn, with Python's start and imports: on the clock, and in brackets of one processor
    peak       of its resident memory (`VmHWM`, with the mapped pages of the checkpoints)

With `--times-only`, weights are not compared: each of the `--timed` cases is run by each program in turn, `--repeat`
times, and the table has the minimum and the median of each. `--before` names a checkout of an earlier version of ours,
which is run, too.

Without `--mergekit`, ours alone is run. FOLDER keeps the table as `table.md`; the models are removed. Linux only.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from torch import Tensor

from hf_esm.methods import resolve_method


@dataclass
class Case:
    """One merge by both programs.

    Attributes:
        label: of the row.
        theirs: mergekit's method.
        parameters: of the whole merge, in mergekit.
        per_model: parameters of each expert, in mergekit.
        ours: our method with its settings.
        alpha: our α, if it is not 1.
        base: mergekit's `base_model`: `"base"`, the first expert, or none.
        experts: number of experts; all by default.
        draws: whether entries are drawn at random, so that weights cannot be equal.
    """

    label: str
    theirs: str
    ours: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    per_model: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    base: Optional[str] = "base"
    experts: Optional[int] = None
    draws: bool = False


ONE = {"weight": 1.0}
TENSOR = {"density_scope": "tensor"}
CASES = [
    Case("linear", "linear", {"name": "mean"}, per_model=ONE, base=None),
    Case("task_arithmetic", "task_arithmetic", {"name": "task-arithmetic"}, {"lambda": 0.3}, ONE, 0.3),
    Case("ties", "ties", {"name": "ties", "density": 0.2, **TENSOR}, per_model={**ONE, "density": 0.2}),
    Case(
        "breadcrumbs",
        "breadcrumbs",
        {"name": "breadcrumbs", "density": 0.3, "gamma": 0.01, **TENSOR},
        {"lambda": 0.3},
        {**ONE, "density": 0.3, "gamma": 0.01},
        0.3,
    ),
    Case("sce", "sce", {"name": "sce", "density": 1.0}),
    Case("sce, 30 % selected", "sce", {"name": "sce", "density": 0.3}, {"select_topk": 0.3}),
    Case(
        "dare_ties, all kept",
        "dare_ties",
        {"name": "dare-ties", "density": 1.0},
        {"normalize": True},
        {**ONE, "density": 1.0},
    ),
    Case(
        "dare_ties",
        "dare_ties",
        {"name": "dare-ties", "density": 0.5},
        {"normalize": True},
        {**ONE, "density": 0.5},
        draws=True,
    ),
    Case("della, all kept", "della", {"name": "della", "density": 1.0}, per_model={**ONE, "density": 1.0}),
    Case(
        "della",
        "della",
        {"name": "della", "density": 0.5, "epsilon": 0.4},
        per_model={**ONE, "density": 0.5, "epsilon": 0.2},
        draws=True,
    ),
    Case(
        "dare_linear",
        "dare_linear",
        {"name": "dare", "density": 0.5},
        {"lambda": 0.3},
        {**ONE, "density": 0.5},
        0.3,
        draws=True,
    ),
    Case("model_stock", "model_stock", {"name": "model-stock"}),
    Case("slerp", "slerp", {"name": "slerp", "t": 0.3}, {"t": 0.3}, base="expert0", experts=2),
    Case("nuslerp", "nuslerp", {"name": "nuslerp"}, per_model=ONE, experts=2),
    Case(
        "nuslerp, by row",
        "nuslerp",
        {"name": "nuslerp", "along": "rows"},
        {"nuslerp_flatten": False},
        ONE,
        experts=2,
    ),
    Case(
        "nuslerp, by column",
        "nuslerp",
        {"name": "nuslerp", "along": "columns"},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ONE,
        experts=2,
    ),
    Case("karcher", "karcher", {"name": "karcher"}, base=None),
]


# Run in each program's Python, with a file: of recipes, and of configurations and output folders.
OURS = """
import json, sys
from hf_esm.cli import main
for recipe in json.load(open(sys.argv[1])):
    sys.argv = ["hf-esm", "merge", recipe, "--quiet"]
    if status := main():
        sys.exit(status)
"""
THEIRS = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
for config, out in json.load(open(sys.argv[1])):
    run_merge(MergeConfiguration.model_validate(config), out, options=options)
"""
# At the end of both programs. What a parent counts of a child includes the parent's own size at its start.
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
HEADER = (
    "| case | difference, float32 | not the base's: ours | theirs | norm: ours / theirs | equal, bfloat16 "
    "| off float32: ours | theirs | seconds: ours | theirs | peak in MB: ours | theirs |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment with mergekit")
    parser.add_argument(
        "--cases", nargs="+", help=f"default: all; there are {', '.join(case.label for case in CASES)}"
    )
    parser.add_argument("--timed", nargs="*", default=["linear", "ties", "della", "karcher"], help="cases to measure")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--update", type=float, default=0.2, help="size of the updates, of the base's weights")
    parser.add_argument("--times-only", action="store_true", help="do not compare weights")
    parser.add_argument("--repeat", type=int, default=1, help="runs of every program, with `--times-only`")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version of ours")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.cases or case.label in args.cases]
    work = args.folder.absolute() / "models"
    work.mkdir(parents=True)
    try:
        dtypes = ["bfloat16"] if args.times_only else ["float32", "bfloat16"]
        parameters = write_models(work, args, dtypes)
        experts = f"{args.experts} experts of {parameters / 1e6:.1f} M parameters"
        print(f"{experts}; one thread of a machine with a load of {os.getloadavg()[0]:.1f}", flush=True)
        programs = {"ours": None} | ({"theirs": args.mergekit} if args.mergekit else {})
        if args.times_only:
            write_times(work, args, programs)
            return
        for dtype in ("float32", "bfloat16"):
            for python in programs.values():
                run(work, cases, args.experts, dtype, python)
        lines = [HEADER, "|---|" + "--:|" * (HEADER.count("|") - 2)]
        print("\n".join(lines), flush=True)
        for case in cases:
            sums, used = compared(work, case, list(programs)), {}
            for dtype in ("float32", "bfloat16"):
                for program in programs:
                    shutil.rmtree(output(work, case, dtype, program))
            if case.label in args.timed:
                used = {name: run(work, [case], args.experts, "bfloat16", python) for name, python in programs.items()}
            lines.append(row(case, sums, list(programs), used))
            print(lines[-1], flush=True)
        (args.folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(work)


def write_times(work: Path, args: argparse.Namespace, programs: dict[str, Optional[Path]]) -> None:
    """Run the timed cases by all programs in turn, and write the table of the times."""
    names = [*(["before"] if args.before else []), *programs]
    columns = [f"{what}: {name}" for what in ("seconds", "processor", "peak in MB") for name in names]
    lines = [f"| case | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    print("\n".join(lines), flush=True)
    for case in [case for case in CASES if case.label in args.timed]:
        runs = defaultdict(list)
        for _ in range(args.repeat):
            for name in names:
                checkout = args.before if name == "before" else None
                runs[name].append(run(work, [case], args.experts, "bfloat16", programs.get(name), checkout))
                shutil.rmtree(output(work, case, "bfloat16", "theirs" if name == "theirs" else "ours"))
        cells = []
        for i, form in enumerate(("{:.1f}", "{:.1f}", "{:.0f}")):
            for name in names:
                values = [found[i] / (1e6 if i == 2 else 1) for found in runs[name]]
                cells.append(" / ".join(form.format(of(values)) for of in (min, statistics.median)))
        lines.append(f"| {case.label} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (args.folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_models(work: Path, args: argparse.Namespace, dtypes: list[str]) -> int:
    """Write the base and the experts in these dtypes; return the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 128, 1),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)

    def write(name: str) -> None:
        for dtype in dtypes:
            rounded = {key: weight.to(getattr(torch, dtype)) for key, weight in model.state_dict().items()}
            model.save_pretrained(work / dtype / name, state_dict=rounded)
            written = work / dtype / name / "config.json"
            written.write_text(json.dumps(json.loads(written.read_text()) | {"dtype": dtype}))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        write("base")
        start = {name: parameter.clone() for name, parameter in model.named_parameters()}
        shared = {name: torch.randn_like(weight) for name, weight in start.items()}
        for expert in range(args.experts):
            for name, parameter in model.named_parameters():
                update = (shared[name] + torch.randn_like(parameter)) / 2**0.5
                parameter.copy_(start[name] + args.update * start[name].std() * update)
            write(f"expert{expert}")
    return sum(weight.numel() for weight in start.values())


def run(
    work: Path, cases: list[Case], count: int, dtype: str, python: Optional[Path], checkout: Optional[Path] = None
) -> tuple[float, float, int]:
    """Merge cases in one new process, of mergekit's Python if it is given, of ours if not (in another checkout).

    Returns the seconds on the clock and of one processor, and the peak of the resident memory in bytes.
    """
    make = ours if python is None else theirs
    jobs = [make(work, case, [f"expert{i}" for i in range(case.experts or count)], dtype) for case in cases]
    file = work / "jobs.json"
    file.write_text(json.dumps(jobs))
    if python is None:
        command = [sys.executable, "-c", OURS + PEAK, str(file)]
    else:
        command = [str(python.absolute()), "-c", THEIRS + PEAK, str(file)]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if python is None:
        environment["PYTHONPATH"] = str((checkout or Path(__file__).parents[1]).absolute())
    process = subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{said[-3000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, 1024 * int(said.split()[-1])


def ours(work: Path, case: Case, experts: list[str], dtype: str) -> str:
    """Write our recipe, and return its file."""
    recipe = {
        "base": str(work / dtype / "base"),
        "experts": {name: str(work / dtype / name) for name in experts},
        "method": case.ours,
        # Without this, embeddings are merged by token counts, or without samples by the mean.
        "overrides": [{"kind": "embedding", "method": case.ours, "alpha": case.alpha}],
        "output_dir": str(output(work, case, dtype, "ours")),
    }
    if resolve_method(case.ours).tunable:
        recipe["alpha"] = case.alpha
    file = work / f"{case.label.replace(' ', '-')}.yaml"
    file.write_text(json.dumps(recipe))
    return str(file)


def theirs(work: Path, case: Case, experts: list[str], dtype: str) -> tuple[dict[str, Any], str]:
    """Return mergekit's configuration and output folder."""
    models = [{"model": str(work / dtype / name), "parameters": case.per_model} for name in experts]
    config: dict[str, Any] = {"merge_method": case.theirs, "models": models, "dtype": dtype}
    if case.base:
        config["base_model"] = str(work / dtype / case.base)
    if case.parameters:
        config["parameters"] = case.parameters
    return config, str(output(work, case, dtype, "theirs"))


def output(work: Path, case: Case, dtype: str, program: str) -> Path:
    return work / f"{case.label.replace(' ', '-')}-{dtype}-{program}"


def row(case: Case, sums: dict[str, float], programs: list[str], used: dict[str, tuple[float, float, int]]) -> str:
    """Return the line of the table."""
    norms = {p: sums[f"norm {p}"] ** 0.5 for p in programs}
    difference = ratio = equal = ""
    if len(programs) > 1:
        ratio = f"{norms['ours'] / norms['theirs']:.3f}"
        if not case.draws:
            difference = f"{(sums['difference'] ** 0.5) / norms['theirs']:.1e}"
            equal = f"{100 * sums['equal'] / sums['size']:.2f} %"
    changed = {p: f"{100 * sums[f'changed {p}'] / sums['size']:.1f} %" for p in programs}
    off = {p: f"{100 * sums[f'off {p}'] ** 0.5 / norms[p]:.2f} %" for p in programs}
    if case.draws:  # mergekit draws anew
        off.pop("theirs", None)
    seconds = {p: f"{clock:.1f} ({processor:.1f})" for p, (clock, processor, _) in used.items()}
    peak = {p: f"{size / 1e6:.0f}" for p, (_, _, size) in used.items()}
    pairs = [[of.get("ours", ""), of.get("theirs", "")] for of in (changed, off, seconds, peak)]
    cells = [case.label, difference, *pairs[0], ratio, equal, *pairs[1], *pairs[2], *pairs[3]]
    return f"| {' | '.join(cells)} |"


def compared(work: Path, case: Case, programs: list[str]) -> dict[str, float]:
    """Return sums over all entries: of what both programs made of the update, and where they differ."""
    bases = {dtype: dict(tensors(work / dtype / "base")) for dtype in ("float32", "bfloat16")}
    written = {
        (program, dtype): dict(tensors(output(work, case, dtype, program))) for program in programs for dtype in bases
    }
    sums: dict[str, float] = defaultdict(float)
    for name, start in bases["float32"].items():
        sums["size"] += start.numel()
        updates = {p: written[p, "float32"][name].double() - start.double() for p in programs}
        for program, update in updates.items():
            rounded = written[program, "bfloat16"][name].double() - bases["bfloat16"][name].double()
            sums[f"norm {program}"] += float(update.square().sum())
            sums[f"changed {program}"] += int(update.count_nonzero())
            sums[f"off {program}"] += float((rounded - update).square().sum())
        if len(programs) > 1:
            sums["difference"] += float((updates["ours"] - updates["theirs"]).square().sum())
            same = written["ours", "bfloat16"][name] == written["theirs", "bfloat16"][name]
            sums["equal"] += int(same.sum())
    return sums


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


if __name__ == "__main__":
    main()
