"""Parts of a message that stays one sentence, however many names or lines it is about."""

from collections.abc import Sequence


def first_names(names: Sequence[str]) -> str:
    """Write the first three names, and how many more there are."""
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason_of(error: Exception) -> str:
    """Return what another library says in an exception, in at most 200 characters: the first line that says something,
    and how many more there are.

    Example:
        >>> from hf_esm.utils import reason_of
        >>> reason_of(RuntimeError("Error(s) in loading:\\n  size mismatch for a.\\n  size mismatch for b."))
        'size mismatch for a, and 1 line more'
    """
    if isinstance(error, KeyError):
        return f"it lacks {str(error)[:200]}"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith(":")] or lines
    if not lines:
        return "without a reason"
    first = lines[0] if len(lines[0]) <= 200 else f"{lines[0][:199]}…"
    more = len(lines) - 1
    return f"{first}, and {more} line{'s' * (more > 1)} more" if more else first
