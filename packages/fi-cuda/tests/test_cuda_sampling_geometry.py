"""The form of a row's cluster: it holds the whole row, and its blocks fit on a multiprocessor as often as they are meant to."""

import pytest
import torch
from fi_cuda.kernels.sampling.filter_logits import FilterLogitsSpec
from fi_cuda.kernels.sampling.forms import kept_for
from fi_cuda.kernels.sampling.geometry import (
    NO_SEARCH,
    NO_SEARCH_PENALISED,
    SEARCH,
    SHORT_LIST,
    SMALL_SEARCH,
    TOP_P_SEARCH,
    geometry_for,
)
from fi_cuda.kernels.sampling.sample import ColumnSampleSpec, SampleSpec, column_form
from fi_cuda.kernels.sampling.top_k import TopKSpec
from fi_cuda.kernels.sampling.verify import VerifySpec

pytestmark = pytest.mark.timeout(60)

HOPPER_SHARED_BYTES = 228 * 1024
MOST_OF_A_BLOCK = 227 * 1024
RESERVED_BYTES = 1024

VOCABULARIES = (
    1,
    2,
    97,
    1024,
    1025,
    4096,
    4097,
    32000,
    50257,
    128256,
    151936,
    180000,
    196608,
    201088,
    208000,
    262144,
    2**19 - 1,
    2**19,
)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("num_rows", [1, 8, 9, 21, 22, 32, 33, 4096])
@pytest.mark.parametrize("kept", [NO_SEARCH, NO_SEARCH_PENALISED, SMALL_SEARCH, SHORT_LIST, TOP_P_SEARCH, SEARCH])
def test_a_cluster_holds_its_row(vocab_size, num_rows, kept):
    form = geometry_for(vocab_size, num_rows, kept=kept)
    warps = form.cluster_size * form.num_threads // 32
    assert warps * form.warp_tokens >= vocab_size
    # Slices begin at multiples of 16 bytes in any dtype.
    assert form.warp_tokens % 8 == 0
    assert form.cluster_size in (*range(1, 9), 16) and form.num_threads in (128, 256, 384, 512)
    assert not kept.searched or form.cluster_size <= form.num_threads // 32


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("num_rows", [1, 16, 256])
def test_blocks_fit_on_a_multiprocessor(vocab_size, num_rows):
    every = frozenset({"top_k", "top_p", "min_p"})
    form = geometry_for(vocab_size, num_rows)
    filtering = geometry_for(vocab_size, num_rows, kept=kept_for(every))
    # The entry serves no more.
    written = geometry_for(vocab_size, num_rows, kept=kept_for(every).without_pairs())
    two_rows = geometry_for(min(vocab_size, 2**18), num_rows, rows_held=2, kept=NO_SEARCH)
    penalised = {
        filters: column_form(vocab_size, num_rows, filters, penalties=True)
        for filters in (frozenset[str](), frozenset({"top_p"}), every)
    }
    specs = (
        SampleSpec.of(torch.float32, 16, filtering, every),
        SampleSpec.of(torch.float32, 16, geometry_for(vocab_size, num_rows, kept=NO_SEARCH), frozenset()),
        SampleSpec.of(
            torch.float32,
            16,
            geometry_for(vocab_size, num_rows, kept=kept_for(frozenset({"top_p"}))),
            frozenset({"top_p"}),
        ),
        FilterLogitsSpec.of(torch.float32, 16, written, every, 16, True),
        TopKSpec(torch.float32, 16, *form, 2048, False),
        VerifySpec(torch.float32, 16, *form, tree=True, proposals=False),
        VerifySpec(torch.float32, 16, *two_rows, tree=False, proposals=True),
        *(ColumnSampleSpec.of(torch.float32, 16, form, filters, False, True) for filters, form in penalised.items()),
    )
    for spec in specs:
        assert spec.shared_bytes <= MOST_OF_A_BLOCK, spec
        if spec.stem != "top_k":  # its list of sorted tokens may cost the second block
            assert spec.blocks_per_multiprocessor * (spec.shared_bytes + RESERVED_BYTES) <= HOPPER_SHARED_BYTES, spec


def test_few_rows_are_spread_and_many_share_multiprocessors():
    few, some, many = (geometry_for(128256, rows) for rows in (1, 16, 256))
    assert (few.cluster_size, some.cluster_size, many.cluster_size) == (16, 8, 8)
    assert (few.resident_blocks, some.resident_blocks, many.resident_blocks) == (1, 2, 2)
    assert all(geometry_for(128256, 256, kept=kept).resident_blocks == 3 for kept in (NO_SEARCH, SMALL_SEARCH))
    assert geometry_for(32000, 256).cluster_size == 2
    assert geometry_for(32000, 256, kept=SHORT_LIST).cluster_size == 4
    # 16 clusters of 8 do not fit on the multiprocessors at a time, of 6 they do; blocks without one of their own share one.
    for kept in (NO_SEARCH, SHORT_LIST, TOP_P_SEARCH):
        forms = [geometry_for(128256, rows, kept=kept) for rows in (8, 16, 22)]
        assert [form.cluster_size for form in forms] == [16, 6, 8]
        assert [form.resident_blocks for form in forms] == [1, 1, 2]
    for kept, rows in ((SHORT_LIST, (64, 256)), (TOP_P_SEARCH, (256,))):
        assert all(geometry_for(128256, n, kept=kept)[:2] == (5, 384) for n in rows)
