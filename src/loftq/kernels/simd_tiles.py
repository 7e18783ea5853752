"""A small matrix product whose sums stay in registers, and a small transpose: what :mod:`loftq.kernels.cpu_tiles` repeats.

    out[j, t] += sum over k of a[j, k] x[k, t],  j < height,  t < 16 · vectors

Each x[k] is loaded once for ``height`` rows, each a[j, k] once for all vectors, and is spread over the lanes. With 32
registers of sixteen numbers (AVX-512), 8 × 2 sums are under way at once, more than the latency of a multiplication needs;
with 16 of eight (AVX2) or 32 of four (NEON) it is 4 × 1.

The numbers are float32, or, where the processor multiplies them (AVX512_BF16), pairs of bfloat16 in 32 bits that follow each
other along k; the sums are float32 in both cases.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from loftq.kernels.simd import FLOATS, INTS, LANES, constant, floats16, load, pointer, spread
from loftq.kernels.simd_levels import PERMUTATION

_F32, _I64, _I32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
HEIGHT, VECTORS = (8, 2) if PERMUTATION == "avx512" else (4, 1)
"""Rows and vectors of the largest product."""
HEIGHTS, ONE, MANY = (0,) * HEIGHT, (0,), (0,) * VECTORS
"""What stands for them as an argument; see :mod:`loftq.kernels.simd_levels`."""
llvm.initialize_native_asmparser()
BFLOAT16 = bool(llvm.get_host_cpu_features().get("avx512bf16"))
"""Whether pairs of bfloat16 can be multiplied."""


@intrinsic
def multiply_tile(
    typingctx: Any,
    height: Any,
    vectors: Any,
    a: Any,
    a_at: Any,
    a_row: Any,
    a_step: Any,
    x: Any,
    x_at: Any,
    steps: Any,
    out: Any,
    out_at: Any,
) -> Any:
    """``out[out_at + 16 vectors j + t] += Σ_k a[a_at + a_row j + a_step k] x[x_at + 16 vectors k + t]``, k < steps > 0.

    ``a`` and ``x`` are contiguous arrays of float32, or of int32 with two bfloat16 each; ``out`` is float32.
    """
    rows, columns = height.count, vectors.count
    pairs = getattr(a, "dtype", None) == types.int32
    scalar, vector = (_I32, INTS) if pairs else (_F32, FLOATS)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, a, a_at, a_row, a_step, x, x_at, steps, out, out_at = args
        begin_a = pointer(context, builder, signature.args[2], a, a_at, scalar)
        begin_x = pointer(context, builder, signature.args[6], x, x_at, scalar)
        begin_out = pointer(context, builder, signature.args[9], out, out_at, _F32)
        before = builder.block
        loop = builder.append_basic_block("tile")
        after = builder.append_basic_block("tile.end")
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(_I64(0), before)
        sums = [[builder.phi(FLOATS) for _ in range(columns)] for _ in range(rows)]
        at_x = builder.gep(begin_x, [builder.mul(k, _I64(LANES * columns))])
        at_a = builder.gep(begin_a, [builder.mul(k, a_step)])
        inputs = [
            load(builder, builder.bitcast(builder.gep(at_x, [_I64(LANES * v)]), vector.as_pointer()), 4)
            for v in range(columns)
        ]
        grown = []
        for j in range(rows):
            number = load(builder, builder.gep(at_a, [builder.mul(a_row, _I64(j))]), 4)
            factor = spread(builder, number, vector)
            grown.append([_added(builder, pairs, factor, inputs[v], sums[j][v]) for v in range(columns)])
        next_k = builder.add(k, _I64(1))
        builder.cbranch(builder.icmp_signed("<", next_k, steps), loop, after)
        k.add_incoming(next_k, loop)
        for row, grown_row in zip(sums, grown, strict=True):
            for found, more in zip(row, grown_row, strict=True):
                found.add_incoming(ir.Constant(FLOATS, [0.0] * LANES), before)
                found.add_incoming(more, loop)

        builder.position_at_end(after)
        for j in range(rows):
            for v in range(columns):
                place = builder.gep(begin_out, [_I64(LANES * (j * columns + v))])
                place = builder.bitcast(place, FLOATS.as_pointer())
                stored = builder.store(builder.fadd(load(builder, place, 4), grown[j][v]), place)
                stored.align = 4
        return context.get_dummy_value()

    places = (a, types.int64, types.int64, types.int64, x, types.int64, types.int64, out, types.int64)
    return types.void(height, vectors, *places), codegen


def _added(builder: Any, pairs: bool, factor: Any, inputs: Any, total: Any) -> Any:
    if pairs:  # LLVM's own function for it wants vectors of bfloat16, which llvmlite has no name for
        kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
        return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, inputs, factor], False)
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
    return builder.call(function, [factor, inputs, total])


@intrinsic
def transpose16(
    typingctx: Any, source: Any, at: Any, pitch: Any, target: Any, target_at: Any, target_pitch: Any
) -> Any:
    """``target[target_at + target_pitch i + j] = source[at + pitch j + i]`` for i, j < 16, of arrays of 32 bits a number.

    Halves of rows are exchanged between the two rows whose numbers differ in one bit, for every bit.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, pitch, target, target_at, target_pitch = args

        def place(kind: Any, array: Any, first: Any, pitch: Any, i: int) -> Any:
            return pointer(context, builder, kind, array, builder.add(first, builder.mul(pitch, _I64(i))), INTS)

        rows = [load(builder, place(signature.args[0], source, at, pitch, j), 4) for j in range(LANES)]
        for bit in (8, 4, 2, 1):
            low = constant([lane if not lane & bit else lane - bit + LANES for lane in range(LANES)])
            high = constant([lane + bit if not lane & bit else lane + LANES for lane in range(LANES)])
            for j in (j for j in range(LANES) if not j & bit):
                pair = rows[j], rows[j | bit]
                rows[j], rows[j | bit] = (builder.shuffle_vector(*pair, part) for part in (low, high))
        for i in range(LANES):
            stored = builder.store(rows[i], place(signature.args[3], target, target_at, target_pitch, i))
            stored.align = 4
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64, types.int64), codegen


@intrinsic
def store_pairs16(typingctx: Any, array: Any, i: Any, low: Any, high: Any) -> Any:
    """int32 elements i to i + 15: in each two bfloat16, rounded to nearest even, of ``low`` in the lower half."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i, low, high = args

        def spread_int(value: int) -> Any:
            return ir.Constant(INTS, [_I32(value)] * LANES)

        def rounded(vector: Any) -> Any:
            raw = builder.bitcast(vector, INTS)
            odd = builder.and_(builder.lshr(raw, spread_int(16)), spread_int(1))
            return builder.add(raw, builder.add(odd, spread_int(0x7FFF)))

        lower = builder.lshr(rounded(low), spread_int(16))
        upper = builder.and_(rounded(high), spread_int(0xFFFF0000))
        place = pointer(context, builder, signature.args[0], array, i, INTS)
        stored = builder.store(builder.or_(lower, upper), place)
        stored.align = 4
        return context.get_dummy_value()

    return types.void(array, types.int64, floats16, floats16), codegen
