"""Tests in ``engine`` need the real vLLM, which the session ``vllm`` of nox installs beside them."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["engine"]
