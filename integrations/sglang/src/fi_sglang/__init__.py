"""fi inside SGLang: an attention backend and a sampling backend, both named ``fi``.

SGLang finds the plugin by its entry point (group ``sglang.srt.plugins``; its SGLANG_PLUGINS picks among plugins). Importing this
package imports no SGLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fi_adapters.versions import Engine

if TYPE_CHECKING:
    from .backend import FiAttnBackend
    from .sampler import FiSampler

__version__ = "0.1.0"

ENGINE = Engine("sglang", "0.5.15", "0.5.15", "sglang.version", "SGLANG_PLUGINS, a list of the plugins to load")
"""The SGLang that this package is written for; 0.5.14 drives CUDA graphs through other methods."""

NAME = "fi"


def register() -> None:
    """Register both backends: ``--attention-backend fi --sampling-backend fi`` select them. Idempotent, since SGLang calls it
    in every process and more than once. Raises EngineVersionError in another SGLang than the one this package is written
    for; SGLang logs that and goes on, and then does not know the name ``fi``."""
    ENGINE.check()
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.sampler import register_sampler_backend

    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    if NAME not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.add_deterministic_attention_backend_choices([NAME])
        server_args.add_radix_supported_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(make_attention)
    if NAME not in server_args.SAMPLING_BACKEND_CHOICES:
        register_sampler_backend(NAME, make_sampler)


def make_attention(runner: Any) -> FiAttnBackend:
    """What SGLang's registry calls for the name ``fi``."""
    from .backend import FiAttnBackend

    return FiAttnBackend(runner)


def make_sampler() -> FiSampler:
    """What SGLang's sampler registry calls for the name ``fi``."""
    from .sampler import FiSampler

    return FiSampler()
