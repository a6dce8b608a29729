"""Records that cross the public API: specs, batches, caches and per-layer arguments.

Shapes use: B requests, T tokens (rows of ``q``), P pages, S tokens a page (``page_size``), Hq / Hkv query / KV heads,
D ``head_dim`` (Q and K), Dv ``head_dim_vo`` (V and the output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Literal, TypeVar

import torch

from .errors import ArgumentError, LayoutError
from .prefixes import SharedPrefixes
from .rope import FusedRope, RopeTable

KVFormat = Literal["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]
QFormat = Literal["same", "fp8_e4m3", "fp8_e5m2"]
KVLayout = Literal["NHD", "HND"]
TableForm = Literal["dense", "indptr", "ragged"]

KV_FORMATS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Storage dtype of each KV format; the FP8 formats may also be stored as uint8."""

Q_FORMATS: tuple[QFormat, ...] = ("same", "fp8_e4m3", "fp8_e5m2")
"""Storage formats of attention's Q: "same" is the spec's dtype."""

ATTENTION_FEATURES = frozenset({"soft_cap", "sinks", "alibi", "mask", "lse"})
"""What a spec may ask for beyond causal masking and windows."""


def _require(condition: bool, argument: str, expected: str, actual: object) -> None:
    if not condition:
        raise ArgumentError(argument, expected, actual)


Collection = TypeVar("Collection")


def _collected(argument: str, items: Iterable[object], kind: Callable[[Iterable[object]], Collection]) -> Collection:
    """``items`` as a tuple or frozenset; ArgumentError when they cannot be iterated or hashed."""
    try:
        return kind(items)
    except TypeError as error:
        raise ArgumentError(argument, f"values for a {kind.__name__}", repr(items)) from error


def format_of(dtype: torch.dtype) -> KVFormat:
    """The KV format that stores ``dtype`` unchanged."""
    for name, stored in KV_FORMATS.items():
        if stored == dtype:
            return name  # type: ignore[return-value]
    raise ArgumentError("dtype", f"one of {sorted(map(str, KV_FORMATS.values()))}", dtype)


@dataclass(frozen=True)
class AttentionSpec:
    """What a plan must be able to compute: everything that is fixed over all layers and steps.

    ``page_size`` is None exactly when ``table`` is "ragged" (K and V are plain [tokens, heads, dim] tensors).
    ``windows`` names the sliding windows a call may pick: a key at position j is visible to a query at position i iff
    i - j < window; None is full attention. Query positions are bottom-right aligned: token i of a request with q_len
    new tokens stands at kv_len - q_len + i. ``features`` names what calls may use (see ATTENTION_FEATURES).
    ``batch_invariant`` asks that the result of a request not depend on the rest of the batch. ``dtype`` is that of the
    output, and of Q with ``q_format`` "same". ``rope``: what attention rotates itself.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_vo: int | None = None
    dtype: torch.dtype = torch.bfloat16
    kv_format: KVFormat | None = None
    page_size: int | None = 16
    kv_layout: KVLayout = "NHD"
    table: TableForm = "dense"
    causal: bool = True
    windows: tuple[int | None, ...] = (None,)
    features: frozenset[str] = field(default_factory=frozenset)
    batch_invariant: bool = False
    q_format: QFormat = "same"
    rope: FusedRope | None = None

    def __post_init__(self) -> None:
        allowed = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        _require(self.dtype in allowed, "dtype", "float32, float16, bfloat16 or float64", self.dtype)
        object.__setattr__(self, "head_dim_vo", self.head_dim if self.head_dim_vo is None else self.head_dim_vo)
        object.__setattr__(self, "kv_format", format_of(self.dtype) if self.kv_format is None else self.kv_format)
        object.__setattr__(self, "features", _collected("features", self.features, frozenset))
        object.__setattr__(self, "windows", _collected("windows", self.windows, tuple))
        for name in ("num_qo_heads", "num_kv_heads", "head_dim", "head_dim_vo"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, name, "a positive int", value)
        _require(
            self.num_qo_heads % self.num_kv_heads == 0,
            "num_qo_heads",
            f"a multiple of num_kv_heads={self.num_kv_heads}",
            self.num_qo_heads,
        )
        _require(self.q_format in Q_FORMATS, "q_format", f"one of {Q_FORMATS}", self.q_format)
        _require(isinstance(self.rope, (FusedRope, NoneType)), "rope", "a FusedRope or None", repr(self.rope))
        if self.rope is not None:
            expected = f"at most head_dim={self.head_dim}"
            _require(self.rope.rotary_dim <= self.head_dim, "rope.rotary_dim", expected, self.rope.rotary_dim)
        for name in ("causal", "batch_invariant"):
            _require(isinstance(getattr(self, name), bool), name, "a bool", repr(getattr(self, name)))
        _require(self.kv_format in tuple(KV_FORMATS), "kv_format", f"one of {sorted(KV_FORMATS)}", self.kv_format)
        _require(self.kv_layout in ("NHD", "HND"), "kv_layout", "'NHD' or 'HND'", self.kv_layout)
        _require(self.table in ("dense", "indptr", "ragged"), "table", "'dense', 'indptr' or 'ragged'", self.table)
        if self.table == "ragged":
            _require(self.page_size is None, "page_size", "None with table='ragged'", self.page_size)
        else:
            size = self.page_size
            _require(isinstance(size, int) and 1 <= size <= 256, "page_size", "an int from 1 to 256", size)
        unknown = self.features - ATTENTION_FEATURES
        _require(not unknown, "features", f"a subset of {sorted(ATTENTION_FEATURES)}", sorted(unknown))
        _require(len(self.windows) > 0, "windows", "at least one entry", self.windows)
        for window in self.windows:
            positive = window is None or (isinstance(window, int) and window > 0)
            _require(positive, "windows", "positive ints or None", window)

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def kv_dtype(self) -> torch.dtype:
        """Storage dtype of K and V."""
        return KV_FORMATS[self.kv_format or ""]

    @property
    def kv_is_fp8(self) -> bool:
        return (self.kv_format or "").startswith("fp8")

    @property
    def q_dtype(self) -> torch.dtype:
        """dtype of Q."""
        return KV_FORMATS[self.q_format] if self.q_is_fp8 else self.dtype

    @property
    def q_is_fp8(self) -> bool:
        return self.q_format != "same"

    @property
    def allows_fp8_weights(self) -> bool:
        """Whether kernels may round the softmax weights to FP8 (``tolerances.py``): Q, K and V are e4m3."""
        return self.q_format == self.kv_format == "fp8_e4m3"


@dataclass(frozen=True)
class Capacity:
    """Upper bounds a plan is made for; no batch's lengths are read on the host.

    ``max_q_len`` is the most new tokens of one request, ``max_q_tokens`` of the whole batch, ``max_kv_len`` the most KV
    tokens of one request (new tokens included). ``max_prefixes`` is the most nodes of ``Batch.levels`` (0: batches have none,
    and nothing is paid for them), ``max_prefix_depth`` the most of them around one request.
    """

    max_batch: int
    max_q_tokens: int
    max_q_len: int
    max_kv_len: int
    max_prefixes: int = 0
    max_prefix_depth: int = 4

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), int(item.name != "max_prefixes")
            _require(isinstance(value, int) and value >= least, item.name, f"an int of at least {least}", value)
        _require(
            self.max_q_len <= self.max_q_tokens, "max_q_len", f"<= max_q_tokens={self.max_q_tokens}", self.max_q_len
        )


@dataclass(frozen=True)
class PackedMask:
    """A bit per (query token, column), 1 = visible; combined with causal and window by AND.

    ``bits``: uint8, request b's rows start at byte ``indptr[b]`` (int64 [B + 1]), row-major, each row padded to whole
    bytes, bit k of a byte is column 8 * byte + k (little-endian). ``columns`` says what the columns are: "kv" all
    kv_len keys, "new" only the last q_len keys (a speculative tree; all earlier keys are visible).
    """

    bits: torch.Tensor
    indptr: torch.Tensor
    columns: Literal["kv", "new"] = "kv"


@dataclass(frozen=True)
class Batch:
    """Which tokens belong to which request and where their keys lie; device tensors, addresses stay, contents change.

    ``q_indptr`` int32 [B + 1]: rows of q of each request. ``kv_lens`` int32 [B]: KV tokens, new ones included; 0 is a
    padding row. Exactly one of:

    - dense ``table`` int32 [rows, entries] of page ids, request b uses row ``table_row[b]`` (int32 [B]; None: row b);
    - ``table`` int32 [entries] with ``table_indptr`` int32 [B + 1];
    - ragged: ``kv_indptr`` int32 [B + 1], request b's keys are rows kv_indptr[b] .. kv_indptr[b] + kv_lens[b].

    ``slot_mapping`` int64 [T] overrides where ``append_kv`` writes each token (page * page_size + offset, -1: nowhere).
    ``levels`` names the prefixes that requests share: they change the work, never the result, and a kernel may leave them
    unused, which its plan's ``describe`` says. Rows of q past q_indptr[B] are left untouched.
    """

    q_indptr: torch.Tensor
    kv_lens: torch.Tensor
    table: torch.Tensor | None = None
    table_row: torch.Tensor | None = None
    table_indptr: torch.Tensor | None = None
    kv_indptr: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    mask: PackedMask | None = None
    levels: SharedPrefixes | None = None

    @property
    def size(self) -> int:
        """Number of requests B, padding rows included."""
        return self.kv_lens.shape[0]

    @property
    def table_form(self) -> TableForm:
        if self.table is None:
            return "ragged"
        return "dense" if self.table_indptr is None else "indptr"


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer.

    Paged: k [P, S, Hkv, D] (NHD) or [P, Hkv, S, D] (HND); v the same with Dv. Ragged: k [tokens, Hkv, D] (NHD) or
    [Hkv, tokens, D] (HND). K and V may be views of one tensor; any strides with a contiguous last dim. FP8 formats may
    be stored as uint8. ``k_scale`` / ``v_scale`` (FP8 only): the stored value times the scale is the real one; a float,
    a float32 scalar tensor, or float32 [Hkv] for per-head scales.
    """

    k: torch.Tensor
    v: torch.Tensor
    layout: KVLayout = "NHD"
    format: KVFormat | None = None
    k_scale: float | torch.Tensor | None = None
    v_scale: float | torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            tensor = getattr(self, name)
            _require(isinstance(tensor, torch.Tensor), f"kv.{name}", "a tensor", type(tensor).__name__)
        if self.format is None:
            object.__setattr__(self, "format", format_of(self.k.dtype))
        _require(self.layout in ("NHD", "HND"), "kv.layout", "'NHD' or 'HND'", self.layout)
        _require(self.format in KV_FORMATS, "kv.format", f"one of {sorted(KV_FORMATS)}", self.format)
        is_fp8 = (self.format or "").startswith("fp8")
        for name in ("k", "v"):
            tensor = getattr(self, name)
            allowed = {KV_FORMATS[self.format or ""]} | ({torch.uint8} if is_fp8 else set())
            _require(tensor.dtype in allowed, f"kv.{name}.dtype", f"{self.format} storage", tensor.dtype)
            _require(tensor.dim() in (3, 4), f"kv.{name}", "3 (ragged) or 4 (paged) dims", tuple(tensor.shape))
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                raise LayoutError(f"kv.{name}", "a contiguous last dim", f"strides {tensor.stride()}")
            scale = getattr(self, f"{name}_scale")
            _require(is_fp8 or scale is None, f"kv.{name}_scale", f"None with format {self.format}", scale)
            if scale is not None and not isinstance(scale, torch.Tensor):
                usable = isinstance(scale, (int, float)) and 0 < scale < math.inf
                _require(usable, f"kv.{name}_scale", "a positive, finite float or a tensor", repr(scale))
        _require(self.k.dim() == self.v.dim(), "kv.v", f"{self.k.dim()} dims like kv.k", self.v.dim())

    @property
    def is_paged(self) -> bool:
        return self.k.dim() == 4

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[-2 if self.layout == "NHD" else -3]

    @property
    def page_size(self) -> int | None:
        """Tokens a page, None when ragged."""
        if not self.is_paged:
            return None
        return self.k.shape[1 if self.layout == "NHD" else 2]

    def typed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V viewed with the storage dtype of the format (undoes uint8 typing)."""
        dtype = KV_FORMATS[self.format or ""]
        return self.k.view(dtype), self.v.view(dtype)

    def as_nhd(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Typed K and V as views in NHD order: [P, S, Hkv, D] or [tokens, Hkv, D]."""
        k, v = self.typed()
        if self.layout == "HND":
            k, v = k.transpose(-2, -3), v.transpose(-2, -3)
        return k, v


@dataclass(frozen=True)
class LayerArgs:
    """What may differ from layer to layer in one plan.

    ``scale`` multiplies q . k (default 1 / sqrt(D)); ``soft_cap`` c then maps a logit x to c * tanh(x / c);
    ``alibi_slopes`` float32 [Hq] adds slope * (key position - query position); ``window`` must be one of the spec's
    windows (default: the spec's only one); ``sinks`` float32 [Hq] are extra logits that take part in the softmax
    denominator and in the LSE but have no value row. ``q_scale`` (FP8 queries only): the stored value times the scale is
    the real one; a float, or float32 of one element or [Hq]. ``rope``: frequencies of what the spec's ``rope`` rotates,
    without a table (``cos_sin`` None): the angles are computed.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None | Literal["spec"] = "spec"
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    q_scale: float | torch.Tensor | None = None
    rope: RopeTable | None = None

    def __post_init__(self) -> None:
        # Made anew for each call by some callers: no text is put together unless something is wrong.
        for name, number in (("scale", self.scale), ("soft_cap", self.soft_cap)):
            if not isinstance(number, (int, float, NoneType)) or isinstance(number, bool):
                raise ArgumentError(f"layer.{name}", "a number or None", repr(number))
        window = self.window
        if window != "spec" and (not isinstance(window, (int, NoneType)) or isinstance(window, bool)):
            raise ArgumentError("layer.window", "an int, None or 'spec'", repr(window))
        for name, tensor in (("sinks", self.sinks), ("alibi_slopes", self.alibi_slopes)):
            if not isinstance(tensor, (torch.Tensor, NoneType)):
                raise ArgumentError(f"layer.{name}", "a tensor or None", repr(tensor))
        if not isinstance(self.rope, (RopeTable, NoneType)):
            raise ArgumentError("layer.rope", "a RopeTable or None", repr(self.rope))

    def resolve(self, spec: AttentionSpec) -> ResolvedLayer:
        """Check against ``spec`` and fill in defaults; raises ArgumentError naming the field."""
        scale = 1.0 / math.sqrt(spec.head_dim) if self.scale is None else float(self.scale)
        _require(math.isfinite(scale), "layer.scale", "a finite number", self.scale)
        window = self.window
        if window == "spec":
            _require(len(spec.windows) == 1, "layer.window", f"one of the spec's windows {spec.windows}", "none given")
            window = spec.windows[0]
        _require(window in spec.windows, "layer.window", f"one of the spec's windows {spec.windows}", window)
        for name, feature in (("soft_cap", "soft_cap"), ("sinks", "sinks"), ("alibi_slopes", "alibi")):
            given = getattr(self, name) is not None
            wanted = feature in spec.features
            _require(given == wanted, f"layer.{name}", f"{'a value' if wanted else 'None'} (spec.features)", given)
        if self.soft_cap is not None:
            _require(0 < self.soft_cap < math.inf, "layer.soft_cap", "a positive, finite number", self.soft_cap)
        for name in ("sinks", "alibi_slopes"):
            tensor = getattr(self, name)
            if tensor is not None:
                shape = (spec.num_qo_heads,)
                _require(tuple(tensor.shape) == shape, f"layer.{name}", f"shape {shape}", tuple(tensor.shape))
                _require(tensor.dtype == torch.float32, f"layer.{name}", "float32", tensor.dtype)
        self._check_q_scale(spec)
        wanted = spec.rope is not None
        _require(
            (self.rope is not None) == wanted, "layer.rope", f"{'a table' if wanted else 'None'} (spec.rope)", self.rope
        )
        if spec.rope is not None and self.rope is not None:
            spec.rope.check_table("layer.rope", self.rope)
        return ResolvedLayer(scale, self.soft_cap, window, self.sinks, self.alibi_slopes, self.q_scale, self.rope)

    def _check_q_scale(self, spec: AttentionSpec) -> None:
        scale = self.q_scale
        _require(scale is None or spec.q_is_fp8, "layer.q_scale", f"None with q_format {spec.q_format}", repr(scale))
        if isinstance(scale, torch.Tensor):
            fits = scale.dtype == torch.float32 and (scale.numel() == 1 or tuple(scale.shape) == (spec.num_qo_heads,))
            expected = f"float32 of 1 element or [{spec.num_qo_heads}]"
            _require(fits, "layer.q_scale", expected, f"{scale.dtype} {list(scale.shape)}")
        elif scale is not None:
            usable = isinstance(scale, (int, float)) and 0 < scale < math.inf
            _require(usable, "layer.q_scale", "a positive, finite float or a tensor", repr(scale))


@dataclass(frozen=True)
class ResolvedLayer:
    """LayerArgs after defaults and checks; what kernels receive."""

    scale: float
    soft_cap: float | None
    window: int | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    q_scale: float | torch.Tensor | None = None
    rope: RopeTable | None = None
