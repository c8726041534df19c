"""Write copies of a suite's experts whose updates have a low rank, as those of LoRA experts have.

    python benchmarks/low_rank_experts.py FOLDER OUTPUT [--rank 16]

FOLDER is that of `suite.py` or `language.py`; OUTPUT becomes one like it. The updates of matrices in the body are cut
to their leading singular triplets. Embeddings and all else of the body are the base's, and heads stay.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_esm.linalg import truncated_svd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    shutil.copytree(args.folder, args.output)
    base = load_file(args.output / "base" / "model.safetensors")
    for path in sorted(args.output.glob("experts/*/model.safetensors")):
        expert = load_file(path)
        low = {name: low_rank(tensor, base_of(name, base), args.rank) for name, tensor in expert.items()}
        save_file(low, path, {"format": "pt"})


def base_of(name: str, base: dict[str, Tensor]) -> Tensor | None:
    """Return the base's weight of a name, which in a task model may have a prefix; None for a head."""
    return base.get(name, base.get(name.partition(".")[2]))


def low_rank(weight: Tensor, base: Tensor | None, rank: int) -> Tensor:
    """Return a weight with an update of a rank: a matrix of the body; the base's in other cases, a head as it is."""
    if base is None or base.shape != weight.shape:
        return weight
    if weight.dim() != 2 or weight.shape[0] > 8 * weight.shape[1]:  # an embedding
        return base
    left, values, right = truncated_svd(weight.float() - base.float(), rank)
    return (base.double() + (left * values) @ right).to(weight.dtype).contiguous()


if __name__ == "__main__":
    main()
