"""Vectors of sixteen numbers for compiled loops: what numba's own vectoriser does not find.

Two numba types, ``floats16`` and ``ints16``, stand for LLVM vectors; loops are written in Python with the functions of this
module and of :mod:`loftq.kernels.simd_levels`, each of which is a few LLVM instructions. LLVM splits them for narrower
machines. Left to itself it would make gathers from memory of a look-up of levels, five to ten times slower, and would write
what is between two of its loops to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
_F32, _I64, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
FLOATS, INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class Vector(types.Type):
    """A numba type that is an LLVM vector."""


floats16 = Vector("floats16")
ints16 = Vector("ints16")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, FLOATS if kind.name == floats16.name else INTS)


def constant(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), [_I32(v) for v in values])


def undefined(kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, ir.Undefined)


def spread(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(undefined(kind), scalar, _I32(0))
    return builder.shuffle_vector(one, undefined(kind), constant([0] * LANES))


def pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, to: ir.Type) -> Any:
    """Where element ``index`` of an array's memory begins, as a pointer to another type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def load(builder: Any, pointer: Any, align: int) -> Any:
    value = builder.load(pointer)
    value.align = align
    return value


@intrinsic
def load16(typingctx: Any, array: Any, i: Any) -> Any:
    """Elements i to i + 15 of a float32 array's memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, pointer(context, builder, signature.args[0], args[0], args[1], FLOATS), 4)

    return floats16(array, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, i: Any) -> Any:
    """Ask for the memory of element ``i``, which may lie behind the array's end."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.PointerType(_I8)
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        address = pointer(context, builder, signature.args[0], args[0], args[1], _I8)
        builder.call(function, [address, _I32(0), _I32(3), _I32(1)])  # to read, into every cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def store16(typingctx: Any, array: Any, i: Any, value: Any) -> Any:
    """Elements i to i + 15 of an array, rounded to nearest even: float32; uint16 for bfloat16's bits, int16 for float16's."""
    stored_as = getattr(array, "dtype", None)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, i, vector = args
        kind, align = FLOATS, 4
        if stored_as == types.int16:
            kind, align = ir.VectorType(ir.HalfType(), LANES), 2
            vector = builder.fptrunc(vector, kind)
        elif stored_as == types.uint16:
            kind, align = ir.VectorType(_I16, LANES), 2
            raw = builder.bitcast(vector, INTS)
            upper = builder.lshr(raw, constant([16] * LANES))
            even = builder.add(builder.and_(upper, constant([1] * LANES)), constant([0x7FFF] * LANES))
            vector = builder.trunc(builder.lshr(builder.add(raw, even), constant([16] * LANES)), kind)
        stored = builder.store(vector, pointer(context, builder, signature.args[0], target, i, kind))
        stored.align = align
        return context.get_dummy_value()

    return types.void(array, types.int64, floats16), codegen


@intrinsic
def spread16(typingctx: Any, x: Any) -> Any:
    """The same float32 number in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return spread(builder, args[0], FLOATS)

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
def subtract16(typingctx: Any, a: Any, b: Any) -> Any:
    """a - b"""
    return floats16(floats16, floats16), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def divide16(typingctx: Any, a: Any, b: Any) -> Any:
    """a / b"""
    return floats16(floats16, floats16), lambda context, builder, signature, args: builder.fdiv(*args)


@intrinsic
def minimum16(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of a and b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return floats16(floats16, floats16), codegen


@intrinsic
def multiply_add16(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one rounding where the machine has it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), args)

    return floats16(floats16, floats16, floats16), codegen


def _halved(builder: Any, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All lanes joined into one number: the upper half with the lower, and so on."""
    for half in (8, 4, 2, 1):
        parts = [constant(list(range(begin, begin + half))) for begin in (0, half)]
        vector = join(*(builder.shuffle_vector(vector, undefined(vector.type), part) for part in parts))
    return builder.extract_element(vector, _I32(0))


@intrinsic
def sum16(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes, by halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _halved(builder, args[0], builder.fadd)

    return types.float32(floats16), codegen


@intrinsic
def smallest16(typingctx: Any, a: Any) -> Any:
    """The smallest of the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _halved(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered("<", x, y), x, y))

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
        value = load(builder, pointer(context, builder, kind, array, index, ir.HalfType() if is_half else _F32), 2)
        return builder.fpext(value, _F32) if is_half else value

    return types.float32(scales, types.int64, types.int64), codegen
