"""Peak memory of an ESM merge with few and with many experts, each in a process of its own.

    python benchmarks/peak_memory.py FOLDER [--counts 2 8]

FOLDER is the one that benchmarks/suite.py describes. Counted is the memory that the process allocates (anonymous
pages, `RssAnon`), sampled every 5 ms, above what it holds after its imports; pages of the checkpoints' files, which
the operating system maps and can drop, are not. Linux only.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from safetensors import safe_open

from hf_esm import merge_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8], help="numbers of experts")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.folder, given.counts[0], Path(given.one))))
        return
    with safe_open(given.folder / "base" / "model.safetensors", "pt") as file:
        sizes = [4 * file.get_tensor(name).numel() for name in file.keys()]
    print(f"model {sum(sizes) / 1e6:.0f} MB, largest weight {max(sizes) / 1e6:.0f} MB (float32)")
    with tempfile.TemporaryDirectory() as statistics:
        for stage in ("calibrating and merging", "merging alone"):
            peaks = {}
            for count in sorted(given.counts, reverse=True):  # the largest first: it leaves statistics for all
                command = [sys.executable, __file__, str(given.folder), "--counts", str(count), "--one"]
                where = statistics if stage == "merging alone" or count == max(given.counts) else tempfile.mkdtemp()
                ran = subprocess.run([*command, where], check=True, capture_output=True, text=True)
                peaks[count] = json.loads(ran.stdout.splitlines()[-1])
            low, high = min(peaks), max(peaks)
            grown = (peaks[high] - peaks[low]) / (high - low)
            found = ", ".join(f"{count} experts {peaks[count] / 1e6:.0f} MB" for count in sorted(peaks))
            print(f"{stage}: {found}; {grown / 1e6:.0f} MB = {grown / max(sizes):.2f} largest weights per expert")


def measure(folder: Path, count: int, statistics: Path) -> int:
    """Peak of the anonymous memory of one merge, in bytes, above the start."""
    tasks = sorted(path.name for path in (folder / "experts").iterdir() if path.is_dir())[:count]
    known = any(statistics.glob("*.safetensors"))
    proxies = {}
    for task in tasks:
        rows = json.loads(gzip.decompress((folder / "data" / f"{task}.json.gz").read_bytes()))["validation"]
        proxies[task] = [{k: v for k, v in row.items() if k != "label"} for row in rows[:32]]
    start, peak, running = anonymous_bytes(), [0], [True]

    def sample() -> None:
        while running:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=sample)
    watcher.start()
    with tempfile.TemporaryDirectory() as scratch:
        merge_models(
            folder / "base",
            {task: folder / "experts" / task for task in tasks},
            calibration=statistics if known else proxies,
            statistics_dir=None if known else str(statistics),
            output_dir=str(Path(scratch) / "merged"),
            max_length=96,
            progress=False,
        )
    running.clear()
    watcher.join()
    return peak[0] - start


def anonymous_bytes() -> int:
    """What the process has allocated."""
    return _status("RssAnon")


def mapped_bytes() -> int:
    """What it holds of files, which the operating system drops when it needs room."""
    return _status("RssFile") + _status("RssShmem")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    main()
