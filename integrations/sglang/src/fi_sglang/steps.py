"""A step's batch over SGLang's request-to-token map, in int32 buffers whose addresses stay; no SGLang is imported here."""

from __future__ import annotations

from dataclasses import replace

import fi_core as fi
import torch
from torch import Tensor

MIN_REQUESTS, MAX_REQUESTS = 8, 512
"""Of a step whose shared prefixes are looked for: fewer have little to gain, more are hardly ever there, and a plan's workspace
grows with them."""
MAX_PREFIXES, MAX_DEPTH = 64, 2
"""Prefixes that are found in a step, and how many around one request: a system prompt, and a document or samples below it."""
MIN_SAVED_TOKENS = 4096
"""Tokens times readers but one, from which a prefix is named; whether it then pays is decided when the step is planned."""


class StepBuffers:
    """The lengths of a step and which row of the map each request has. fi reads the map itself, as a table of pages of one
    token: nothing of a request's length is copied, flattened or counted on the host.

    A captured CUDA graph reads the buffers by address, and every batch size uses their front.
    """

    def __init__(self, req_to_token: Tensor, max_batch: int) -> None:
        """``req_to_token`` int32 [rows, context] of token slots."""
        device = req_to_token.device
        self.table = req_to_token
        self.max_batch = max_batch
        self.kv_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.rows = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.q_indptr = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self._uniform: dict[int, Tensor] = {}
        self._nodes = torch.zeros((MAX_PREFIXES, 4), dtype=torch.int32, device=device)
        self._order = torch.zeros(min(max_batch, MAX_REQUESTS), dtype=torch.int32, device=device)

    def uniform_indptr(self, q_len: int) -> Tensor:
        """Offsets int32 [max_batch + 1] of requests with ``q_len`` new tokens each; made once for each length."""
        found = self._uniform.get(q_len)
        if found is None:
            steps = torch.arange(self.max_batch + 1, dtype=torch.int32, device=self.table.device)
            found = self._uniform[q_len] = steps * q_len
        return found

    def uniform(self, seq_lens: Tensor, rows: Tensor, slots: Tensor, q_len: int, added: int = 0) -> fi.Batch:
        """B requests with ``q_len`` new tokens each; ``seq_lens`` [B] of any integer type, to which ``added`` comes where it
        leaves the new tokens out. Legal while a CUDA graph is captured."""
        num = self._fill(seq_lens, rows)
        if added:
            self.kv_lens[:num] += added
        return self._batch(self.uniform_indptr(q_len), num, slots)

    def ragged(self, seq_lens: Tensor, rows: Tensor, slots: Tensor, q_lens: Tensor) -> fi.Batch:
        """B requests with ``q_lens`` [B] new tokens, which ``seq_lens`` [B] include.

        For the graph of a long prefill SGLang makes up a request, which can be longer than the map has room for; then the step
        is cut to that.
        """
        num = self._fill(seq_lens, rows)
        room = self.table.shape[1]
        if slots.shape[0] > num * room:
            self.kv_lens[:num].clamp_(max=room)
            q_lens = q_lens.clamp(max=room)
        torch.cumsum(q_lens[:num], 0, dtype=torch.int32, out=self.q_indptr[1 : num + 1])
        return self._batch(self.q_indptr, num, slots)

    def sharing(self, batch: fi.Batch) -> fi.Batch | None:
        """``batch`` with the prefixes that its requests share, found from equal leading entries of the map, which the radix cache
        makes so; None where it has too few requests or too many. Legal while a CUDA graph is captured, and so for a step of any
        size it depends on that size alone."""
        if not MIN_REQUESTS <= batch.size <= MAX_REQUESTS:
            return None
        found = fi.SharedPrefixes(self._nodes, self._order[: batch.size])
        fi.find_shared_prefixes(batch, 1, max_depth=MAX_DEPTH, min_saved_tokens=MIN_SAVED_TOKENS, out=found)
        return replace(batch, levels=found)

    def _fill(self, seq_lens: Tensor, rows: Tensor) -> int:
        num = seq_lens.shape[0]
        if num > self.max_batch:
            raise fi.CapacityError("seq_lens", f"at most {self.max_batch} requests, SGLang's own limit", num)
        self.kv_lens[:num].copy_(seq_lens)
        self.rows[:num].copy_(rows[:num])
        return num

    def _batch(self, q_indptr: Tensor, num: int, slots: Tensor) -> fi.Batch:
        return fi.Batch(
            q_indptr[: num + 1],
            self.kv_lens[:num],
            table=self.table,
            table_row=self.rows[:num],
            slot_mapping=slots.to(torch.int64),
        )
