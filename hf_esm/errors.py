"""The errors that users meet."""


class HfEsmError(ValueError):
    """Bad input. The message names the file, expert or weight and what to do; the command line prints it alone."""


class HubError(HfEsmError):
    """The Hub refuses something, or cannot be reached."""


class IncompatibleError(HfEsmError):
    """A model is not a fine-tune of the base: kind, configuration, names or shapes of weights differ."""


class DamagedFileError(HfEsmError):
    """A file is missing, cut off or changed, and cannot be read as what it was written as."""


class DiskFullError(HfEsmError, OSError):
    """A file cannot be written, since the disk is full."""


class MissingAttributeError(HfEsmError, AttributeError):
    """An object lacks an attribute that the caller takes for granted."""
