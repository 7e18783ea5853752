"""Codes and levels in vectors of sixteen: reading packed codes, looking up their levels, finding the nearest.

A look-up is a permutation within a register where the processor has one (AVX-512's ``vpermps``, AVX2's on halves), and a
tree of selections elsewhere; of more than sixteen levels it gathers from memory. Codes are read from bytes 32 bits at a
time, so that the group of sixteen that begins at code ``i`` (a multiple of 16) needs bytes ``[i * bits / 8, (i + 16) * bits
/ 8)`` and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from loftq.kernels.simd import FLOATS, INTS, LANES, constant, floats16, ints16, load, pointer, spread, undefined

_F32, _I64, _I32, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _permutation() -> str:
    """How this machine looks up levels: ``avx512``, ``avx2`` or ``select``."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return "avx512"
    return "avx2" if features.get("avx2") else "select"


PERMUTATION = _permutation()


def _codes_of(bits: int) -> Callable[..., Any]:
    """``codes(row, i)``: codes i to i + 15 of a packed row, each in the low bits of its lane; other bits are any."""

    @intrinsic
    def codes(typingctx: Any, row: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array, at = args

            def read(byte: Any, kind: ir.Type) -> Any:
                return load(builder, pointer(context, builder, signature.args[0], array, byte, kind), 1)

            if bits == 8:
                return builder.zext(read(at, ir.VectorType(_I8, LANES)), INTS)
            if bits == 2:
                word = spread(builder, read(builder.lshr(at, _I64(2)), _I32), INTS)
                return builder.lshr(word, constant(list(range(0, 32, 2))))
            if bits == 4:
                pair = ir.VectorType(_I32, 2)
                words = read(builder.lshr(at, _I64(1)), pair)
                words = builder.shuffle_vector(words, undefined(pair), constant([0] * 8 + [1] * 8))
                return builder.lshr(words, constant(list(range(0, 32, 4)) * 2))
            # six bytes: lanes 0 to 7 are in the first four of them, lanes 8 to 15 in the last four, a byte further up
            byte = builder.mul(builder.lshr(at, _I64(3)), _I64(3))
            words = builder.insert_element(undefined(INTS), read(byte, _I32), _I32(0))
            words = builder.insert_element(words, read(builder.add(byte, _I64(2)), _I32), _I32(1))
            words = builder.shuffle_vector(words, undefined(INTS), constant([0] * 8 + [1] * 8))
            return builder.lshr(words, constant([*range(0, 24, 3), *range(8, 32, 3)]))

        return ints16(row, types.int64), codegen

    return codes


codes_2bit, codes_3bit, codes_4bit, codes_8bit = (_codes_of(bits) for bits in (2, 3, 4, 8))


def lookup_by(permutation: str) -> Callable[..., Any]:
    """``lookup(table, codes)``: for each lane the entry of the table that the low four bits of its code name.

    A table of fewer levels repeats them, so that higher bits of a code need no masking.
    """

    @intrinsic
    def lookup(typingctx: Any, table: Any, codes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _LOOKUPS[permutation](builder, *args)

        return floats16(floats16, ints16), codegen

    return lookup


def _permute_512(builder: Any, table: Any, codes: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(function, [table, codes])


def _permute_256(builder: Any, table: Any, codes: Any) -> Any:
    half, halves = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)
    kind = ir.FunctionType(half, [half, halves])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    parts = [list(range(8)), list(range(8, 16))]
    low, high = (builder.shuffle_vector(table, undefined(FLOATS), constant(part)) for part in parts)
    found = []
    for part in parts:
        index = builder.shuffle_vector(codes, undefined(INTS), constant(part))
        upper = builder.icmp_unsigned("!=", builder.and_(index, constant([8] * 8)), constant([0] * 8))
        found.append(builder.select(upper, builder.call(function, [high, index]), builder.call(function, [low, index])))
    return builder.shuffle_vector(found[0], found[1], constant(list(range(LANES))))


def _select(builder: Any, table: Any, codes: Any) -> Any:
    level = [spread(builder, builder.extract_element(table, _I32(k)), FLOATS) for k in range(LANES)]
    for bit in (1, 2, 4, 8):
        is_set = builder.icmp_unsigned("!=", builder.and_(codes, constant([bit] * LANES)), constant([0] * LANES))
        level = [builder.select(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


_LOOKUPS = {"avx512": _permute_512, "avx2": _permute_256, "select": _select}
lookup16 = lookup_by(PERMUTATION)


def _gather(builder: Any, data: Any, codes: Any) -> Any:
    """For each lane the float32 number that lies so many places behind the pointer ``data``."""
    if PERMUTATION == "avx512":
        mask = ir.VectorType(ir.IntType(1), LANES)
        kind = ir.FunctionType(FLOATS, [FLOATS, data.type, INTS, mask, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.gather.dps.512")
        nothing, every = ir.Constant(FLOATS, [0.0] * LANES), ir.Constant(mask, [1] * LANES)
        return builder.call(function, [nothing, data, codes, every, _I32(4)])
    found = undefined(FLOATS)
    for lane in range(LANES):
        code = builder.zext(builder.extract_element(codes, _I32(lane)), _I64)
        found = builder.insert_element(found, builder.load(builder.gep(data, [code])), _I32(lane))
    return found


@intrinsic
def gather16(typingctx: Any, table: Any, codes: Any) -> Any:
    """For each lane the entry of a float32 array that its code names: for tables of more than sixteen levels."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _gather(builder, context.make_array(signature.args[0])(context, builder, args[0]).data, args[1])

    return floats16(table, ints16), codegen


def nearest_by(bits: int, permutation: str) -> Callable[..., Any]:
    """``nearest(borders, x)``: for each lane how many of the ascending 2^bits - 1 borders lie below its number.

    ``borders`` is a float32 array of at least 16, filled up with infinities. Where a look-up is a permutation the borders
    are searched by halves, elsewhere they are counted.
    """

    @intrinsic
    def nearest(typingctx: Any, borders: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind, number = signature.args[0], args[1]

            def above(code: Any, border: Any, step: int) -> Any:
                beyond = builder.fcmp_ordered(">", number, border)
                stepped = builder.add(code, constant([step] * LANES))
                return builder.select(beyond, stepped, code)

            code = constant([0] * LANES)
            permute: Callable[..., Any] = _gather
            if bits < 8:
                table = load(builder, pointer(context, builder, kind, args[0], _I64(0), FLOATS), 4)
                if permutation == "select":
                    for k in range(2**bits - 1):
                        code = above(code, spread(builder, builder.extract_element(table, _I32(k)), FLOATS), 1)
                    return code
                permute = _LOOKUPS[permutation]
            else:
                table = context.make_array(kind)(context, builder, args[0]).data
            for step in (2**b for b in range(bits - 1, -1, -1)):
                middle = builder.add(code, constant([step - 1] * LANES))
                code = above(code, permute(builder, table, middle), step)
            return code

        return ints16(borders, floats16), codegen

    return nearest


nearest_2bit, nearest_3bit, nearest_4bit, nearest_8bit = (nearest_by(bits, PERMUTATION) for bits in (2, 3, 4, 8))


@intrinsic
def store_codes16(typingctx: Any, array: Any, i: Any, codes: Any) -> Any:
    """Codes as elements i to i + 15 of a uint8 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_I8, LANES)
        target = pointer(context, builder, signature.args[0], args[0], args[1], kind)
        builder.store(builder.trunc(args[2], kind), target).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, ints16), codegen


def _load_levels_of(bits: int) -> Callable[..., Any]:
    """``load_levels(table)``: the 2^bits levels of a float32 array, repeated to sixteen."""

    @intrinsic
    def load_levels(typingctx: Any, table: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(_F32, 2**bits)
            found = load(builder, pointer(context, builder, signature.args[0], args[0], _I64(0), kind), 4)
            return builder.shuffle_vector(found, undefined(kind), constant([k % 2**bits for k in range(LANES)]))

        return floats16(table), codegen

    return load_levels


def chunk_dot_of(bits: int) -> Callable[..., Any]:
    """``chunk_dot(levels, row, byte, inputs, i)``: the levels of 64 packed bytes times their inputs, summed within lanes.

    The bytes are sixteen words, one a lane, of 32 / bits codes each: code k of all words is looked up at once, without
    taking a word apart. So ``inputs`` from ``i`` on has the first input of every word, then the second of every word, ...
    """

    @intrinsic
    def chunk_dot(typingctx: Any, levels: Any, row: Any, byte: Any, inputs: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, packed, byte, x, i = args
            words = load(builder, pointer(context, builder, signature.args[1], packed, byte, INTS), 1)
            add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), "llvm.fmuladd.v16f32"
            )
            sums = [ir.Constant(FLOATS, [0.0] * LANES)] * 2  # two, so that one need not wait for the other
            for k in range(32 // bits):
                at = builder.add(i, _I64(LANES * k))
                part = load(builder, pointer(context, builder, signature.args[3], x, at, FLOATS), 4)
                level = _LOOKUPS[PERMUTATION](builder, table, builder.lshr(words, constant([bits * k] * LANES)))
                sums[k % 2] = builder.call(add, [level, part, sums[k % 2]])
            return builder.fadd(*sums)

        return floats16(floats16, row, types.int64, inputs, types.int64), codegen

    return chunk_dot


def spread_scales_of(count: int) -> Callable[..., Any]:
    """``spread_scales(scales, r, b)``: ``count`` scales of row r from block b on, each in as many lanes as the others."""

    @intrinsic
    def spread_scales(typingctx: Any, scales: Any, r: Any, b: Any) -> Any:
        is_half = getattr(scales, "dtype", None) == types.uint16

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array, r, b = args
            kind = signature.args[0]
            columns = builder.extract_value(context.make_array(kind)(context, builder, array).shape, 1)
            index = builder.add(builder.mul(r, columns), b)
            stored = ir.VectorType(ir.HalfType() if is_half else _F32, count)
            found = load(builder, pointer(context, builder, kind, array, index, stored), 2)
            if is_half:
                found = builder.fpext(found, ir.VectorType(_F32, count))
            lanes = constant([lane * count // LANES for lane in range(LANES)])
            return builder.shuffle_vector(found, undefined(found.type), lanes)

        return floats16(scales, types.int64, types.int64), codegen

    return spread_scales


LOAD_LEVELS = {bits: _load_levels_of(bits) for bits in (2, 3, 4)}


def _values(bits: int) -> Callable[..., Any]:
    load_levels = LOAD_LEVELS[min(bits, 4)]

    @numba.njit(inline="always")
    def values(table: Any, codes: Any) -> Any:
        return lookup16(load_levels(table), codes)

    @numba.njit(inline="always")
    def values_8bit(table: Any, codes: Any) -> Any:
        return gather16(table, codes)

    return values_8bit if bits == 8 else values


VALUES = {bits: _values(bits) for bits in (2, 3, 4, 8)}
"""bits -> ``values(table, codes)``: the level of each lane's code, from a table of 2^bits."""
