"""What every wing may use and that knows nothing of models: processes, devices, folders, fingerprints, sizes.

Comes in: plain values and functions. Goes out: the same work shared over processes, written atomically, or resumed.
"""

from .devices import algebra_device, fast_products, reserve, roomy
from .distributed import default_accelerator, gather, main_first, together
from .fingerprints import code_identity, data_identity, files_identity, fingerprint, processor_identity
from .folders import new_folder, publish_folder, staging_folder
from .resume import WORK_FOLDER, Work
from .sizes import bytes_of, readable


__all__ = [
    "WORK_FOLDER",
    "Work",
    "algebra_device",
    "bytes_of",
    "code_identity",
    "data_identity",
    "default_accelerator",
    "fast_products",
    "files_identity",
    "fingerprint",
    "gather",
    "main_first",
    "new_folder",
    "processor_identity",
    "publish_folder",
    "readable",
    "reserve",
    "roomy",
    "staging_folder",
    "together",
]
