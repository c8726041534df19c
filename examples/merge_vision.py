"""Merge Vision Transformers fine-tuned on different data sets into one body, with a classifier per task.

    pip install . && python examples/merge_vision.py

Replace the ids below by your own: any fine-tunes of one checkpoint.
"""

from datasets import load_dataset

from hf_esm import load_task_model, merge_models


BASE = "google/vit-base-patch16-224-in21k"
EXPERTS = {
    "beans": "nateraw/vit-base-beans",
    "food": "nateraw/food",
    "cifar10": "nateraw/vit-base-patch16-224-cifar10",
}
DATA = {
    "beans": ("AI-Lab-Makerere/beans", "validation", "image"),
    "food": ("ethz/food101", "validation", "image"),
    "cifar10": ("uoft-cs/cifar10", "test", "img"),
}


def images(task: str, count: int = 32) -> list:
    name, split, column = DATA[task]
    return [row[column] for row in load_dataset(name, split=split, streaming=True).shuffle(seed=0).take(count)]


result = merge_models(
    BASE,
    EXPERTS,
    calibration={task: images(task) for task in EXPERTS},
    allow_pickle=True,  # some of these have no safetensors files
    output_dir="vit-merged",
)
print(result)
model = load_task_model("vit-merged", "beans")
print(model.config.id2label)
