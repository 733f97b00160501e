"""Matrix products with weights that are packed once: `csrc/linear.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory
from .grid import fit_grid
from .library import address, dense, dtype_of, operation
from .packing import in_turn, padded_vector, quantize, words_of
from .short import shorten

_linear = operation("linear", "20q")
_unpack_rows = operation("unpack_rows", "17q")

_BF16, _INT8, _SHORT = 1, 2, 3  # WeightKind of csrc/linear_args.h
_GRIDS = {4: 4, 8: 5}  # likewise, by the bits of a code
_KINDS = {torch.float32: 0, torch.float16: 0, torch.bfloat16: _BF16}
_ROWS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear:
    """y = x W^T + bias, with W in the order in which the kernels read it.

    A row's bits depend on that row alone, not on how many others there are. bfloat16 weights meet x rounded to bfloat16, float32 and
    float16 weights meet it as float32 (float16 is packed as float32). Sums are float32, rounded once, to the result's dtype. Of a row that
    is not finite any number may be NaN. Of int8 weights the scale of an output meets its sum last: where 127 times the sum of a row's
    magnitudes leaves float32, a result is infinite or NaN, however small the weights are.

    Args:
        weight: `[N, K]` float32, bfloat16 or float16 on the CPU; not kept.
        bias: `[N]`, or None.
        quantization: None, or "int8": one scale an output; x is rounded to 16 bits at every call, one scale for 256 neighbours of a row.
        gated: W is gates `[N/2, K]` and ups behind each other, and the result `silu(gate) * up`, `[R, N/2]`.
        memory: what the packed weights lie in; None: memory of their own.

    Raises:
        ValueError: another device, dtype, shape or quantization.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        quantization: str | None = None,
        gated: bool = False,
        memory: Memory | None = None,
    ):
        _check(weight, bias, quantization, gated)
        self.outputs, self.depth = weight.shape
        self.columns = self.outputs // 2 if gated else self.outputs
        self.gated = gated
        self.quantization = quantization
        if gated:
            weight, bias = in_turn(weight), None if bias is None else in_turn(bias)
        self._scale: Tensor | None = None
        if quantization == "int8":
            self._kind = _INT8
            weight, scale = quantize(weight)
            self._scale = padded_vector(scale, torch.float32)
        else:
            self._kind = _KINDS[weight.dtype]
            weight = weight.float() if self._kind == 0 else weight
        self._bias = None if bias is None else padded_vector(bias, torch.float32)
        words = words_of(weight)
        self._code: list[Tensor | None] = [None] * 3
        if self._kind == _BF16:
            self._kind, words, *self._code = _packed(words, self.outputs, self.depth)
        self._words = (memory or Memory(0)).take(words.numel()).copy_(words)
        self.block = (
            *map(address, (self._words, self._scale, self._bias, *self._code)),
            *(self.outputs, self.depth, self._kind, int(gated)),
        )  # a `Packed` of csrc/linear_args.h, for blocks of arguments that contain one

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self._words, self._scale, self._bias, *self._code) if t is not None)

    def __call__(self, x: Tensor, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Multiplies rows.

        Args:
            x: `[R, K]` float32, bfloat16 or float16 on the CPU.
            residual: `[R, columns]` of the result's dtype, added before the result is rounded; or None, as of a gated matrix.
            dtype: of the result: float32, bfloat16 or float16; None: x's.

        Returns:
            `[R, columns]`.

        Raises:
            ValueError: another device, dtype or shape; a residual of a gated matrix.
        """
        if x.ndim != 2 or x.shape[1] != self.depth:
            raise ValueError(f"x: {list(x.shape)}; accepted: [rows, {self.depth}]")
        _check_rows("x", x)
        x = dense(x)
        out = torch.empty((x.shape[0], self.columns), dtype=_result_dtype(dtype or x.dtype))
        if residual is not None:
            if self.gated:
                raise ValueError("residual: of a gated matrix; accepted: None")
            if residual.shape != out.shape or residual.dtype != out.dtype or residual.device.type != "cpu":
                found = f"{list(residual.shape)} {residual.dtype} on {residual.device}"
                raise ValueError(f"residual: {found}; accepted: {list(out.shape)} {out.dtype} on the CPU")
            residual = dense(residual)
        _linear(*self.product(x, residual, out))
        return out

    def product(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> tuple[int, ...]:
        """The numbers of csrc's `Linear`, for x and a residual that are dense, and a contiguous result; None: float32, elsewhere."""
        residual_row, dtype = 0 if residual is None else residual.stride(0), 0 if out is None else dtype_of(out)
        sizes = x.shape[0], x.stride(0), residual_row, self.columns, dtype_of(x), dtype
        return (*self.block, address(x), address(residual), address(out), 0, *sizes)

    def rows(self, ids: Tensor, soft: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """W's rows, so that a tied head's matrix is the embedding table too; int8 weights as they are multiplied.

        Args:
            ids: int64 `[R]`; from N on, rows of `soft`.
            soft: `[P, K]` float32, bfloat16 or float16, or None.
            dtype: of the result.

        Returns:
            `[R, K]`.

        Raises:
            ValueError: a gated matrix, another device, dtype or shape, an id that names no row.
        """
        if self.gated:
            raise ValueError("rows: of a gated matrix; accepted: a plain one")
        if ids.ndim != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise ValueError(f"ids: {list(ids.shape)} {ids.dtype} on {ids.device}; accepted: [rows] int64 on the CPU")
        if soft is not None:
            if soft.ndim != 2 or soft.shape[1] != self.depth:
                raise ValueError(f"soft: {list(soft.shape)}; accepted: [rows, {self.depth}]")
            _check_rows("soft", soft)
            soft = dense(soft)
        many = self.outputs + (0 if soft is None else soft.shape[0])
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < many:
            raise ValueError(f"ids: {int(ids.min())} to {int(ids.max())}; accepted: 0 to {many - 1}")
        out, ids = torch.empty((ids.shape[0], self.depth), dtype=_result_dtype(dtype)), ids.contiguous()
        soft_row, soft_dtype = (0, 0) if soft is None else (soft.stride(0), dtype_of(soft))
        pointers = address(ids), address(soft), address(out)
        _unpack_rows(*self.block, *pointers, ids.shape[0], soft_row, soft_dtype, dtype_of(out))
        return out


def _packed(words: Tensor, outputs: int, depth: int) -> tuple[int, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The kind and the words of a bfloat16 matrix in as few bits as it takes, and what short ones have beside them."""
    for bits, kind in _GRIDS.items():
        if (grid := fit_grid(words, outputs, depth, bits)) is not None:
            return kind, grid, None, None, None
    short = shorten(words, outputs, depth)
    return (_BF16, words, None, None, None) if short is None else (_SHORT, *short)


def _check_rows(name: str, x: Tensor) -> None:
    if x.dtype not in _ROWS or x.device.type != "cpu":
        raise ValueError(f"{name}: {x.dtype} on {x.device}; accepted: float32, bfloat16, float16 on the CPU")


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _ROWS:
        raise ValueError(f"dtype: {dtype}; accepted: float32, bfloat16, float16")
    return dtype


def _check(weight: Tensor, bias: Tensor | None, quantization: str | None, gated: bool) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: {list(weight.shape)}; accepted: [outputs, inputs], none of them 0")
    _check_rows("weight", weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device.type != "cpu"):
        raise ValueError(f"bias: {list(bias.shape)} on {bias.device}; accepted: [{weight.shape[0]}] on the CPU")
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization: {quantization!r}; accepted: None, 'int8'")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"weight: {list(weight.shape)}, gated; accepted: an even number of outputs")
