"""Vectors of sixteen numbers for compiled loops: what numba's own vectoriser does not find.

Unpacking codes and looking up their levels is a shift and a permutation within a register where the processor has one
(AVX-512's ``vpermps``, AVX2's on halves), and a tree of selections elsewhere. LLVM would make gathers from memory of it,
five to ten times slower. Two numba types, ``floats16`` and ``ints16``, stand for LLVM vectors; loops are written in Python
with the functions of this module, each of which is a few LLVM instructions. LLVM splits them for narrower machines.

Codes are read from bytes 32 bits at a time, so that the group of sixteen that begins at code ``i`` (a multiple of 16) needs
bytes ``[i * bits / 8, (i + 16) * bits / 8)`` and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
_F32, _I64, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class Vector(types.Type):
    """A numba type that is an LLVM vector."""


floats16 = Vector("floats16")
ints16 = Vector("ints16")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _FLOATS if kind.name == floats16.name else _INTS)


def _permutation() -> str:
    """How this machine looks up levels: ``avx512``, ``avx2`` or ``select``."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return "avx512"
    return "avx2" if features.get("avx2") else "select"


PERMUTATION = _permutation()


def _constant(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), [_I32(v) for v in values])


def _undefined(kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, ir.Undefined)


def _spread(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(_undefined(kind), scalar, _I32(0))
    return builder.shuffle_vector(one, _undefined(kind), _constant([0] * LANES))


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, to: ir.Type) -> Any:
    """Where element ``index`` of an array's memory begins, as a pointer to another type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load(builder: Any, pointer: Any, align: int) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


def _codes_of(bits: int) -> Callable[..., Any]:
    """``codes(row, i)``: codes i to i + 15 of a packed row, each in the low bits of its lane; other bits are any."""

    @intrinsic
    def codes(typingctx: Any, row: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array, at = args

            def read(byte: Any, kind: ir.Type) -> Any:
                return _load(builder, _pointer(context, builder, signature.args[0], array, byte, kind), 1)

            if bits == 8:
                return builder.zext(read(at, ir.VectorType(_I8, LANES)), _INTS)
            if bits == 2:
                word = _spread(builder, read(builder.lshr(at, _I64(2)), _I32), _INTS)
                return builder.lshr(word, _constant(list(range(0, 32, 2))))
            if bits == 4:
                pair = ir.VectorType(_I32, 2)
                words = read(builder.lshr(at, _I64(1)), pair)
                words = builder.shuffle_vector(words, _undefined(pair), _constant([0] * 8 + [1] * 8))
                return builder.lshr(words, _constant(list(range(0, 32, 4)) * 2))
            # six bytes: lanes 0 to 7 are in the first four of them, lanes 8 to 15 in the last four, a byte further up
            byte = builder.mul(builder.lshr(at, _I64(3)), _I64(3))
            words = builder.insert_element(_undefined(_INTS), read(byte, _I32), _I32(0))
            words = builder.insert_element(words, read(builder.add(byte, _I64(2)), _I32), _I32(1))
            words = builder.shuffle_vector(words, _undefined(_INTS), _constant([0] * 8 + [1] * 8))
            return builder.lshr(words, _constant([*range(0, 24, 3), *range(8, 32, 3)]))

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
            return {"avx512": _permute_512, "avx2": _permute_256, "select": _select}[permutation](builder, *args)

        return floats16(floats16, ints16), codegen

    return lookup


def _permute_512(builder: Any, table: Any, codes: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(function, [table, codes])


def _permute_256(builder: Any, table: Any, codes: Any) -> Any:
    half, halves = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)
    kind = ir.FunctionType(half, [half, halves])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    parts = [list(range(8)), list(range(8, 16))]
    low, high = (builder.shuffle_vector(table, _undefined(_FLOATS), _constant(part)) for part in parts)
    found = []
    for part in parts:
        index = builder.shuffle_vector(codes, _undefined(_INTS), _constant(part))
        upper = builder.icmp_unsigned("!=", builder.and_(index, _constant([8] * 8)), _constant([0] * 8))
        found.append(builder.select(upper, builder.call(function, [high, index]), builder.call(function, [low, index])))
    return builder.shuffle_vector(found[0], found[1], _constant(list(range(LANES))))


def _select(builder: Any, table: Any, codes: Any) -> Any:
    level = [_spread(builder, builder.extract_element(table, _I32(k)), _FLOATS) for k in range(LANES)]
    for bit in (1, 2, 4, 8):
        is_set = builder.icmp_unsigned("!=", builder.and_(codes, _constant([bit] * LANES)), _constant([0] * LANES))
        level = [builder.select(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


lookup16 = lookup_by(PERMUTATION)


@intrinsic
def gather16(typingctx: Any, table: Any, codes: Any) -> Any:
    """For each lane the entry of a float32 array that its code names: for tables of more than sixteen levels."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        if PERMUTATION == "avx512":
            mask = ir.VectorType(ir.IntType(1), LANES)
            kind = ir.FunctionType(_FLOATS, [_FLOATS, data.type, _INTS, mask, _I32])
            name = "llvm.x86.avx512.mask.gather.dps.512"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            nothing, every = ir.Constant(_FLOATS, [0.0] * LANES), ir.Constant(mask, [1] * LANES)
            return builder.call(function, [nothing, data, args[1], every, _I32(4)])
        found = _undefined(_FLOATS)
        for lane in range(LANES):
            code = builder.zext(builder.extract_element(args[1], _I32(lane)), _I64)
            found = builder.insert_element(found, builder.load(builder.gep(data, [code])), _I32(lane))
        return found

    return floats16(table, ints16), codegen


@intrinsic
def load16(typingctx: Any, array: Any, i: Any) -> Any:
    """Elements i to i + 15 of a float32 array's memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _pointer(context, builder, signature.args[0], args[0], args[1], _FLOATS), 4)

    return floats16(array, types.int64), codegen


@intrinsic
def store16(typingctx: Any, array: Any, i: Any, value: Any) -> Any:
    """Elements i to i + 15 of an array, rounded to nearest even: float32; uint16 for bfloat16's bits, int16 for float16's."""
    stored_as = getattr(array, "dtype", None)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, i, vector = args
        kind, align = _FLOATS, 4
        if stored_as == types.int16:
            kind, align = ir.VectorType(ir.HalfType(), LANES), 2
            vector = builder.fptrunc(vector, kind)
        elif stored_as == types.uint16:
            kind, align = ir.VectorType(_I16, LANES), 2
            raw = builder.bitcast(vector, _INTS)
            upper = builder.lshr(raw, _constant([16] * LANES))
            even = builder.add(builder.and_(upper, _constant([1] * LANES)), _constant([0x7FFF] * LANES))
            vector = builder.trunc(builder.lshr(builder.add(raw, even), _constant([16] * LANES)), kind)
        stored = builder.store(vector, _pointer(context, builder, signature.args[0], target, i, kind))
        stored.align = align
        return context.get_dummy_value()

    return types.void(array, types.int64, floats16), codegen


@intrinsic
def spread16(typingctx: Any, x: Any) -> Any:
    """The same float32 number in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _FLOATS)

    return floats16(types.float32), codegen


@intrinsic
def multiply16(typingctx: Any, a: Any, b: Any) -> Any:
    """a * b"""
    return floats16(floats16, floats16), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def add16(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b"""
    return floats16(floats16, floats16), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def multiply_add16(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one rounding where the machine has it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), args)

    return floats16(floats16, floats16, floats16), codegen


@intrinsic
def sum16(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes, by halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0]
        for half in (8, 4, 2, 1):
            parts = [_constant(list(range(begin, begin + half))) for begin in (0, half)]
            vector = builder.fadd(*(builder.shuffle_vector(vector, _undefined(vector.type), part) for part in parts))
        return builder.extract_element(vector, _I32(0))

    return types.float32(floats16), codegen


@intrinsic
def scale_at(typingctx: Any, scales: Any, r: Any, b: Any) -> Any:
    """``scales[r, b]`` of a contiguous array as float32; of uint16, which holds float16's bits."""
    is_half = getattr(scales, "dtype", None) == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, r, b = args
        kind = signature.args[0]
        columns = builder.extract_value(context.make_array(kind)(context, builder, array).shape, 1)
        index = builder.add(builder.mul(r, columns), b)
        value = _load(builder, _pointer(context, builder, kind, array, index, ir.HalfType() if is_half else _F32), 2)
        return builder.fpext(value, _F32) if is_half else value

    return types.float32(scales, types.int64, types.int64), codegen
