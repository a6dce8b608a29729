"""fi inside vLLM: three plugins that vLLM finds by their entry points (group ``vllm.general_plugins``).

``fi`` puts the attention backend into the slot CUSTOM, ``fi_sampler`` replaces the top-k and top-p sampler, ``fi_layers``
the norms, activations and rotary embeddings. vLLM's own VLLM_PLUGINS picks among them. Importing this package imports no vLLM.
"""

from __future__ import annotations

from .versions import check_engine

__version__ = "0.1.0"

ATTENTION_BACKEND = "fi_vllm.backend.FiBackend"
"""What the slot CUSTOM of vLLM's registry is set to; a path, so that nothing is imported before it is chosen."""


def register() -> None:
    """Register the attention backend: ``--attention-backend CUSTOM`` selects it. Idempotent, since vLLM calls it in every
    process. Raises EngineVersionError in another vLLM than the one that this package is written for."""
    check_engine()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)


def register_sampler() -> None:
    """Replace the class that vLLM's sampler draws with, whatever the attention backend. Idempotent."""
    check_engine()
    from .sampler import install

    install()


def register_layers() -> None:
    """Replace vLLM's custom ops of norms, gated activations and rotary embeddings, where its own setting ``custom_ops``
    enables them. Idempotent."""
    check_engine()
    from .layers import install

    install()
