"""Damaged files, by the thousand: every kind of file that hf_esm reads is changed at random and read as users read it.

    python tests/support/faults.py --n 10000 [--seed 0] [--kind routed]
    python tests/support/faults.py --kills 1000      (writers that are killed: see kills.py)

A reader may refuse a file by an `HfEsmError`, or read it. Another exception is a fault. So is a file that is read
although its checksum, in it or in `hashes.json`, says that it was changed. Both are printed with the kind and the
number, and `--seed … --kind … --only NUMBER --traceback` repeats one. After Ctrl-C, the results so far are printed.
"""

import argparse
import copy
import csv
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # what else `pytest` does
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    os.environ.setdefault("HF_ESM_TEST_SEED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import transformers
import yaml
from safetensors.torch import load_file, save_file

from hf_esm import (
    ActivationStatistics,
    HfEsmError,
    RoutedModel,
    Scores,
    load_recipe,
    load_task_model,
    merge_models,
    update_card,
)
from hf_esm.checkpoints import Checkpoint, load_processor, open_checkpoint, resolve_source
from hf_esm.data import SampleOptions, load_samples, read_rows, save_samples
from hf_esm.hub import write_hashes
from hf_esm.metrics import load_labelled
from support.embedders import write_embedder
from support.helpers import perturbed, text_samples
from support.kills import WRITERS, drawn, try_kills
from support.tiny import LLAMA
from support.toys import base_model, lora_adapter


WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0"

EXTREME = [None, True, -1, 0, 3, 2**31, 2**63, -(2**63), 10**30, 1e39, float("nan"), float("inf"), "", "x", "\0"]
EXTREME += ["../x", "a" * 5000, [], [[]], {}, {"x": {}}, [None], ["x", 1]]


def read_model(folder: Path) -> None:
    checkpoint = open_checkpoint(resolve_source(str(folder), "model"))
    read_all(checkpoint)
    load_processor(folder)


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names:
        checkpoint.tensor(name)


def read_adapter(folder: Path) -> None:
    base = open_checkpoint(resolve_source(str(folder.parent / "base"), "base"))
    read_all(open_checkpoint(resolve_source(str(folder), "expert"), base))


def read_routed(folder: Path) -> None:
    model = RoutedModel.from_pretrained(folder)
    for task in model.tasks:
        model.task_model(task)


def read_merged(folder: Path) -> None:
    load_task_model(folder, "a")


def read_hostile(folder: Path) -> None:
    """What the router is made of is read when experts are exported, added or removed."""
    model = RoutedModel.from_pretrained(folder)
    model.task_model("a")
    shutil.rmtree(folder.parent / "exported", ignore_errors=True)
    model.export_lora(folder.parent / "exported")


def read_components(folder: Path) -> None:
    base = open_checkpoint(resolve_source(str(folder / "base"), "base"))
    read_all(open_checkpoint(resolve_source(str(folder / "essential_components"), "expert"), base))


def read_embedder(folder: Path) -> None:
    read_all(open_checkpoint(resolve_source(str(folder), "model")))
    load_processor(folder)


def read_card(folder: Path) -> None:
    update_card(folder, Scores({"a": 0.5}, {}), {})


def read_task(folder: Path) -> None:
    base = open_checkpoint(resolve_source({"path": str(folder), "task": "a"}, "expert"))
    read_all(base)
    read_all(open_checkpoint(resolve_source({"path": str(folder), "task": "b"}, "expert")))


def read_statistics(folder: Path) -> None:
    statistics = ActivationStatistics.load(folder / "statistics.safetensors")
    for name in statistics:
        statistics[name]


def read_recipe(folder: Path) -> None:
    merge_models(**load_recipe(folder / "recipe.yaml") | {"progress": False, "output_dir": None}, dry_run=True)


def read_labelled(folder: Path) -> None:
    config, processor = (
        open_checkpoint(resolve_source(str(folder / "a"), "model")).config,
        load_processor(folder / "a"),
    )
    for path in sorted(folder.glob("rows.*")):
        load_labelled(str(path), processor, config, "rows", SampleOptions())


def read_generation(folder: Path) -> None:
    """The settings are read and written by a merge, and read by those who load the merged model."""
    experts = {"a": folder / "a", "b": folder / "b"}
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "merged"
        merge_models(folder / "base", experts, method="mean", progress=False, output_dir=output)
        load_task_model(output, "a")


def read_language(folder: Path) -> None:
    model = RoutedModel.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(Path(place) / "saved")


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: writes it into an empty folder.
        read: reads it from there.
        files: patterns of the files that are changed.
        sealed: whether every changed byte must be noticed.
        share: how often it is drawn, compared with other kinds.
        rehash: writes the hashes of the changed files, as an author of the model can.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    files: tuple[str, ...] = ("*",)
    sealed: bool = False
    share: int = 10
    rehash: bool = False


def copied(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            source = WRITTEN / name
            shutil.copytree(source, folder, dirs_exist_ok=True) if len(names) == 1 else put(source, folder / name)

    return make


def put(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def make_shards(folder: Path) -> None:
    base_model().save_pretrained(folder, max_shard_size="30KB")


def make_adapter(folder: Path) -> None:
    base = base_model()
    base.save_pretrained(folder.parent / "base")
    lora_adapter(base, "c", str(folder.parent / "base")).save_pretrained(folder, save_embedding_layers=False)


def make_embedder(folder: Path) -> None:
    write_embedder(folder, prompts={"query": "q: "})


def make_statistics(folder: Path) -> None:
    ActivationStatistics.load(WRITTEN / "statistics.safetensors").save(folder / "statistics.safetensors")


def make_samples(folder: Path) -> None:
    save_samples(load_samples(WRITTEN / "samples.safetensors"), folder / "samples.safetensors")


def make_rows(folder: Path) -> None:
    shutil.copytree(WRITTEN / "a", folder / "a")
    lines = [line for line in (WRITTEN / "texts.txt").read_text().splitlines() if line][:6]
    rows = [{"text": line, "label": i % 2, "place": {"line": i}} for i, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text(to_lines(rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.csv").write_text(to_csv([["text", "label"], *([row["text"], row["label"]] for row in rows)]))


def make_generation(folder: Path) -> None:
    base = LLAMA.build()
    for seed, name in enumerate(("base", "a", "b")):
        perturbed(base, 0.05 if seed else 0, seed).save_pretrained(folder / name)


def make_language(folder: Path) -> None:
    models = folder.parent / "models"
    make_generation(models)
    calibration = {task: text_samples(seed) for seed, task in enumerate("ab")}
    experts = {task: models / task for task in "ab"}
    folder.rmdir()
    merge_models(models / "base", experts, calibration=calibration, method="esm++", output_dir=folder, progress=False)


def rows_of(folder: Path) -> None:
    read_rows(folder / "samples.safetensors", "samples", SampleOptions())


RECIPE = ("recipe.yaml", "base", "a", "b", "statistics.safetensors", "samples.safetensors")

KINDS = {
    "models": Kind(copied("a"), read_model, ("*.json", "*.safetensors"), share=20),
    "tokenizers": Kind(copied("a"), load_processor, ("tokenizer*", "vocab.txt")),
    "shards": Kind(make_shards, read_model, ("*.json", "*-00001-*")),
    "adapters": Kind(make_adapter, read_adapter, ("adapter_*",)),
    "merged": Kind(copied("merged"), read_merged, ("*.json", "m*.safetensors", "heads/a/*")),
    "routed": Kind(copied("routed"), read_routed, ("*.json", "*.safetensors", "*/*.json", "*/adapter*"), sealed=True),
    "hostile": Kind(copied("routed"), read_hostile, ("*.json", "*.safetensors", "*/*", "heads/*/*"), rehash=True),
    "components": Kind(copied("essential_components", "base"), read_components, ("essential_components/*",)),
    "embedders": Kind(make_embedder, read_embedder, ("*.json", "*/*.json", "*/*.safetensors"), share=5),
    "cards": Kind(copied("merged"), read_card, ("README.md", "heads/*/config.json"), share=3),
    "tasks": Kind(copied("tsv_c"), read_task, ("*.json", "*.safetensors", "routed/*", "heads/*", "heads/*/*")),
    "statistics": Kind(make_statistics, read_statistics, sealed=True, share=30),
    "statistics of 0.1.0": Kind(copied(*RECIPE), read_statistics, ("statistics.safetensors",), share=20),
    "samples": Kind(make_samples, rows_of, sealed=True, share=30),
    "samples of 0.1.0": Kind(copied(*RECIPE), rows_of, ("samples.safetensors",), share=20),
    "rows": Kind(make_rows, read_labelled, ("rows.*",)),
    "generation": Kind(make_generation, read_generation, ("*/generation_config.json",), share=5),
    "language": Kind(make_language, read_language, ("generation_config.json", "config.json"), share=5, rehash=True),
    "recipes": Kind(copied(*RECIPE), read_recipe, ("recipe.yaml",)),
}


# ---- changes


def mutate(path: Path, draw: random.Random) -> None:
    """Change one file at random."""
    content = path.read_bytes()
    changes = [flip, flip, cut, fill]
    if path.suffix in TREES:
        changes += 8 * [restructure]
    if path.suffix == ".safetensors":
        changes += 3 * [reshape] + 3 * [reheader]
    draw.choice(changes)(path, content, draw)


def flip(path: Path, content: bytes, draw: random.Random) -> None:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 30])):
        changed[draw.randrange(min(len(changed), draw.choice([400, 10**9])))] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)


def cut(path: Path, content: bytes, draw: random.Random) -> None:
    path.write_bytes(content[: draw.choice([0, 1, 7, 8, 9, draw.randrange(len(content)), len(content) - 1])])


def fill(path: Path, content: bytes, draw: random.Random) -> None:
    choices = [b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe" * 20, b"null", b"[]", b"3", b'""', b"{}", None]
    choices += [draw.randbytes(200), content + b"x", content * 2]
    new = draw.choice(choices)
    path.unlink() if new is None else path.write_bytes(new)


def restructure(path: Path, content: bytes, draw: random.Random) -> None:
    load, dump = TREES[path.suffix]
    path.write_text(dump(change(load(content), draw)))


def from_lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def to_lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def from_csv(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))


def to_csv(rows: list[Any]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(row if isinstance(row, list) else [row] for row in rows)
    return file.getvalue()


# How files of rows, lists and mappings are read and written, by their suffix.
TREES = {
    ".json": (json.loads, json.dumps),
    ".jsonl": (from_lines, to_lines),
    ".csv": (from_csv, to_csv),
    ".yaml": (yaml.safe_load, yaml.safe_dump),
}


def change(tree: Any, draw: random.Random) -> Any:
    """Remove, rename, replace or double one entry of nested lists and mappings."""
    tree = copy.deepcopy(tree)
    places = list(walk(tree))
    for _ in range(draw.choice([1, 1, 1, 3])):
        owner, key = draw.choice(places)
        if not (key in owner if isinstance(owner, dict) else key < len(owner)):
            continue
        kind = draw.choice(["remove", "extreme", "extreme", "extreme", "other", "rename"])
        if kind == "remove":
            del owner[key]
        elif kind == "extreme":
            owner[key] = draw.choice(EXTREME)
        elif kind == "other":
            other, place = draw.choice(places)
            owner[key] = copy.deepcopy(other[place]) if place in range(len(other)) or place in other else None
        elif isinstance(owner, dict):
            owner[draw.choice(["x", "", f"{key}x"])] = owner.pop(key)
    return tree


def walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of every entry."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from walk(tree[key])


def reheader(path: Path, content: bytes, draw: random.Random) -> None:
    """Change the header of a safetensors file, and its length with it."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if inside := "header" in metadata and draw.random() < 0.5:
        metadata["header"] = json.dumps(change(json.loads(metadata["header"]), draw))
    if not inside or draw.random() < 0.5:
        header = change(header, draw)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])


def reshape(path: Path, content: bytes, draw: random.Random) -> None:
    """Change tensors of a file, and write it as it should be."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    tensors = load_file(path)
    if not tensors:
        return
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = draw.choice(["gone", "renamed", "flat", "empty", "row", "nan", "whole", "half", "more"])
    new = {
        "flat": lambda: tensor.reshape(-1),
        "empty": lambda: tensor[:0] if tensor.dim() else tensor.reshape(-1)[:0],
        "row": lambda: tensor.reshape(-1)[:1],
        "nan": lambda: tensor * float("nan"),
        "whole": lambda: tensor.long(),
        "half": lambda: tensor.half(),
        "more": lambda: tensor[None].repeat(2, *[1] * tensor.dim()),
    }
    if kind == "renamed":
        tensors[draw.choice(["x", name + "x", "x." + name, "0.x"])] = tensor
    elif kind in new:
        tensors[name] = new[kind]()
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata)


# ---- the loop


# Set by Ctrl-C: an interrupt in the middle of a library would leave it in any state.
stopped = threading.Event()


@dataclass
class Outcome:
    """What came of the changed files.

    Attributes:
        counts: by kind and `"refused"`, `"read"`, `"foreign"` or `"silent"`.
        faults: a line for each foreign exception and each silent change.
    """

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing of what libraries say about damaged files."""
    verbosity, level = transformers.logging.get_verbosity(), logging.root.manager.disable
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


@contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """Let `datasets` keep what it reads here."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(folder)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        datasets.enable_progress_bars()


def try_faults(count: int, seed: int, kinds: list[str], only: int | None = None, show: bool = False) -> Outcome:
    """Change and read `count` files.

    Args:
        only: the number of the one file that is read; the others are skipped.
        show: print the traceback of every fault.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as place, quiet(), cached_in(Path(place) / "datasets"):
        whole = {name: Path(place) / f"{i}" / "model" for i, name in enumerate(kinds)}
        for name, folder in whole.items():
            folder.mkdir(parents=True)
            KINDS[name].make(folder)
            KINDS[name].read(folder)  # readable until it is changed
        choose = random.Random(seed).choices(kinds, [KINDS[name].share for name in kinds], k=count)
        for number, name in enumerate(choose):
            if stopped.is_set():
                break
            if only in (None, number):
                one(name, whole[name], random.Random(f"{seed} {number}"), number, outcome, show)
    return outcome


def one(name: str, whole: Path, draw: random.Random, number: int, outcome: Outcome, show: bool) -> None:
    """Change one file of a kind in a copy of its folder, and read the folder."""
    kind, folder = KINDS[name], whole.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    paths = sorted({path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()})
    path = draw.choice(paths)
    before = path.read_bytes()
    mutate(path, draw)
    same = path.is_file() and path.read_bytes() == before
    if kind.rehash and path.name != "hashes.json":
        write_hashes(folder)
    try:
        kind.read(folder)
        result = "silent" if kind.sealed and not same and path.name not in UNSEALED else "read"
    except HfEsmError as error:
        result = "refused" if "\n" not in str(error) or path.suffix == ".yaml" else "several lines"
        detail = str(error)
    except BaseException as error:  # also a panic of a library in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        result, detail = "foreign", f"{type(error).__name__}: {str(error)[:200]!r}"
        if show:
            traceback.print_exc()
    outcome.counts[name, result] += 1
    if result not in ("read", "refused"):
        detail = "" if result == "silent" else f": {detail}"
        outcome.faults.append(f"{name} {number}: {path.relative_to(folder)} {result}{detail}")
        if show:
            print(outcome.faults[-1])


# Files of a routed model that people edit, which have no hash.
UNSEALED = ("hashes.json", "merge_report.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="number of changed files (default: 1000)")
    parser.add_argument("--kills", type=int, metavar="N", help="kill as many writers instead")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kind", action="append", choices=[*KINDS, *WRITERS], help="only this kind; repeat for more")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat this one of them")
    parser.add_argument("--traceback", action="store_true", help="print where each fault comes from")
    arguments = parser.parse_args()
    if arguments.kills:
        with quiet():
            counts = drawn(arguments.kills, arguments.seed, arguments.kind or [*WRITERS])
            faults = try_kills(counts, arguments.seed, arguments.only)
        print("\n".join([*faults, *(f"{name}: {number} killed" for name, number in counts.items())]))
        print(f"{arguments.kills} killed writers (--seed {arguments.seed}), {len(faults)} faults")
        return bool(faults)
    kinds = arguments.kind or [*KINDS]
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    outcome = try_faults(arguments.n, arguments.seed, kinds, arguments.only, arguments.traceback)
    print("\n".join(outcome.faults))
    for name in kinds:
        of_kind = {result: number for (kind, result), number in sorted(outcome.counts.items()) if kind == name}
        print(f"{name}: {', '.join(f'{number} {result}' for result, number in of_kind.items())}")
    print(f"{outcome.counts.total()} changed files (--seed {arguments.seed}), {len(outcome.faults)} faults")
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
