"""Why a kernel is chosen: the text of a selection, without running anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .contract import Request, Target, target_of
from .errors import ArgumentError
from .plan import attention_values
from .records import AttentionSpec
from .registry import PluginStatus, registry


def parse_target(text: str) -> Target:
    """The target that ``text`` names: "cpu", "cuda" or "cuda:1" (devices of this machine), or "cuda:sm_90" (any)."""
    capability = re.fullmatch(r"cuda:sm_(\d+)(\d)a?", text)
    if capability is not None:
        return Target("cuda", (int(capability[1]), int(capability[2])))
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ArgumentError("device", "a torch device or 'cuda:sm_90'", text) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", "a device of this machine (or a capability, such as 'cuda:sm_90')", text)
    return target_of(device)


def explain(
    what: AttentionSpec | Request,
    *,
    device: str | None = None,
    max_q_len: int | None = None,
    levels: bool | None = None,
) -> str:
    """The kernel that would serve ``what``, why, and every other kernel with its reasons.

    An AttentionSpec is completed with ``device`` (see ``parse_target``; default: CUDA where there is one, else the CPU),
    ``max_q_len`` (default 1, a decode plan) and ``levels`` (whether batches may share prefixes; default False); a Request
    holds them, so none may be given. Obeys ``use`` and
    FI_BACKEND. Raises ArgumentError, or UnsupportedError, whose text lists the reasons, when no kernel serves it.
    """
    if isinstance(what, Request):
        for name, given in (("device", device), ("max_q_len", max_q_len), ("levels", levels)):
            if given is not None:
                raise ArgumentError(name, "None with a Request, which holds it", given)
        return str(registry().select(what))
    if not isinstance(what, AttentionSpec):
        raise ArgumentError("what", "an AttentionSpec or a Request", type(what).__name__)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    values = attention_values(what, 1 if max_q_len is None else max_q_len, bool(levels))
    request = registry().operations["attention"].request(parse_target(device), **values)
    return str(registry().select(request))


def backends() -> Sequence[PluginStatus]:
    """Every installed plugin: its backend's name, version and priority, or why it failed to load."""
    return tuple(registry().statuses)
