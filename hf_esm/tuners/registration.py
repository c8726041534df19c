"""How a PEFT method from outside PEFT becomes one that PEFT, Transformers and the Hub load."""

import enum

import peft.mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from ..errors import HfEsmError


class HfEsmPeftType(str, enum.Enum):  # noqa: UP042 (Python 3.10 has no StrEnum)
    """The types of our adapters, as `adapter_config.json` names them.

    PEFT's own enum is closed, and `peft.utils.register_peft_method` refuses what is not in it. PEFT looks types up as
    strings and Transformers reads their `.value`: a string enum of our own is both, and can be pickled.
    """

    ESSENTIAL_COMPONENTS = "ESSENTIAL_COMPONENTS"
    ROUTED_EXPERTS = "ROUTED_EXPERTS"


def register(peft_type: HfEsmPeftType, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Tell PEFT of an adapter type; telling it twice does nothing.

    Raises:
        HfEsmError: if the type is already another class's.
    """
    entries = [
        (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, model_class),
        (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, model_class.prefix),
    ]
    for table, entry in entries:
        if table.get(peft_type, entry) != entry:
            raise HfEsmError(
                f"PEFT already has a method {peft_type.value}: {table[peft_type]!r}. Another package registered it, "
                "or hf_esm was imported from two places."
            )
    for table, entry in entries:
        table[peft_type] = entry
