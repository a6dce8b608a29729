"""The name that selection, ``use`` and ``explain`` know this backend by, and the oldest GPUs it serves."""

BACKEND = "triton"
MIN_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
"""From here on the hardware converts to and from FP8, rounding to nearest even."""
