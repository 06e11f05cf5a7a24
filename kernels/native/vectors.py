"""Sixteen-lane fp32 vectors: the words that the native kernels are written in.

`Lanes` wraps an LLVM vector while code is generated: Python operators emit instructions, so a generator
reads like arithmetic. An address is an int64. Where the machine has no 512-bit registers LLVM splits every
operation; nothing here asks, and only `looked_up_in` needs AVX-512.

This module does not know what is computed with the vectors.
"""

import math

from llvmlite import ir
from numba.core import cgutils

NUM_LANES = 16
CACHE_LINE_BYTES = 64

_i16, _i32, _i64, _f16, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
_FLOATS = {_f16: "f16", _f32: "f32"}

# How a stored element becomes fp32. The numbers are part of the compiled kernels' names.
FP32, FP16, BF16 = 0, 1, 2
ELEMENT_BYTES = {FP32: 4, FP16: 2, BF16: 2}


# Taylor terms of 2**x = e**(x log 2): on [-1/2, 1/2] the first one left out is 5e-9.
_EXP2_TERMS = [math.log(2) ** n / math.factorial(n) for n in range(8)]


class Lanes:
    """An LLVM vector of fp32, int32 or (where a word says so) fp16 lanes; an operator emits its instruction.

    Constants on the right may be a number (every lane) or a list (lane by lane).
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.builder, self.value = builder, value

    @property
    def num_lanes(self) -> int:
        return self.value.type.count

    def _operand(self, other) -> ir.Value:
        if isinstance(other, Lanes):
            return other.value
        return constant(self.value.type, other)

    def _emit(self, name: str, other) -> "Lanes":
        prefix = "f" if self.value.type.element in _FLOATS and name in ("add", "sub", "mul", "div") else ""
        return Lanes(self.builder, getattr(self.builder, prefix + name)(self.value, self._operand(other)))

    def __add__(self, other):
        return self._emit("add", other)

    def __sub__(self, other):
        return self._emit("sub", other)

    def __mul__(self, other):
        return self._emit("mul", other)

    def __truediv__(self, other):
        return self._emit("div", other)

    def __lshift__(self, bits):
        return self._emit("shl", bits)

    def __rshift__(self, bits):
        """A logical shift: zeros come in from the left."""
        return self._emit("lshr", bits)

    def shifted_down(self, bits: int) -> "Lanes":
        """An arithmetic shift of int32 lanes: the sign comes in from the left."""
        return self._emit("ashr", bits)

    def __and__(self, other):
        return self._emit("and_", other)

    def __or__(self, other):
        return self._emit("or_", other)

    def __xor__(self, other):
        return self._emit("xor", other)

    def pick(self, lanes: list[int], other: "Lanes | None" = None) -> "Lanes":
        """The lanes named, in that order; numbers from `num_lanes` on mean `other`."""
        if other is None and lanes == list(range(self.num_lanes)):
            return self
        undefined = ir.Constant(self.value.type, ir.Undefined)
        order = ir.Constant(ir.VectorType(_i32, len(lanes)), lanes)
        second = undefined if other is None else other.value
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, second, order))

    def resized(self, num_lanes: int) -> "Lanes":
        """Cut to `num_lanes`, or filled up with zeros."""
        if num_lanes <= self.num_lanes:
            return self.pick(list(range(num_lanes)))
        zeros = Lanes(self.builder, constant(self.value.type, 0))
        return self.pick([min(lane, self.num_lanes) for lane in range(num_lanes)], zeros)

    def call(self, name: str, *others) -> "Lanes":
        """An LLVM intrinsic that takes and gives vectors of this type."""
        vector = self.value.type
        kind = f"v{vector.count}{_FLOATS.get(vector.element, 'i32')}"
        return self._call(f"llvm.{name}.{kind}", vector, [self, *others])

    def _call(self, symbol: str, returned: ir.Type, operands: list) -> "Lanes":
        values = [operand.value if isinstance(operand, Lanes) else operand for operand in operands]
        kind = ir.FunctionType(returned, [value.type for value in values])
        function = cgutils.get_or_insert_function(self.builder.module, kind, symbol)
        return Lanes(self.builder, self.builder.call(function, values))

    def times_plus(self, factor, term) -> "Lanes":
        """self * factor + term, rounded once."""
        return self.call("fma", *(Lanes(self.builder, self._operand(each)) for each in (factor, term)))

    def as_float(self) -> "Lanes":
        """The fp32 numbers equal to these int32 lanes."""
        return Lanes(self.builder, self.builder.sitofp(self.value, ir.VectorType(_f32, self.num_lanes)))

    def as_int(self) -> "Lanes":
        """The int32 lanes nearest to zero from these fp32 numbers."""
        return Lanes(self.builder, self.builder.fptosi(self.value, ir.VectorType(_i32, self.num_lanes)))

    def bits_as_float(self) -> "Lanes":
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(_f32, self.num_lanes)))

    def negative(self) -> "Lanes":
        return Lanes(self.builder, self.builder.fneg(self.value))

    def widened(self) -> "Lanes":
        """The fp32 numbers equal to these fp16 lanes."""
        return Lanes(self.builder, self.builder.fpext(self.value, ir.VectorType(_f32, self.num_lanes)))

    def larger(self, other: "Lanes") -> "Lanes":
        """The larger of each pair of lanes; `other` where either is NaN."""
        is_larger = self.builder.fcmp_ordered(">", self.value, other.value)
        return Lanes(self.builder, self.builder.select(is_larger, self.value, other.value))

    def smaller(self, other: "Lanes") -> "Lanes":
        """The smaller of each pair of lanes; `other` where either is NaN."""
        is_smaller = self.builder.fcmp_ordered("<", self.value, other.value)
        return Lanes(self.builder, self.builder.select(is_smaller, self.value, other.value))

    def where_zero(self, number: float) -> "Lanes":
        """These fp32 lanes with `number` in place of zeros."""
        is_zero = self.builder.fcmp_ordered("==", self.value, constant(self.value.type, 0.0))
        replaced = self.builder.select(is_zero, constant(self.value.type, number), self.value)
        return Lanes(self.builder, replaced)

    def sum(self) -> ir.Value:
        return self._folded(lambda low, high: low + high)

    def largest(self) -> ir.Value:
        return self._folded(lambda low, high: low.larger(high))

    def smallest(self) -> ir.Value:
        return self._folded(lambda low, high: low.smaller(high))

    def _folded(self, combine) -> ir.Value:
        """One scalar from all lanes, by halves. The lanes are a power of two."""
        lanes = self
        while lanes.num_lanes > 1:
            half = lanes.num_lanes // 2
            lanes = combine(lanes.pick(list(range(half))), lanes.pick(list(range(half, 2 * half))))
        return self.builder.extract_element(lanes.value, ir.Constant(_i32, 0))

    def rounded_to_half(self) -> "Lanes":
        """These fp32 lanes rounded to the nearest fp16 number, still as fp32."""
        halves = self.builder.fptrunc(self.value, ir.VectorType(ir.HalfType(), self.num_lanes))
        return Lanes(self.builder, self.builder.fpext(halves, self.value.type))

    def two_to_the(self) -> "Lanes":
        """2 ** self for lanes up to 127, within 2 units in the last place; below -126 it stays at 2 ** -126."""
        power = splat(self.builder, -126.0).larger(self)  # NaN stays NaN
        whole = power.call("rint")
        rest = power - whole
        result = splat(self.builder, _EXP2_TERMS[-1])
        for term in reversed(_EXP2_TERMS[:-1]):
            result = result.times_plus(rest, term)
        return result * ((whole.as_int() + 127) << 23).bits_as_float()

    def looked_up_in(self, table: "Lanes") -> "Lanes":
        """table[lane % 16] for every int32 lane, by one AVX-512 permutation."""
        return self._call("llvm.x86.avx512.permvar.sf.512", table.value.type, [table, self])

    def looked_up_in_quarters(self, table: "Lanes") -> "Lanes":
        """table[lane % 4] for a table that repeats every four lanes: as above, on more of the ports."""
        return self._call("llvm.x86.avx512.vpermilvar.ps.512", table.value.type, [table, self])


def constant(kind: ir.Type, number) -> ir.Constant:
    """`number` in every lane, or a list lane by lane."""
    numbers = list(number) if isinstance(number, (list, tuple)) else [number] * kind.count
    cast = float if kind.element in _FLOATS else int
    return ir.Constant(kind, [ir.Constant(kind.element, cast(each)) for each in numbers])


def at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    """A typed pointer to `address + offset` bytes."""
    if offset:
        address = builder.add(address, ir.Constant(_i64, offset))
    return builder.inttoptr(address, kind.as_pointer())


def prefetch(builder: ir.IRBuilder, address: ir.Value, num_bytes: int) -> None:
    """Ask for the cache lines of `num_bytes` from `address` on; any address is allowed."""
    flag = ir.IntType(32)
    byte_pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for offset in range(0, num_bytes, CACHE_LINE_BYTES):
        builder.call(function, [at(builder, address, ir.IntType(8), offset), flag(0), flag(2), flag(1)])


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.VectorType, mask: ir.Value | None) -> ir.Value:
    """Neighbouring elements; where `mask` (i1 lanes) is given and false, 0, and nothing is read."""
    num_bits = 32 if kind.element == _f32 else kind.element.width
    if mask is None:
        return builder.load(at(builder, address, kind), align=num_bits // 8)
    name = f"llvm.masked.load.v{kind.count}{'f' if kind.element == _f32 else 'i'}{num_bits}.p0"
    pointer = at(builder, address, kind)
    function_type = ir.FunctionType(kind, [pointer.type, _i32, mask.type, kind])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, [pointer, _i32(num_bits // 8), mask, constant(kind, 0)])


def load_floats(
    builder: ir.IRBuilder, address: ir.Value, count: int, *, element: int = FP32, mask: ir.Value | None = None
) -> Lanes:
    """`count` neighbouring elements as fp32, reading not one byte more; 0 where `mask` is false."""
    value = _load(builder, address, ir.VectorType(_f32 if element == FP32 else _i16, count), mask)
    floats = ir.VectorType(_f32, count)
    if element == BF16:
        return (Lanes(builder, builder.zext(value, ir.VectorType(_i32, count))) << 16).bits_as_float()
    if element == FP16:
        halves = builder.bitcast(value, ir.VectorType(ir.HalfType(), count))
        return Lanes(builder, builder.fpext(halves, floats))
    return Lanes(builder, value)


def load_words(
    builder: ir.IRBuilder, address: ir.Value, count: int, *, is_signed: bool = False, mask: ir.Value | None = None
) -> Lanes:
    """`count` neighbouring 16-bit words as int32 lanes; 0 where `mask` is false."""
    value = _load(builder, address, ir.VectorType(_i16, count), mask)
    extend = builder.sext if is_signed else builder.zext
    return Lanes(builder, extend(value, ir.VectorType(_i32, count)))


def load_halves(builder: ir.IRBuilder, address: ir.Value, count: int, offset: int = 0) -> Lanes:
    """`count` neighbouring fp16 numbers as they are: arithmetic on them rounds to fp16."""
    return Lanes(builder, builder.load(at(builder, address, ir.VectorType(_f16, count), offset), align=2))


def gather(builder: ir.IRBuilder, address: ir.Value, indices: Lanes, *, has_lookups: bool) -> Lanes:
    """The fp32 numbers at `address` with these sixteen int32 indices, by one instruction where AVX-512 has it."""
    kind = ir.VectorType(_f32, NUM_LANES)
    if has_lookups:
        every = ir.Constant(ir.VectorType(ir.IntType(1), NUM_LANES), [ir.Constant(ir.IntType(1), 1)] * NUM_LANES)
        pointer = at(builder, address, ir.IntType(8))
        operands = [constant(kind, 0), pointer, indices.value, every, _i32(4)]
        function_type = ir.FunctionType(kind, [operand.type for operand in operands])
        name = "llvm.x86.avx512.mask.gather.dps.512"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return Lanes(builder, builder.call(function, operands))
    value = constant(kind, 0)
    for lane in range(NUM_LANES):
        index = builder.zext(builder.extract_element(indices.value, _i32(lane)), _i64)
        place = builder.add(address, builder.mul(index, _i64(4)))
        value = builder.insert_element(value, builder.load(at(builder, place, _f32), align=4), _i32(lane))
    return Lanes(builder, value)


def broadcast(builder: ir.IRBuilder, value: ir.Value, num_lanes: int = NUM_LANES) -> Lanes:
    """A scalar in all lanes."""
    one = ir.Constant(ir.VectorType(value.type, num_lanes), ir.Undefined)
    first = builder.insert_element(one, value, ir.Constant(_i32, 0))
    return Lanes(builder, first).pick([0] * num_lanes)


def load_broadcast(builder: ir.IRBuilder, address: ir.Value, offset: int = 0) -> Lanes:
    """The fp32 number at `address + offset` in all sixteen lanes."""
    return broadcast(builder, builder.load(at(builder, address, _f32, offset), align=4))


def splat(builder: ir.IRBuilder, number, *, kind: ir.Type = _f32) -> Lanes:
    """A constant in all sixteen lanes, fp32 or `kind`, or a list of sixteen."""
    return Lanes(builder, constant(ir.VectorType(kind, NUM_LANES), number))


def store_floats(
    builder: ir.IRBuilder, lanes: Lanes, address: ir.Value, offset: int = 0, *, element: int = FP32
) -> None:
    """Write fp32 lanes as neighbouring elements at `address + offset`, rounded to nearest even."""
    value = lanes.value
    if element == FP16:
        value = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes.num_lanes))
    elif element == BF16:
        bits = Lanes(builder, builder.bitcast(value, ir.VectorType(_i32, lanes.num_lanes)))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = ((bits >> 16) | 0x40).value
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, quiet_nan, rounded.value)
        value = builder.trunc(chosen, ir.VectorType(_i16, lanes.num_lanes))
    builder.store(value, at(builder, address, value.type, offset), align=ELEMENT_BYTES[element])


def load_integers(builder: ir.IRBuilder, address: ir.Value, count: int) -> Lanes:
    """`count` neighbouring int32 numbers."""
    return Lanes(builder, builder.load(at(builder, address, ir.VectorType(_i32, count)), align=4))


def store_integers(builder: ir.IRBuilder, lanes: Lanes, address: ir.Value, offset: int = 0, *, bits: int = 32) -> None:
    """Write int32 lanes as neighbours at `address + offset`; of 16 bits, their low halves."""
    value = lanes.value
    if bits == 16:
        value = builder.trunc(value, ir.VectorType(_i16, lanes.num_lanes))
    builder.store(value, at(builder, address, value.type, offset), align=bits // 8)
