"""fi inside vLLM: three plugins that vLLM finds by their entry points (group ``vllm.general_plugins``).

``fi`` puts the attention backend into the slot CUSTOM, ``fi_sampler`` replaces the top-k and top-p sampler, ``fi_layers``
the norms, activations and rotary embeddings. vLLM's own VLLM_PLUGINS picks among them. Importing this package imports no vLLM.
"""

from __future__ import annotations

from fi_adapters.versions import Engine

__version__ = "0.1.0"

ENGINE = Engine("vllm", "0.22", "0.22.1", "vllm._version", "VLLM_PLUGINS, a list of the plugins to load")
"""The vLLM that this package is written for."""

ATTENTION_BACKEND = "fi_vllm.backend.FiBackend"
"""What the slot CUSTOM of vLLM's registry is set to; a path, so that nothing is imported before it is chosen."""


def register() -> None:
    """Register the attention backend: ``--attention-backend CUSTOM`` selects it. Idempotent, since vLLM calls it in every
    process. Raises EngineVersionError in another vLLM than the one that this package is written for."""
    ENGINE.check()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)


def register_sampler() -> None:
    """Replace the class that vLLM's sampler draws with, whatever the attention backend. Idempotent."""
    ENGINE.check()
    from .sampler import install

    install()


def register_layers() -> None:
    """Replace vLLM's custom ops of norms, gated activations and rotary embeddings, where its own setting ``custom_ops``
    enables them. Idempotent."""
    ENGINE.check()
    from .layers import install

    install()
