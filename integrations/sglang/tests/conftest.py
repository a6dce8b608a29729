"""Tests in ``engine`` need the real SGLang, which the session ``sglang`` of nox installs beside them."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("sglang") else ["engine"]
