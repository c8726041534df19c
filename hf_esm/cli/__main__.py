"""`python -m hf_esm.cli`, for launchers that start modules."""

import sys

from .parser import main


sys.exit(main())
