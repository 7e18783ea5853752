"""Codes and levels in vectors of sixteen: reading packed codes, looking up their levels, finding the nearest.

A look-up is a permutation within a register where the processor has one (AVX-512's ``vpermps``, AVX2's on halves), and a
tree of selections elsewhere; of more than sixteen levels it gathers from memory. Codes are read from bytes 32 bits at a
time, so that the group of sixteen that begins at code ``i`` (a multiple of 16) needs bytes ``[i * bits / 8, (i + 16) * bits
/ 8)`` and no others.

The number of bits of a code is an argument's *type*: ``width`` is a tuple as long as a code has bits. So every width has loops
of its own, but functions of a module, not closures: numba keeps compiled closures on disk under names that differ in every
process, and so would never find them again.
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


WIDTHS = {bits: (0,) * bits for bits in (2, 3, 4, 8)}
"""bits -> what stands for them as an argument."""


@numba.njit(inline="always")
def row_of(levels: Any, r: Any) -> Any:
    """Levels, or the borders between them, of row r of a matrix: its own, or those of all rows."""
    return levels[min(r, levels.shape[0] - 1)]


@intrinsic
def codes16(typingctx: Any, width: Any, row: Any, i: Any) -> Any:
    """Codes i to i + 15 of a packed row, each in the low bits of its lane; other bits are any."""
    bits = width.count

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, array, at = args

        def read(byte: Any, kind: ir.Type) -> Any:
            return load(builder, pointer(context, builder, signature.args[1], array, byte, kind), 1)

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

    return ints16(width, row, types.int64), codegen


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
def levels16(typingctx: Any, width: Any, table: Any, codes: Any) -> Any:
    """The level of each lane's code, from a float32 array of 2^bits."""
    bits = width.count

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, array, codes = args
        kind = signature.args[1]
        if bits == 8:
            return _gather(builder, context.make_array(kind)(context, builder, array).data, codes)
        return _LOOKUPS[PERMUTATION](builder, _repeated(context, builder, kind, array, bits), codes)

    return floats16(width, table, ints16), codegen


def nearest_by(permutation: str) -> Callable[..., Any]:
    """``nearest(width, borders, x)``: for each lane how many of the ascending 2^bits - 1 borders lie below its number.

    ``borders`` is a float32 array of at least 16, filled up with infinities. Where a look-up is a permutation the borders
    are searched by halves, elsewhere they are counted.
    """

    @intrinsic
    def nearest(typingctx: Any, width: Any, borders: Any, x: Any) -> Any:
        bits = width.count

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, array, number = args
            kind = signature.args[1]

            def above(code: Any, border: Any, step: int) -> Any:
                beyond = builder.fcmp_ordered(">", number, border)
                stepped = builder.add(code, constant([step] * LANES))
                return builder.select(beyond, stepped, code)

            code = constant([0] * LANES)
            permute: Callable[..., Any] = _gather
            if bits < 8:
                table = load(builder, pointer(context, builder, kind, array, _I64(0), FLOATS), 4)
                if permutation == "select":
                    for k in range(2**bits - 1):
                        code = above(code, spread(builder, builder.extract_element(table, _I32(k)), FLOATS), 1)
                    return code
                permute = _LOOKUPS[permutation]
            else:
                table = context.make_array(kind)(context, builder, array).data
            for step in (2**b for b in range(bits - 1, -1, -1)):
                middle = builder.add(code, constant([step - 1] * LANES))
                code = above(code, permute(builder, table, middle), step)
            return code

        return ints16(width, borders, floats16), codegen

    return nearest


nearest16 = nearest_by(PERMUTATION)


@intrinsic
def store_codes16(typingctx: Any, array: Any, i: Any, codes: Any) -> Any:
    """Codes as elements i to i + 15 of a uint8 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_I8, LANES)
        target = pointer(context, builder, signature.args[0], args[0], args[1], kind)
        builder.store(builder.trunc(args[2], kind), target).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, ints16), codegen


def _repeated(context: Any, builder: Any, kind: Any, array: Any, bits: int) -> Any:
    """The 2^bits levels of a float32 array, repeated to sixteen."""
    stored = ir.VectorType(_F32, 2**bits)
    found = load(builder, pointer(context, builder, kind, array, _I64(0), stored), 4)
    return builder.shuffle_vector(found, undefined(stored), constant([k % 2**bits for k in range(LANES)]))


@intrinsic
def chunk_dot(typingctx: Any, width: Any, table: Any, row: Any, byte: Any, inputs: Any, i: Any) -> Any:
    """The levels of 64 packed bytes times their inputs, summed within lanes; for 2 and 4 bits.

    The bytes are sixteen words, one a lane, of 32 / bits codes each: code k of all words is looked up at once, without
    taking a word apart. So ``inputs`` from ``i`` on has the first input of every word, then the second of every word, ...
    """
    bits = min(4, width.count)  # of 8 bits, which have no chunks, it is compiled and never called

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, table, packed, byte, x, i = args
        levels = _repeated(context, builder, signature.args[1], table, bits)
        words = load(builder, pointer(context, builder, signature.args[2], packed, byte, INTS), 1)
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
        sums = [ir.Constant(FLOATS, [0.0] * LANES)] * 2  # two, so that one need not wait for the other
        for k in range(32 // bits):
            at = builder.add(i, _I64(LANES * k))
            part = load(builder, pointer(context, builder, signature.args[4], x, at, FLOATS), 4)
            level = _LOOKUPS[PERMUTATION](builder, levels, builder.lshr(words, constant([bits * k] * LANES)))
            sums[k % 2] = builder.call(add, [level, part, sums[k % 2]])
        return builder.fadd(*sums)

    return floats16(width, table, row, types.int64, inputs, types.int64), codegen


@intrinsic
def spread_scales(typingctx: Any, each: Any, scales: Any, r: Any, b: Any) -> Any:
    """As many scales of row r from block b on as the tuple ``each`` is long, each in as many lanes as the others."""
    count = each.count
    is_half = getattr(scales, "dtype", None) == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, array, r, b = args
        kind = signature.args[1]
        columns = builder.extract_value(context.make_array(kind)(context, builder, array).shape, 1)
        index = builder.add(builder.mul(r, columns), b)
        stored = ir.VectorType(ir.HalfType() if is_half else _F32, count)
        found = load(builder, pointer(context, builder, kind, array, index, stored), 2)
        if is_half:
            found = builder.fpext(found, ir.VectorType(_F32, count))
        lanes = constant([lane * count // LANES for lane in range(LANES)])
        return builder.shuffle_vector(found, undefined(found.type), lanes)

    return floats16(each, scales, types.int64, types.int64), codegen
