"""Measure the peak memory of an ESM merge with few and with many experts, each in a new process.

    python benchmarks/peak_memory.py FOLDER [--counts 2 8]

benchmarks/suite.py describes FOLDER. The measured memory is what the process allocates (anonymous pages, `RssAnon`),
sampled every 5 ms, minus what it holds after its imports. Pages of the checkpoints' files, which the operating system
maps and can drop, are left out. Linux only.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_esm import merge_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8], help="numbers of experts")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder, args.counts[0], Path(args.one))))
        return
    with safe_open(args.folder / "base" / "model.safetensors", "pt") as file:
        sizes = [4 * file.get_tensor(name).numel() for name in file.keys()]
    print(f"model {sum(sizes) / 1e6:.0f} MB, largest weight {max(sizes) / 1e6:.0f} MB (float32)")
    with tempfile.TemporaryDirectory() as statistics:
        for stage in ("calibrating and merging", "merging alone"):
            peaks = {}
            for count in sorted(args.counts, reverse=True):  # the largest first: it leaves statistics for all
                command = [sys.executable, __file__, str(args.folder), "--counts", str(count), "--one"]
                where = statistics if stage == "merging alone" or count == max(args.counts) else tempfile.mkdtemp()
                ran = subprocess.run([*command, where], check=True, capture_output=True, text=True)
                peaks[count] = json.loads(ran.stdout.splitlines()[-1])
            low, high = min(peaks), max(peaks)
            grown = (peaks[high] - peaks[low]) / (high - low)
            by_count = ", ".join(f"{count} experts {peaks[count] / 1e6:.0f} MB" for count in sorted(peaks))
            print(f"{stage}: {by_count}; {grown / 1e6:.0f} MB = {grown / max(sizes):.2f} largest weights per expert")


def measure(folder: Path, count: int, statistics: Path) -> int:
    """Return the peak of one merge's anonymous memory, in bytes, above the start."""
    tasks = sorted(path.name for path in (folder / "experts").iterdir() if path.is_dir())[:count]
    known = any(statistics.glob("*.safetensors"))
    samples = {}
    for task in tasks:
        rows = json.loads(gzip.decompress((folder / "data" / f"{task}.json.gz").read_bytes()))["validation"]
        samples[task] = [{k: v for k, v in row.items() if k != "label"} for row in rows[:32]]
    with tempfile.TemporaryDirectory() as scratch:
        return peak_of(
            lambda: merge_models(
                folder / "base",
                {task: folder / "experts" / task for task in tasks},
                calibration=statistics if known else samples,
                statistics_dir=None if known else str(statistics),
                output_dir=str(Path(scratch) / "merged"),
                max_length=96,
                progress=False,
            )
        )


def peak_of(work: Callable[[], Any]) -> int:
    """Do some work; return the peak of the anonymous memory meanwhile, in bytes, above the start."""
    start, peak, running = anonymous_bytes(), [0], [True]

    def sample() -> None:
        while running:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        work()
    finally:
        running.clear()
        watcher.join()
    return peak[0] - start


def anonymous_bytes() -> int:
    """Return the bytes that the process has allocated."""
    return _status("RssAnon")


def mapped_bytes() -> int:
    """Return the bytes of mapped files, which the operating system drops when it needs room."""
    return _status("RssFile") + _status("RssShmem")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    main()
