"""``python -m fi_benchmarks``."""

import sys

from .cli import main

sys.exit(main())
