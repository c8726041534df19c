"""Measure what choosing and refining cost beside a plain merge: time and peak memory, each merge in a new process.

    python benchmarks/merge_cost.py FOLDER [--methods esm "{name: esm, alpha: auto}" default] [--max-length 96]

FOLDER is that of benchmarks/suite.py or of benchmarks/language.py, whose docstring also says what a method is. Seconds
are those of the processor, in one thread: other programs on the machine do not count. Memory is what the process
allocates (see benchmarks/peak_memory.py). The ratio is that to the first method. Linux only.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from language import merge_arguments
from peak_memory import peak_of

from hf_esm import merge_models
from hf_esm.utils import markdown_table


METHODS = ["esm", "{name: esm, alpha: auto}", "{name: esm, refine: true}", "{name: default, refine: false}", "default"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names, or settings as YAML")
    parser.add_argument("--num-samples", type=int, default=64, help="samples per task")
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a text")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    common = [str(args.folder), "--num-samples", str(args.num_samples), "--max-length", str(args.max_length)]
    found = {}
    for method in args.methods:
        command = [sys.executable, __file__, *common, "--one", method]
        ran = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found[method] = json.loads(ran.stdout.splitlines()[-1])
    first = found[args.methods[0]]["seconds"]
    rows = [["method", "seconds", "ratio", "peak memory, MB"]]
    for method, of in found.items():
        rows.append([f"`{method}`", f"{of['seconds']:.1f}", f"{of['seconds'] / first:.1f}", f"{of['peak'] / 1e6:.0f}"])
    print("\n".join(markdown_table(rows)))


def measure(args: argparse.Namespace, method: str) -> dict[str, float]:
    """Return the processor's seconds and the peak memory of one merge."""
    tasks = sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    samples = {}
    for task in tasks:
        data = json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes()))
        writes = "labels" not in data  # a language suite, whose samples hold the answers
        rows = data["train" if writes else "validation"][: args.num_samples]
        samples[task] = [
            row["text"] + row.get("label", "") if writes else {k: v for k, v in row.items() if k != "label"}
            for row in rows
        ]
    before = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as scratch:
        peak = peak_of(
            lambda: merge_models(
                args.folder / "base",
                {task: args.folder / "experts" / task for task in tasks},
                calibration=samples,
                num_samples=args.num_samples,
                max_length=args.max_length,
                output_dir=str(Path(scratch) / "merged"),
                progress=False,
                **merge_arguments(method, "default"),
            )
        )
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "peak": peak}


if __name__ == "__main__":
    main()
