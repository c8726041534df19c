"""Tools that know nothing of models: processes, devices, folders, resumable work, hooks, fingerprints, checksums,
readers, checks of arguments, errors of the Hub, names of files, progress, tables, sizes.

Comes in: plain values and functions. Goes out: the same work shared over processes, written atomically or resumed, and
errors in one sentence.
"""

from .arguments import (
    check_fields,
    check_known,
    closest_name,
    did_you_mean,
    finite_number,
    from_arguments,
    number_fields,
)
from .checksums import UNSEALED, check_seal, seal
from .devices import algebra_device, fast_products, reserve, roomy
from .distributed import Alone, default_accelerator, gather, main_first, together
from .fingerprints import code_identity, data_identity, files_identity, fingerprint, processor_identity
from .folders import (
    add_folders,
    atomic_file,
    naming_full_disk,
    new_folder,
    only_user,
    publish_folder,
    recover,
    staging_folder,
)
from .hooks import Hook, hooked, remove_hooks
from .hub_errors import ask_hub, plain_hub_errors
from .names import check_path, check_task_name, check_task_names, stays_inside
from .offloading import device_of, in_place, is_offloaded
from .plain import without_nan
from .progress import tracked
from .readers import AGAIN, is_file, read_tensors, reading
from .resume import WORK_FOLDER, Work, end_published
from .sentences import first_names, reason_of
from .sizes import bytes_of, readable, readable_duration
from .tables import markdown_table, markdown_text, plain_table, plain_text


__all__ = [
    "AGAIN",
    "UNSEALED",
    "WORK_FOLDER",
    "Alone",
    "Hook",
    "Work",
    "add_folders",
    "algebra_device",
    "ask_hub",
    "atomic_file",
    "bytes_of",
    "check_fields",
    "check_known",
    "check_path",
    "check_seal",
    "check_task_name",
    "check_task_names",
    "closest_name",
    "code_identity",
    "data_identity",
    "default_accelerator",
    "device_of",
    "did_you_mean",
    "end_published",
    "fast_products",
    "files_identity",
    "fingerprint",
    "finite_number",
    "first_names",
    "from_arguments",
    "gather",
    "hooked",
    "in_place",
    "is_file",
    "is_offloaded",
    "main_first",
    "markdown_table",
    "markdown_text",
    "naming_full_disk",
    "new_folder",
    "number_fields",
    "only_user",
    "plain_hub_errors",
    "plain_table",
    "plain_text",
    "processor_identity",
    "publish_folder",
    "read_tensors",
    "readable",
    "readable_duration",
    "reading",
    "reason_of",
    "recover",
    "remove_hooks",
    "reserve",
    "roomy",
    "seal",
    "staging_folder",
    "stays_inside",
    "together",
    "tracked",
    "without_nan",
]
