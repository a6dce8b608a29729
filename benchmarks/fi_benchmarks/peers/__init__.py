"""Optional peers, a module each. A peer is offered where it can be imported, and named with its reason where it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..problem import Maker, Problem

Offer = Callable[[Problem], Mapping[str, Maker]]
"""The implementations of a peer for a problem: name -> maker; empty where it has none."""


@dataclass(frozen=True)
class PeerOptions:
    """``folder``: where peers were unpacked that are not installed. ``compile``: a peer that compiles its modules may
    compile those that are missing, which takes minutes."""

    folder: Path | None = None
    compile: bool = False


@dataclass(frozen=True)
class Peer:
    """``find`` imports what the peer needs and returns its version; it raises ImportError or OSError with the reason
    where that is not there. ``offers``: operation -> what it brings."""

    name: str
    find: Callable[[PeerOptions], str]
    offers: Mapping[str, Offer]


def peers() -> tuple[Peer, ...]:
    """Every peer that this folder knows."""
    from . import cudnn, flash_attention_3, flashinfer_peer, torch_peer

    return tuple(module.PEER for module in (torch_peer, cudnn, flash_attention_3, flashinfer_peer))


def add_folder(folder: Path) -> None:
    """Make the modules that were unpacked into ``folder`` importable, after everything installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
