"""``python -m fi_core`` is the ``fi`` command."""

import sys

from .cli import main

sys.exit(main())
