"""What every process of `test_sharing.py` runs: a comparison, with a record of what this process merged and returned.

accelerate launch … compare_on_ranks.py FOLDER, where FOLDER has `case.json`.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState

from hf_esm import compare
from hf_esm.evaluation import cells


FOLDER = Path(sys.argv[1])
RANK = Accelerator().state.process_index
merge, merged = cells.merge_models, []


def watched(*models, **options):
    merged.append(options["method"].name)
    return merge(*models, **options)


cells.merge_models = watched
found = compare(**json.loads((FOLDER / "case.json").read_text()), output_dir=FOLDER / "report")
record = {"merged": merged, "rows": found.as_dict()["rows"], "kept": str(found.kept)}
(FOLDER / f"record-{RANK}.json").write_text(json.dumps(record))
PartialState().destroy_process_group()
