"""``python -m fi_cuda``: the same as the ``fi_cuda`` command."""

import sys

from .cli import main

sys.exit(main())
