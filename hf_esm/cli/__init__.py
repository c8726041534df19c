"""The command line: `hf-esm merge`, `inspect`, `convert`, `calibrate`, `evaluate`, `compare`, `predict`, `explain`,
`export`, `add`, `push` and `demo`, each in a file of its own.

Comes in: the words of a command. Goes out: an exit status, and what the command prints. Until a command is chosen, no
library is loaded.
"""

from .main import main


__all__ = ["main"]
