"""`python -m hf_esm.cli`, for launchers that start modules."""

import sys

from .main import main


sys.exit(main())
