r"""Merge on several processes, which share the calibration samples and the weights to merge.

    accelerate launch --num_processes 4 examples/merge_distributed.py --base bert-base-uncased \
        --expert sst2=me/bert-sst2 mrpc=me/bert-mrpc-lora --calibration sst2=sst2.txt mrpc=mrpc.jsonl --output-dir out

This command starts one process per accelerator. On CPUs alone, start the processes by MPI (`mpirun -n 4 accelerate
launch --cpu --num_processes 4 …`) or by PyTorch (`ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 4 …`). A recipe does
not need a script: `accelerate launch --num_processes 4 -m hf_esm.cli merge recipe.yaml`.
"""

import argparse

from accelerate import Accelerator

from hf_esm import merge_models


def pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", required=True, help="Hub id or folder")
parser.add_argument("--expert", nargs="+", type=pair, required=True, metavar="TASK=MODEL", help="Hub ids or folders")
parser.add_argument(
    "--calibration", nargs="+", type=pair, required=True, metavar="TASK=FILE", help="unlabelled samples"
)
parser.add_argument("--output-dir", required=True, help="folder to write")
parser.add_argument("--allow-pickle", action="store_true", help="read models that have no safetensors files")
arguments = parser.parse_args()

accelerator = Accelerator()
result = merge_models(
    arguments.base,
    dict(arguments.expert),
    calibration=dict(arguments.calibration),
    output_dir=arguments.output_dir,
    allow_pickle=arguments.allow_pickle,
    accelerator=accelerator,
)
accelerator.print(result)  # every process has the result; only the main process prints
