"""Compare several methods on the same experts, with intervals, pictures and a report.

    pip install ".[demo]" && python examples/compare_methods.py

Replace the ids below by your own: any fine-tunes of one checkpoint.
"""

from datasets import load_dataset

from hf_esm import compare


EXPERTS = {"sst2": "textattack/roberta-base-SST-2", "mrpc": "textattack/roberta-base-MRPC"}
COLUMNS = {"sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2")}


def rows(task: str, split: str, count: int, seed: int) -> list[dict]:
    """Rows of a GLUE task as `text`, `text_pair` and `label`."""
    first, second = COLUMNS[task]
    data = load_dataset("nyu-mll/glue", task, split=split).shuffle(seed=seed).select(range(count))
    return [
        {"text": row[first], "label": row["label"]} | ({"text_pair": row[second]} if second else {}) for row in data
    ]


comparison = compare(
    "FacebookAI/roberta-base",
    EXPERTS,
    methods=["esm", "task-arithmetic", "tsv-m", "iso-cts", {"name": "esm++", "rank": 8}],
    calibration={task: rows(task, "train", 64, seed=0) for task in EXPERTS},  # labels are ignored
    validation={task: rows(task, "train", 100, seed=1) for task in EXPERTS},  # α is chosen on these rows
    test={task: rows(task, "validation", 300, seed=0) for task in EXPERTS},
    seeds=(0, 1),  # each draws another 32 of the 64 samples
    max_length=128,
    allow_pickle=True,  # these experts have no safetensors files
    output_dir="comparison",
)
print(comparison)
best = max(comparison.rows, key=lambda row: row.normalised)
print(f"Best here: {best.label}. See comparison/report.md.")
