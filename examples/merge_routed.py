"""Merge fine-tunes from the Hub into one routed model, predict without naming the task, and export the experts.

    pip install . && python examples/merge_routed.py

Replace the ids below by your own: any fine-tunes of one checkpoint.
"""

from datasets import load_dataset

from hf_esm import RoutedModel, merge_models


BASE = "FacebookAI/roberta-base"
EXPERTS = {"sst2": "textattack/roberta-base-SST-2", "cola": "textattack/roberta-base-CoLA"}

samples = {task: load_dataset("nyu-mll/glue", task, split="train")["sentence"][:1000] for task in EXPERTS}
merge_models(
    BASE,
    EXPERTS,
    calibration=samples,
    num_samples=128,  # more samples make a better router
    method="esm++",
    rank=32,
    allow_pickle=True,  # these experts have no safetensors files
    output_dir="routed",
)

model = RoutedModel.from_pretrained("routed")
texts = ["a deep and meaningful film .", "The more we study , the more discover ."]
for text, prediction in zip(texts, model.predict(texts), strict=True):
    sureness = "sure" if prediction.sure else "unsure"
    print(f"{text!r}: {prediction.task} ({sureness}), {prediction.label} ({prediction.score:.0%})")
print(model.explain(texts)[0])
print(model.predict(texts, tasks="cola"))  # the task is known

model.export_lora("adapters")  # ordinary LoRA adapters of the static model in routed/
# model.push_to_hub("me/roberta-routed")
