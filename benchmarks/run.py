"""``python benchmarks/run.py``: the command line of fi_benchmarks, from a source tree with fi on PYTHONPATH."""

import sys

from fi_benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
