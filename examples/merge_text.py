"""Merge RoBERTa fine-tunes from the Hub into one model, and use it for each task.

    pip install . && python examples/merge_text.py

Replace the ids below by your own: any fine-tunes of one checkpoint.
"""

from datasets import load_dataset
from transformers import AutoTokenizer, pipeline

from hf_esm import evaluate, load_task_model, merge_models


BASE = "FacebookAI/roberta-base"
EXPERTS = {
    "sst2": "textattack/roberta-base-SST-2",
    "mrpc": "textattack/roberta-base-MRPC",
    "cola": "textattack/roberta-base-CoLA",
}
COLUMNS = {"sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"), "cola": ("sentence", None)}


def rows(task: str, split: str, count: int) -> list[dict]:
    """Rows of a GLUE task as `text`, `text_pair` and `label`."""
    first, second = COLUMNS[task]
    data = load_dataset("nyu-mll/glue", task, split=split).shuffle(seed=0).select(range(count))
    return [
        {"text": row[first], "label": row["label"]} | ({"text_pair": row[second]} if second else {}) for row in data
    ]


result = merge_models(
    BASE,
    EXPERTS,
    calibration={task: rows(task, "train", 32) for task in EXPERTS},  # labels are ignored
    validation={task: rows(task, "train", 100) for task in EXPERTS},  # α is chosen on these rows
    alpha="auto",
    max_length=128,
    allow_pickle=True,  # these three experts have no safetensors files
    output_dir="roberta-merged",
)
print(result)
test = {task: rows(task, "validation", 300) for task in EXPERTS}
print(evaluate("roberta-merged", test, experts=EXPERTS, allow_pickle=True))

model, tokenizer = load_task_model("roberta-merged", "sst2"), AutoTokenizer.from_pretrained("roberta-merged")
print(pipeline("text-classification", model=model, tokenizer=tokenizer)("One model for all of it: a delight."))
