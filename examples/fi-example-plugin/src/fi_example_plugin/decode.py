"""Decode attention for head dim 64: one program walks all pages of one request for one query head (online softmax)."""

import dataclasses

import torch
import triton
import triton.language as tl


@triton.jit
def decode(q, k, v, out, q_indptr, kv_lens, table, table_row, scale, group, page_size,
           q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head, out_row, out_head, table_stride,
           HAS_ROW: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(q_indptr + request).to(tl.int64)
    if tl.load(q_indptr + request + 1) > row:
        dims, steps = tl.arange(0, D), tl.arange(0, STEP)
        query = tl.load(q + row * q_row + head * q_head + dims).to(tl.float32) * scale
        kv_len = tl.load(kv_lens + request)
        entries = table + (tl.load(table_row + request) if HAS_ROW else request).to(tl.int64) * table_stride
        largest, total, acc = -float("inf"), 0.0, tl.zeros([D], tl.float32)
        for start in range(0, kv_len, STEP):
            token, valid = start + steps, start + steps < kv_len
            page = tl.load(entries + token // page_size, mask=valid, other=0).to(tl.int64)
            k_at = k + page * k_page + (token % page_size) * k_token + head // group * k_head
            v_at = v + page * v_page + (token % page_size) * v_token + head // group * v_head
            keys = tl.load(k_at[:, None] + dims[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
            values = tl.load(v_at[:, None] + dims[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
            logits = tl.where(valid, tl.sum(keys * query[None, :], axis=1), -float("inf"))
            new_largest = tl.maximum(largest, tl.max(logits, axis=0))
            weights, shrink = tl.exp(logits - new_largest), tl.exp(largest - new_largest)
            total = total * shrink + tl.sum(weights, axis=0)
            acc = acc * shrink + tl.sum(weights[:, None] * values, axis=0)
            largest = new_largest
        acc = acc / tl.where(total > 0.0, total, 1.0)  # no key: 0, as the contract says
        tl.store(out + row * out_row + head * out_head + dims, acc.to(out.dtype.element_ty))


class DecodeState:
    def __init__(self, spec, device):
        self.spec, self.device, self.batch, self.workspace = spec, device, None, ()

    def update(self, batch):
        tensors = {name: tensor.to(self.device) for name, tensor in vars(batch).items() if torch.is_tensor(tensor)}
        self.batch = dataclasses.replace(batch, **tensors)

    def run(self, q, kv, layer, out, lse):
        batch, (k, v) = self.batch, kv.as_nhd()
        with torch.cuda.device_of(q):
            decode[(batch.size, q.shape[1])](
                q, k, v, out, batch.q_indptr, batch.kv_lens, batch.table, batch.table_row, layer.scale,
                self.spec.group_size, k.shape[1], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
                batch.table.stride(0), HAS_ROW=batch.table_row is not None, D=64, STEP=64)  # fmt: skip

    def describe(self):
        return ["one program a request and query head, 64 keys a step"]


class DecodeKernel:
    def workspace_bytes(self, spec, capacity, device):
        return 0

    def plan(self, spec, capacity, device):
        return DecodeState(spec, device)
