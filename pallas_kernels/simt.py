"""Per-thread code inside a Mosaic GPU kernel: a few scalar operations, loads, stores, cp.async.

A tile function written against `Simt` says what one CUDA thread does. Here the operations emit
MLIR (and PTX where MLIR has no word for it); a test gives the same function a `Simt` that executes
it on the host. Addresses are integers: 64 bits in global memory, 32 bits in shared memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

FLOAT16_HALVES = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
FLOAT8_HALVES = (
    "{.reg .b16 l, h, a, b, c, d; .reg .b32 p, q; mov.b32 {l, h}, $4; "
    "cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h; mov.b32 {a, b}, p; mov.b32 {c, d}, q; "
    "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d;}"
)

Value = Any  # a Scalar here, a plain number in the host's version


@runtime_checkable
class CommonSimt(Protocol):
    """What every tile function may ask. `condition` and `where` are booleans."""

    def constant(self, value: int) -> Value: ...
    def equal(self, a: Value, b: Value) -> Value: ...
    def wide(self, value: Value) -> Value: ...
    def to_float(self, value: Value) -> Value: ...
    def float_constant(self, value: float) -> Value: ...
    def select(self, where: Value, yes: Value, no: Value) -> Value: ...
    def while_(
        self,
        condition: Callable[..., Value],
        body: Callable[..., Sequence[Value]],
        carry: Sequence[Value],
    ) -> list[Value]: ...
    def load_word(self, address: Value) -> Value: ...
    def load_shared(self, address: Value, words: int) -> list[Value]: ...
    def fma(self, a: Value, b: Value, c: Value) -> Value: ...
    def store(self, address: Value, words: Sequence[Value], where: Value) -> None: ...
    def unpack(self, word: Value, dtype: str) -> list[Value]: ...
    def pack(self, values: Sequence[Value], dtype: str) -> Value: ...
    def count_up(self, address: Value, where: Value) -> Value: ...
    def of_first_lane(self, value: Value) -> Value: ...  # all lanes of a warp come


@runtime_checkable
class Simt(CommonSimt, Protocol):
    """What a tile function may ask that is written for one thread."""

    def load_shared_float(self, address: Value) -> Value: ...
    def copy_async(self, target: Value, source: Value, size: int, where: Value) -> None: ...
    def commit(self) -> None: ...
    def wait(self, pending: int) -> None: ...


@runtime_checkable
class WarpSimt(CommonSimt, Protocol):
    """What a tile function may ask that is written for the lanes of warps in step. Where it says
    "together", all lanes of a warp have to come.
    """

    def load_words(self, address: Value, words: int) -> list[Value]: ...
    def load_words_if(self, address: Value, words: int, where: Value) -> list[Value]: ...
    def store_shared(self, address: Value, words: Sequence[Value], where: Value) -> None: ...
    def store_shared_half(self, address: Value, value: Value, dtype: str, where: Value) -> None: ...
    def sync_warp(self) -> None: ...  # together
    def sync_warpgroup(self) -> None: ...  # together, and all four warps
    def shuffle_xor(self, value: Value, lanes: int) -> Value: ...  # together
    def mma(  # together
        self, left: Sequence[Value], right: Sequence[Value], sums: Sequence[Value], dtype: str
    ) -> list[Value]: ...


class Scalar:
    """An MLIR integer or float with Python's operators; integers are signed."""

    def __init__(self, value: ir.Value):
        self.value = value

    @property
    def type(self) -> ir.Type:
        return self.value.type

    @property
    def is_float(self) -> bool:
        return isinstance(self.type, ir.F32Type)

    def _like(self, other: Any) -> ir.Value:
        return other.value if isinstance(other, Scalar) else arith.constant(self.type, other)

    def _binary(self, other: Any, integer: Any, floating: Any = None) -> "Scalar":
        build = floating if self.is_float else integer
        return Scalar(build(self.value, self._like(other)))

    def _compare(self, other: Any, predicate: arith.CmpIPredicate) -> "Scalar":
        return Scalar(arith.cmpi(predicate, self.value, self._like(other)))

    def __add__(self, other: Any) -> "Scalar":
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other: Any) -> "Scalar":
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other: Any) -> "Scalar":
        return self._binary(other, arith.muli, arith.mulf)

    def __truediv__(self, other: Any) -> "Scalar":
        return self._binary(other, None, arith.divf)

    def __floordiv__(self, other: Any) -> "Scalar":
        """For non-negative operands, where flooring and truncating agree."""
        return self._binary(other, arith.divui)

    def __mod__(self, other: Any) -> "Scalar":
        """For non-negative operands."""
        return self._binary(other, arith.remui)

    def __and__(self, other: Any) -> "Scalar":
        return self._binary(other, arith.andi)

    def __lt__(self, other: Any) -> "Scalar":
        return self._compare(other, arith.CmpIPredicate.slt)

    def __gt__(self, other: Any) -> "Scalar":
        return self._compare(other, arith.CmpIPredicate.sgt)


class MosaicSimt:
    """Emits the operations at MLIR's current insertion point."""

    def __init__(self) -> None:
        self._i16 = ir.IntegerType.get_signless(16)
        self._i32 = ir.IntegerType.get_signless(32)
        self._i64 = ir.IntegerType.get_signless(64)
        self._f32 = ir.F32Type.get()

    def global_address(self, ref: ir.Value) -> Scalar:
        """Where a GMEM ref's first element lies."""
        pointer = mgpu.utils.memref_ptr(ref)
        return Scalar(llvm.ptrtoint(self._i64, pointer))

    def shared_address(self, ref: ir.Value) -> Scalar:
        """Where an SMEM ref's first element lies, in the shared window."""
        pointer = mgpu.utils.memref_ptr(ref)
        return Scalar(llvm.ptrtoint(self._i32, pointer))

    def thread(self) -> Scalar:
        """Index of the thread in its block."""
        return Scalar(mgpu.utils.thread_idx())

    def block(self) -> Scalar:
        """Index of the block in the grid."""
        return Scalar(mgpu.utils.block_idx())

    def constant(self, value: int) -> Scalar:
        return Scalar(arith.constant(self._i32, value))

    def equal(self, a: Scalar, b: Any) -> Scalar:
        return a._compare(b, arith.CmpIPredicate.eq)

    def wide(self, value: Scalar) -> Scalar:
        return Scalar(arith.extsi(self._i64, value.value))

    def to_float(self, value: Scalar) -> Scalar:
        return Scalar(arith.sitofp(self._f32, value.value))

    def float_constant(self, value: float) -> Scalar:
        return Scalar(arith.constant(self._f32, value))

    def select(self, where: Scalar, yes: Scalar, no: Scalar) -> Scalar:
        return Scalar(arith.select(where.value, yes.value, no.value))

    def while_(
        self,
        condition: Callable[..., Scalar],
        body: Callable[..., Sequence[Scalar]],
        carry: Sequence[Scalar],
    ) -> list[Scalar]:
        types = [value.type for value in carry]
        loop = scf.WhileOp(types, [value.value for value in carry])
        locations = [ir.Location.unknown()] * len(types)
        before = loop.before.blocks.append(*types, arg_locs=locations)
        with ir.InsertionPoint(before):
            arguments = [Scalar(value) for value in before.arguments]
            scf.condition(condition(*arguments).value, before.arguments)
        after = loop.after.blocks.append(*types, arg_locs=locations)
        with ir.InsertionPoint(after):
            results = body(*(Scalar(value) for value in after.arguments))
            scf.yield_([value.value for value in results])
        return [Scalar(value) for value in loop.results]

    def _load(self, ptx: str, address: Scalar, types: list[ir.Type], *, pure: bool) -> list[Scalar]:
        loaded = mgpu.utils.inline_ptx(
            ptx, address.value, result_types=types, has_side_effects=not pure
        )
        return [Scalar(value) for value in loaded]

    def load_word(self, address: Scalar) -> Scalar:
        return self._load("ld.global.nc.b32 $0, [$1];", address, [self._i32], pure=True)[0]

    def load_words(self, address: Scalar, words: int) -> list[Scalar]:
        """2 or 4 words that lie side by side in global memory, aligned to their size."""
        names = ", ".join(f"${i}" for i in range(words))
        ptx = f"ld.global.nc.v{words}.b32 {{{names}}}, [${words}];"
        return self._load(ptx, address, [self._i32] * words, pure=True)

    def load_words_if(self, address: Scalar, words: int, where: Scalar) -> list[Scalar]:
        """1, 2 or 4 words that lie side by side in global memory; zeros where `where` is not."""
        names = [f"${i}" for i in range(words)]
        zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
        vector = f".v{words}" if words > 1 else ""
        target = f"{{{', '.join(names)}}}" if words > 1 else names[0]
        loaded = mgpu.utils.inline_ptx(
            f"{zeros} @${words + 1} ld.global.nc{vector}.b32 {target}, [${words}];",
            *(address.value, where.value),
            result_types=[self._i32] * words,
        )
        return [Scalar(value) for value in loaded]

    def load_shared(self, address: Scalar, words: int) -> list[Scalar]:
        if words == 1:
            return self._load("ld.shared.b32 $0, [$1];", address, [self._i32], pure=False)
        names = ", ".join(f"${i}" for i in range(words))
        ptx = f"ld.shared.v{words}.b32 {{{names}}}, [${words}];"
        return self._load(ptx, address, [self._i32] * words, pure=False)

    def load_shared_float(self, address: Scalar) -> Scalar:
        return self._load("ld.shared.f32 $0, [$1];", address, [self._f32], pure=False)[0]

    def fma(self, a: Scalar, b: Scalar, c: Scalar) -> Scalar:
        """a * b + c, rounded once."""
        operands = (a.value, b.value, c.value)
        ptx = "fma.rn.f32 $0, $1, $2, $3;"
        return Scalar(mgpu.utils.inline_ptx(ptx, *operands, result_types=self._f32))

    def store(self, address: Scalar, words: Sequence[Scalar], where: Scalar) -> None:
        self._store("global", address, words, where)

    def store_shared(self, address: Scalar, words: Sequence[Scalar], where: Scalar) -> None:
        self._store("shared", address, words, where)

    def _store(self, space: str, address: Scalar, words: Sequence[Scalar], where: Scalar) -> None:
        names = ", ".join(f"${i + 1}" for i in range(len(words)))
        mgpu.utils.inline_ptx(
            f"st.{space}.v{len(words)}.b32 [$0], {{{names}}};",
            address.value,
            *(self._as_word(word) for word in words),
            predicate=where.value,
        )

    def _as_word(self, value: Scalar) -> ir.Value:
        return arith.bitcast(self._i32, value.value) if value.is_float else value.value

    def store_shared_half(self, address: Scalar, value: Scalar, dtype: str, where: Scalar) -> None:
        """One float32 value, rounded to a 16-bit `dtype`."""
        kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        half = mgpu.utils.inline_ptx(
            f"cvt.rn.{kind}.f32 $0, $1;", value.value, result_types=self._i16
        )
        mgpu.utils.inline_ptx("st.shared.b16 [$0], $1;", address.value, half, predicate=where.value)

    def sync_warp(self) -> None:
        """What a warp's lanes wrote to SMEM is seen by all of them."""
        mgpu.utils.inline_ptx("bar.warp.sync 0xffffffff;", convergent=True)

    def sync_warpgroup(self) -> None:
        """What a warpgroup's threads wrote to SMEM is seen by all of them."""
        mgpu.utils.warpgroup_barrier()

    def shuffle_xor(self, value: Scalar, lanes: int) -> Scalar:
        """A float32 of the lane whose index differs from this one's by the bits of `lanes`."""
        ptx = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 0x1f, 0xffffffff;"
        moved = mgpu.utils.inline_ptx(ptx, value.value, result_types=self._f32, convergent=True)
        return Scalar(moved)

    def count_up(self, address: Scalar, where: Scalar) -> Scalar:
        """Adds one to an integer in global memory; what it was before, anything where not
        `where`.
        """
        before = mgpu.utils.inline_ptx(
            "mov.b32 $0, 0; @$2 atom.global.add.u32 $0, [$1], 1;",
            *(address.value, where.value),
            result_types=self._i32,
            has_side_effects=True,
        )
        return Scalar(before)

    def of_first_lane(self, value: Scalar) -> Scalar:
        """The integer that the warp's first lane has."""
        ptx = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
        moved = mgpu.utils.inline_ptx(ptx, value.value, result_types=self._i32, convergent=True)
        return Scalar(moved)

    def mma(
        self, left: Sequence[Scalar], right: Sequence[Scalar], sums: Sequence[Scalar], dtype: str
    ) -> list[Scalar]:
        """sums + left [16, 16] @ right [16, 8], spread over a warp as PTX's m16n8k16 has it."""
        kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        ptx = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        values = [value.value for value in (*left, *right, *sums)]
        types = [self._f32] * 4
        products = mgpu.utils.inline_ptx(ptx, *values, result_types=types, convergent=True)
        return [Scalar(value) for value in products]

    def copy_async(self, target: Scalar, source: Scalar, size: int, where: Scalar) -> None:
        cache = "cg" if size == 16 else "ca"  # bypassing L1 exists for 16 bytes alone
        mgpu.utils.inline_ptx(
            f"cp.async.{cache}.shared.global [$0], [$1], {size};",
            target.value,
            source.value,
            predicate=where.value,
        )

    def commit(self) -> None:
        mgpu.utils.inline_ptx("cp.async.commit_group;")

    def wait(self, pending: int) -> None:
        mgpu.utils.inline_ptx(f"cp.async.wait_group {pending};")

    def unpack(self, word: Scalar, dtype: str) -> list[Scalar]:
        """The float32 values of one 32-bit word."""
        if dtype == "float32":
            return [Scalar(arith.bitcast(self._f32, word.value))]
        if dtype == "bfloat16":
            low = arith.shli(word.value, arith.constant(self._i32, 16))
            high = (word & -65536).value
            return [Scalar(arith.bitcast(self._f32, half)) for half in (low, high)]
        if dtype == "int8":
            return self._unpack_int8(word)
        ptx = FLOAT8_HALVES if dtype == "float8_e4m3fn" else FLOAT16_HALVES
        return self._load(ptx, word, [self._f32] * (4 // jnp.dtype(dtype).itemsize), pure=True)

    def _unpack_int8(self, word: Scalar) -> list[Scalar]:
        """With its sign bit flipped, byte b is b + 128; as the last byte of 2^23 in float32 it is
        2^23 + b + 128, exactly.
        """
        flipped = arith.xori(word.value, arith.constant(self._i32, -0x7F7F7F80))
        power = arith.constant(self._i32, 0x4B000000)
        values = []
        for byte in range(4):
            # Bytes of the result, last first: `byte` of the word, 0, 0 and 0x4B of the power.
            ptx = f"prmt.b32 $0, $1, $2, {0x7440 + byte};"
            bits = mgpu.utils.inline_ptx(ptx, flipped, power, result_types=self._f32)
            values.append(Scalar(bits) - (2.0**23 + 128))
        return values

    def pack(self, values: Sequence[Scalar], dtype: str) -> Scalar:
        """One 32-bit word of float32 values rounded to nearest even."""
        if dtype == "float32":
            return values[0]
        kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
        low, high = values
        word = mgpu.utils.inline_ptx(
            f"cvt.rn.{kind}.f32 $0, $1, $2;", high.value, low.value, result_types=self._i32
        )
        return Scalar(word)


def minimum(simt: CommonSimt, a: Value, b: Value) -> Value:
    """The smaller of two integers."""
    return simt.select(a < b, a, b)
