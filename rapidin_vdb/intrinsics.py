"""What compiled loops need of a processor and numba has no word for, made of LLVM's own instructions."""

import inspect
import platform
from typing import Any

import numpy as np

from rapidin_vdb.compiled import compiled

LANES = 8
"""Numbers in a vector: what AVX2 holds in float32; the compiler fits it to wider and narrower processors."""


def half_widener() -> Any:
    """Return a compiled function from the bits of a finite float16 number to float32, for use in other loops.

    Processors have an instruction for it, which numba has no word for; elsewhere it is done on the bits.
    """
    from llvmlite import binding, ir
    from numba import types
    from numba.extending import intrinsic

    def by_instruction(context, bits):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            return builder.fpext(builder.bitcast(values[0], ir.HalfType()), ir.FloatType())

        return types.float32(types.uint16), generate

    def on_bits(half):  # type: ignore[no-untyped-def]
        # Exponent and fraction moved to where float32 has them, then the difference of the two exponents' biases.
        bits = np.uint32(half)
        moved = ((bits & np.uint32(0x7FFF)) << np.uint32(13)) | ((bits & np.uint32(0x8000)) << np.uint32(16))
        return np.uint32(moved).view(np.float32) * np.float32(2.0**112)

    # Without the instruction, LLVM would call a library function that need not be there.
    if binding.get_host_cpu_features().get("f16c") or platform.machine() in ("aarch64", "arm64"):
        return intrinsic(inspect.unwrap(by_instruction))
    return compiled(on_bits)


def turner(*, squares: bool) -> Any:
    """Return a function that turns eight rows of eight numbers round, given by addresses.

    The rows begin `stride` numbers after one another, and from `rows` on the last is taken again. The result lies at
    `tile`, row by row. At `numbers` lie eight factors, one for each number of such a row; with `squares`, eight rows to
    which the squares of the numbers are added before they are turned.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def turn(context, source, stride, rows, tile, numbers):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            source, stride, rows, tile, numbers = values
            last = builder.sub(rows, rows.type(1))
            found = []
            for row in range(LANES):
                there = builder.icmp_signed("<", rows.type(row), rows)
                place = builder.mul(builder.select(there, rows.type(row), last), builder.mul(stride, stride.type(4)))
                found.append(builder.load(_vector_at(builder, builder.add(source, place)), align=4))
                if squares:
                    into = _vector_at(builder, builder.add(numbers, numbers.type(4 * LANES * row)))
                    square = builder.fmul(found[row], found[row])
                    builder.store(builder.fadd(builder.load(into, align=4), square), into, align=4)
            # Blocks off the diagonal change places: of four, of two, of one.
            for size in (4, 2, 1):
                lanes = range(LANES)
                kept = [lane if not lane & size else LANES + lane - size for lane in lanes]
                other = [lane + size if not lane & size else LANES + lane for lane in lanes]
                for row in lanes:
                    if not row & size:
                        pair = found[row], found[row + size]
                        for target, chosen in ((row, kept), (row + size, other)):
                            found[target] = builder.shuffle_vector(*pair, _numbers(chosen))
            if not squares:
                factors = builder.load(_vector_at(builder, numbers), align=4)
                found = [builder.fmul(one, factors) for one in found]
            for row in range(LANES):
                into = _vector_at(builder, builder.add(tile, tile.type(4 * LANES * row)))
                builder.store(found[row], into, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), generate

    def _numbers(values: list[int]) -> Any:
        return ir.Constant(ir.VectorType(ir.IntType(32), LANES), values)

    return intrinsic(inspect.unwrap(turn))


def lane_adder() -> Any:
    """Return a function that adds eight numbers at an address, all times one number, to eight at another."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def add(context, target, source, factor):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            target, source, factor = values
            target, source = _vector_at(builder, target), _vector_at(builder, source)
            none = ir.Constant(ir.VectorType(ir.FloatType(), LANES), ir.Undefined)
            lane = ir.IntType(32)
            one = builder.insert_element(none, factor, lane(0))
            all_lanes = builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(lane, LANES), [0] * LANES))
            product = builder.fmul(builder.load(source, align=4), all_lanes)
            builder.store(builder.fadd(builder.load(target, align=4), product), target, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return intrinsic(inspect.unwrap(add))


def _vector_at(builder: Any, address: Any) -> Any:
    """Return a pointer to eight numbers at an address."""
    from llvmlite import ir

    return builder.inttoptr(address, ir.VectorType(ir.FloatType(), LANES).as_pointer())
