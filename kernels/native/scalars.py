"""Scalar words for Numba-compiled kernels: raw memory, atomic counters, calls by address.

An address is an int64; the caller answers for what lies there.
"""

import ctypes

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


def _reader(kind: types.Type, llvm_kind: ir.Type):
    @intrinsic
    def read(typing, address):
        def codegen(context, builder, signature, values):
            return builder.load(builder.inttoptr(values[0], llvm_kind.as_pointer()), align=4)

        return kind(types.int64), codegen

    return read


read_int32 = _reader(types.int32, ir.IntType(32))
read_int64 = _reader(types.int64, ir.IntType(64))
read_float = _reader(types.float32, ir.FloatType())


@intrinsic
def write_float(typing, address, number):
    """Store an fp32 number."""

    def codegen(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], values[1].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def write_int32(typing, address, number):
    """Store an int32."""

    def codegen(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], values[1].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), codegen


@intrinsic
def write_int64(typing, address, number):
    """Store an int64."""

    def codegen(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], values[1].type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def write_int16(typing, address, number):
    """Store the low sixteen bits of an int64."""

    def codegen(context, builder, signature, values):
        kind = ir.IntType(16)
        builder.store(builder.trunc(values[1], kind), builder.inttoptr(values[0], kind.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typing, address, number):
    """Add to the int64 at `address`; gives what was there. Orders memory like a lock."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], values[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call(typing, address, arguments):
    """Call the kernel at `address` with a tuple of int64."""

    def codegen(context, builder, signature, values):
        operands = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), operands)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def enter_team(typing, parallel_address, function, data, num_threads):
    """GOMP_parallel(function, data, num_threads, 0): run `function(data)` on every thread of the team."""

    def codegen(context, builder, signature, values):
        parallel_address, function, data, num_threads = values
        unsigned = ir.IntType(32)
        operands = [function, data, builder.trunc(num_threads, unsigned), unsigned(0)]
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(builder.inttoptr(parallel_address, kind.as_pointer()), operands)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def field_access(structure: type[ctypes.Structure]):
    """Two intrinsics, `field(address, "name")` and `field_address(address, "name")`, for int64 fields."""

    def offset_of(name: types.StringLiteral) -> int:
        return getattr(structure, name.literal_value).offset

    @intrinsic(prefer_literal=True)
    def field(typing, address, name):
        if not isinstance(name, types.StringLiteral):
            return None

        def codegen(context, builder, signature, values):
            place = builder.add(values[0], values[0].type(offset_of(name)))
            return builder.load(builder.inttoptr(place, ir.IntType(64).as_pointer()), align=8)

        return types.int64(types.int64, name), codegen

    @intrinsic(prefer_literal=True)
    def field_address(typing, address, name):
        if not isinstance(name, types.StringLiteral):
            return None

        def codegen(context, builder, signature, values):
            return builder.add(values[0], values[0].type(offset_of(name)))

        return types.int64(types.int64, name), codegen

    return field, field_address
