"""What the levels of a batch mean for each request and node, worked out on the device in two kernels without a copy or a wait.

Rows of int32: ``rows`` [T, 4], of the query tokens in the levels' order (token, position among the keys, request, token within
the request); ``node_rows`` [N, 4] (request whose table is read, first row, rows, levels around it).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def request_at(order_ptr, place, inside, ORDER: tl.constexpr):
    """The request at a place of the order (or of each of some places)."""
    if ORDER:
        request = tl.load(order_ptr + place, mask=inside, other=0)
    else:
        request = place
    return request


@triton.jit
def real_nodes(nodes_ptr, node, num_nodes, num_requests):
    """(members from, to, keys from, to) of nodes; no members for those that are not used or not there."""
    inside = node < num_nodes
    begin = tl.load(nodes_ptr + node * 4, mask=inside, other=0)
    end = tl.load(nodes_ptr + node * 4 + 1, mask=inside, other=0)
    kv_begin = tl.load(nodes_ptr + node * 4 + 2, mask=inside, other=0)
    kv_end = tl.load(nodes_ptr + node * 4 + 3, mask=inside, other=0)
    begin = tl.maximum(begin, 0)
    end = tl.where(kv_begin < kv_end, tl.minimum(end, num_requests), 0)
    return begin, tl.maximum(end, begin), kv_begin, kv_end


@triton.jit(do_not_specialize=["num_nodes", "num_requests", "max_tokens"])
def level_requests_kernel(
    nodes_ptr, num_nodes, order_ptr, q_indptr_ptr, kv_lens_ptr, num_requests, max_tokens,
    place_indptr_ptr, own_begin_ptr, own_lens_ptr, depths_ptr, rows_ptr,
    ORDER: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Place ``program_id(0)`` of the order: where its rows begin, what its request shares, and its rows. The program after the
    last place writes the number of rows."""
    place = tl.program_id(0)
    row_begin = 0
    for first in range(0, place, BLOCK):
        earlier = first + tl.arange(0, BLOCK)
        inside = earlier < place
        request = request_at(order_ptr, earlier, inside, ORDER)
        begin = tl.load(q_indptr_ptr + request, mask=inside, other=0)
        end = tl.load(q_indptr_ptr + request + 1, mask=inside, other=0)
        row_begin += tl.sum(end - begin, 0)
    tl.store(place_indptr_ptr + place, row_begin)
    if place < num_requests:
        request = request_at(order_ptr, place, True, ORDER)
        own_begin = 0
        depth = 0
        for first in range(0, num_nodes, BLOCK):
            begin, end, _, kv_end = real_nodes(nodes_ptr, first + tl.arange(0, BLOCK), num_nodes, num_requests)
            around = (begin <= place) & (place < end)
            own_begin = tl.maximum(own_begin, tl.max(tl.where(around, kv_end, 0), 0))
            depth += tl.sum(around.to(tl.int32), 0)
        q_begin = tl.load(q_indptr_ptr + request)
        q_len = tl.load(q_indptr_ptr + request + 1) - q_begin
        kv_len = tl.load(kv_lens_ptr + request)
        tl.store(own_begin_ptr + request, own_begin)
        tl.store(own_lens_ptr + request, tl.maximum(kv_len - own_begin, 0))
        tl.store(depths_ptr + request, tl.minimum(depth, DEPTH))
        for first in range(0, q_len, TOKENS):
            index = first + tl.arange(0, TOKENS)
            row = row_begin + index
            inside = (index < q_len) & (row < max_tokens)
            record = rows_ptr + row * 4
            tl.store(record, q_begin + index, mask=inside)
            tl.store(record + 1, kv_len - q_len + index, mask=inside)
            tl.store(record + 2, request + index * 0, mask=inside)
            tl.store(record + 3, index, mask=inside)


@triton.jit(do_not_specialize=["num_nodes", "num_requests"])
def level_nodes_kernel(
    nodes_ptr, num_nodes, order_ptr, place_indptr_ptr, num_requests, node_rows_ptr, node_indptr_ptr, node_lens_ptr,
    ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Node ``program_id(0)``: its rows, and its place among the nodes as if they were requests of their own. The program after
    the last node writes the number of rows."""
    node = tl.program_id(0)
    begin, end, kv_begin, kv_end = real_nodes(nodes_ptr, node, num_nodes, num_requests)
    rows_before = 0
    depth = 0
    for first in range(0, node, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_begin, other_end, _, _ = real_nodes(nodes_ptr, other, tl.minimum(node, num_nodes), num_requests)
        around = (other_begin <= begin) & (end <= other_end) & (other_begin < other_end)
        depth += tl.sum(around.to(tl.int32), 0)
        other_rows = tl.load(place_indptr_ptr + other_end) - tl.load(place_indptr_ptr + other_begin)
        rows_before += tl.sum(other_rows, 0)
    tl.store(node_indptr_ptr + node, rows_before)
    if node < num_nodes:
        row_begin = tl.load(place_indptr_ptr + begin)
        is_real = begin < end
        record = node_rows_ptr + node * 4
        tl.store(record, request_at(order_ptr, begin, is_real, ORDER))
        tl.store(record + 1, row_begin)
        tl.store(record + 2, tl.load(place_indptr_ptr + end) - row_begin)
        tl.store(record + 3, depth)
        tl.store(node_lens_ptr + node, tl.where(is_real, kv_end - kv_begin, 0))
