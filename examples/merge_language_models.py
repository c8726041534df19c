"""Merge two language models from the Hub into one, without labels, and let it write.

    pip install . && python examples/merge_language_models.py

The guide docs/language_models.md explains the result. Replace the ids below by your own: any fine-tunes of one
checkpoint. These two have 0.5 billion parameters; a GPU saves most of the time.
"""

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast, pipeline

from hf_esm import merge_models


BASE = "Qwen/Qwen2.5-0.5B"
EXPERTS = {"chat": "Qwen/Qwen2.5-0.5B-Instruct", "code": "Qwen/Qwen2.5-Coder-0.5B"}
DATA = {"chat": ("HuggingFaceH4/no_robots", None), "code": ("google-research-datasets/mbpp", "full")}

tokenizer = PreTrainedTokenizerFast.from_pretrained(EXPERTS["chat"])
rows = {
    task: load_dataset(path, name, split="train").shuffle(seed=0).select(range(64))
    for task, (path, name) in DATA.items()
}
samples = {  # texts as each expert reads and writes them: with the chat template, and with the answers
    "chat": [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows["chat"]],
    "code": [f'"""{row["text"]}"""\n{row["code"]}' for row in rows["code"]],
}

result = merge_models(  # no method is named: RegMean or ESM by agreement with the experts, then refined
    BASE,
    EXPERTS,
    calibration=samples,
    refine={"components": 64, "steps": 80, "gradient_checkpointing": True},  # less memory and time than by default
    max_length=256,
    output_dir="qwen-merged",
)
print(result)

write = pipeline("text-generation", "qwen-merged", max_new_tokens=64)
turn = {"role": "user", "content": "Name three fruits that are red."}
print(write([turn], eos_token_id=tokenizer.eos_token_id)[0]["generated_text"][-1]["content"])
print(write('"""Write a function to add two numbers."""\n')[0]["generated_text"])
