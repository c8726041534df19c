"""Merge with several processes on one machine: the same model, and the time of each number of processes.

    python benchmarks/processes.py FOLDER [--processes 1 2 4] [--method "{name: esm}"] [--num-samples 64]

benchmarks/language.py describes FOLDER. `hf-esm merge` merges its experts by the default (a method and α by agreement
with the experts, then refining) or by `--method`, under torch's launcher on the CPU, with one thread a process, twice
with every number of processes. The table has, beside the seconds of the merge, what differs from one process: the
largest relative difference of a weight, the method and α; and whether both runs wrote the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--method", help="name, or settings as YAML")
    parser.add_argument("--num-samples", type=int, default=64, help="samples per task")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=20, help="of refining, if the default refines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_recipe(Path(scratch), args)
        print("| processes | seconds | method | α | largest difference of a weight | same bytes twice |")
        print("|--:|--:|---|--:|--:|---|")
        expected: dict[str, Tensor] = {}
        for number in args.processes:
            runs = [merged(recipe, Path(scratch) / f"{number}-{i}", number) for i in (0, 1)]
            reports, digests = zip(*((report, digest) for report, _, digest in runs), strict=True)
            weights = runs[0][1]
            expected = expected or weights
            apart = max(float((w - expected[k]).norm() / expected[k].norm()) for k, w in weights.items())
            seconds = " and ".join(f"{sum(report['seconds'].values()):.1f}" for report in reports)
            cells = [number, seconds, reports[0]["method"], f"{reports[0]['alpha']:g}", f"{apart:.0e}"]
            print(f"| {' | '.join(map(str, cells))} | {'yes' if digests[0] == digests[1] else 'no'} |", flush=True)


def write_recipe(scratch: Path, args: argparse.Namespace) -> Path:
    """Write the samples and the recipe; return the recipe's file."""
    folder, calibration = args.folder.absolute(), {}
    for path in sorted((folder / "data").glob("*.json.gz")):
        task = path.name.removesuffix(".json.gz")
        rows = json.loads(gzip.decompress(path.read_bytes()))["train"]
        file = scratch / f"{task}.jsonl"
        file.write_text("".join(json.dumps({"text": r["text"] + r.get("label", "")}) + "\n" for r in rows))
        calibration[task] = str(file)
    recipe: dict[str, Any] = {
        "base": str(folder / "base"),
        "experts": {task: str(folder / "experts" / task) for task in calibration},
        "calibration": calibration,
        "num_samples": args.num_samples,
        "max_length": args.max_length,
    }
    if args.method:
        recipe["method"] = yaml.safe_load(args.method)
    else:
        recipe["refine"] = {"steps": args.steps}
    file = scratch / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def merged(recipe: Path, output: Path, processes: int) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Merge; return the report, the weights, and a hash of their file."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m"] if processes > 1 else ["-m"]
    command = [sys.executable, *launcher, "hf_esm.cli", "merge", str(recipe), "--output-dir", str(output), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    weights = output / "model.safetensors"
    report = json.loads((output / "merge_report.json").read_text())
    report["method"] = yaml.safe_load((output / "merge_recipe.yaml").read_text())["method"]["name"]
    return report, load_file(weights), hashlib.sha256(weights.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
