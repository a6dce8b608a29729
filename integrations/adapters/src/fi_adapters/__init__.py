"""What the adapters for serving engines share: an engine's layers and limits as fi's specs, plans and sampling records.

No engine is imported here.
"""

__version__ = "0.1.0"
