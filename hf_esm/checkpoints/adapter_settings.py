"""The settings of PEFT adapters: those of an adapter's folder, and those of the experts in a routed model."""

from pathlib import Path

from peft import PeftConfig

from ..errors import HfEsmError
from ..utils import is_file, reason_of
from .layout import ADAPTER_CONFIG, ROUTED_FOLDER


def read_settings(folder: Path, title: str) -> PeftConfig:
    """Read the settings of any adapter, as PEFT reads them.

    Raises:
        HfEsmError: names the file, if PEFT cannot use it, or a task in it has a name that no file can have.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except HfEsmError as error:  # of the settings of this package's adapters
        raise HfEsmError(f"{title}: in its {ADAPTER_CONFIG}: {error}") from None
    except Exception as error:  # PEFT checks neither the JSON nor the types of its settings
        raise unusable(title, error) from None


def check_routed(folder: Path, title: str) -> None:
    """Refuse a merged model's folder without routed experts. The arguments are those of `read_routed_settings`."""
    if not is_file(folder / ROUTED_FOLDER / ADAPTER_CONFIG):
        raise HfEsmError(f"{title}: no experts in {ROUTED_FOLDER}/. Use a model of method 'esm++' or 'tsv-c'.")


def read_routed_settings(folder: Path, title: str) -> PeftConfig:
    """Read the settings of the routed experts in a merged model's folder.

    Args:
        folder: the merged model's folder.
        title: the model, as the user named it.

    Raises:
        HfEsmError: names the file, if there are none, or they cannot be used.
    """
    check_routed(folder, title)
    config = read_settings(folder / ROUTED_FOLDER, f"{title}, {ROUTED_FOLDER}/")
    if config.peft_type != "ROUTED_EXPERTS":
        raise HfEsmError(
            f"{title}: the adapter in {ROUTED_FOLDER}/ is of type {config.peft_type}, not ROUTED_EXPERTS. Download "
            "the whole model again."
        )
    return config


def unusable(title: str, error: Exception) -> HfEsmError:
    """Return the error about an adapter's settings that PEFT cannot use."""
    return HfEsmError(
        f"{title}: its {ADAPTER_CONFIG} cannot be used: {reason_of(error)}. Correct it, or upgrade peft if a newer "
        "version wrote it."
    )
