"""The dot interaction of DLRM in one kernel, for Hopper GPUs: all pairs of a sample's vectors.

One warp takes a sample at a time. It loads the vectors from GMEM into registers in the layout of
mma.m16n8k16's operands, where rows of the left matrix and columns of the right one are the same
words, so each element is loaded once; multiplies 16 x 8 blocks that meet the upper triangle;
puts that triangle in order in its own part of SMEM; and stores it 16 bytes at a time. A dot
product may add its elements in any order if both factors use the same one: a lane's 16 bytes serve
as two steps of k.

Per sample: vectors * dim items read, the output's items written; 2 * vectors^2 * dim FLOP on
tensor cores. Bound by memory.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mlp import PADDED_TO
from pallas_kernels.simt import MosaicSimt, Value, WarpSimt, minimum

DTYPES = ("bfloat16", "float16")
ITEM_BYTES = 2
WARP = 32
WARPGROUP_WARPS = 4
BLOCK = 8  # vectors that a register of a warp spans: rows of its 8 x 4 lanes
CHUNK = 32  # elements of a vector that its 4 lanes load at once, 16 bytes each
MOST_VECTORS = 32
MOST_DIM = 128
VECTOR_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class DotShape:
    """All that is static about one launch.

    warpgroups: per block, each of 4 warps. blocks: launched, one per SM.
    """

    samples: int
    vectors: int
    dim: int
    keep: int
    dtype: str
    warpgroups: int = 4
    blocks: int = 132

    @property
    def columns(self) -> int:
        """Of the output, up to a multiple of 64 as the next layer's weights are."""
        columns = self.keep + self.vectors * (self.vectors - 1) // 2
        return -(-columns // PADDED_TO) * PADDED_TO

    @property
    def pairs_bytes(self) -> int:
        """A warp's part of SMEM: the output's columns behind the kept ones."""
        return (self.columns - self.keep) * ITEM_BYTES

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warpgroups * WARPGROUP_WARPS


def takes(dtype: Any, vectors: int, dim: int, keep: int) -> bool:
    """Whether the kernel takes such an interaction; see `dot`."""
    fits = 2 <= vectors <= MOST_VECTORS and dim % CHUNK == 0 and 0 < dim <= MOST_DIM
    return str(dtype) in DTYPES and fits and keep % 8 == 0 and keep <= vectors * dim


def dot(
    x: Float[Array, "samples columns"],
    *,
    vectors: int,
    keep: int,
    precision: lax.Precision | None = None,
) -> Float[Array, "samples keep_and_pairs_up"]:
    """See reference.dot; sums are float32 at any `precision`. Zero columns follow up to a multiple
    of 64, as `mlp.dense` takes them.

    bfloat16 or float16, 2 to 32 vectors of a dim that is a multiple of 32 up to 128, `keep` a
    multiple of 8; ValueError else.
    """
    dim = x.shape[1] // vectors
    if x.shape[1] != vectors * dim or not takes(x.dtype, vectors, dim, keep):
        raise ValueError(f"no dot kernel for {vectors} vectors in {x.dtype}{x.shape}, keep {keep}")
    shape = DotShape(samples=len(x), vectors=vectors, dim=dim, keep=keep, dtype=str(x.dtype))
    if shape.samples == 0:
        return jnp.zeros((0, shape.columns), x.dtype)
    return launch(functools.partial(_body, shape=shape), shape, "dot_interaction")(x)


def launch(body: Callable[..., None], shape: DotShape, name: str) -> Callable[..., Array]:
    """A kernel of GMEM operands; `body` gets these, the output and SMEM for all warps' pairs."""
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.samples, shape.columns), jnp.dtype(shape.dtype)),
        scratch_types=[plgpu.SMEM((shape.warps * shape.pairs_bytes // 4,), jnp.int32)],
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=shape.warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
    )


def _body(x_gmem: Any, out_gmem: Any, pairs_smem: Any, *, shape: DotShape) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def per_thread(_, *refs):
        simt, (x_gmem, out_gmem, pairs_smem) = MosaicSimt(), refs
        thread = simt.thread()
        warp = thread // WARP
        dot_warp(
            *(simt, shape),
            x=simt.global_address(x_gmem),
            out=simt.global_address(out_gmem),
            pairs=simt.shared_address(pairs_smem) + warp * shape.pairs_bytes,
            first_sample=warp * shape.blocks + simt.block(),
            lane=thread % WARP,
        )

    per_thread(x_gmem, out_gmem, pairs_smem)


def dot_warp(
    simt: WarpSimt,
    shape: DotShape,
    *,
    x: Value,
    out: Value,
    pairs: Value,
    first_sample: Value,
    lane: Value,
) -> None:
    """What one warp does: its samples, from `first_sample` on."""
    warp = DotWarp(simt, shape, pairs, lane)
    warp.zero_pairs()

    def body(sample: Value) -> list[Value]:
        source = x + simt.wide(sample) * (shape.vectors * shape.dim * ITEM_BYTES)
        target = out + simt.wide(sample) * (shape.columns * ITEM_BYTES)
        words = [warp.load(source, block) for block in range(warp.blocks)]
        warp.write(words, source, target)
        return [sample + shape.warps * shape.blocks]

    simt.while_(lambda sample: sample < shape.samples, body, [first_sample])


class DotWarp:
    """One warp's work on a sample. Lane 4 * g + t holds row g of a block, columns 2t and 2t + 1."""

    def __init__(self, simt: WarpSimt, shape: DotShape, pairs: Value, lane: Value):
        self.simt, self.shape, self.pairs, self.lane = simt, shape, pairs, lane
        self.row, self.quad = lane // 4, lane % 4
        self.blocks = -(-shape.vectors // BLOCK)

    def zero_pairs(self) -> None:
        """The columns behind the last pair stay zero."""
        zeros = [self.simt.constant(0)] * 4
        for offset, mine in self._pieces(self.shape.pairs_bytes):
            self.simt.store_shared(self.pairs + offset, zeros, mine)
        self.simt.sync_warp()

    def write(self, words: list[list[Value]], kept_at: Value, target: Value) -> None:
        """A sample's columns at `target`: those at `kept_at`, and the pairs of its vectors, whose
        `words` are as `load` gives them, block by block.
        """
        kept = [
            (offset, mine, self._load_piece(kept_at, offset, self.shape.keep * ITEM_BYTES))
            for offset, mine in self._pieces(self.shape.keep * ITEM_BYTES)
        ]
        for row_block in range(0, self.blocks, 2):
            for column_block in range(row_block, self.blocks):
                self._put_pairs(row_block, column_block, words)
        self.simt.sync_warp()
        for offset, mine, piece in kept:
            self.simt.store(target + self.simt.wide(offset), piece, mine)
        behind_kept = target + self.shape.keep * ITEM_BYTES
        for offset, mine in self._pieces(self.shape.pairs_bytes):
            inside = minimum(self.simt, offset, self.simt.constant(self.shape.pairs_bytes - 16))
            piece = self.simt.load_shared(self.pairs + inside, 4)
            self.simt.store(behind_kept + self.simt.wide(offset), piece, mine)
        self.simt.sync_warp()

    def _pieces(self, size: int) -> list[tuple[Value, Value]]:
        """This lane's 16-byte pieces of `size` bytes: (offset, whether it is inside)."""
        offsets = [
            (self.lane + first) * VECTOR_BYTES for first in range(0, size // VECTOR_BYTES, WARP)
        ]
        return [(offset, offset < size) for offset in offsets]

    def _load_piece(self, source: Value, offset: Value, size: int) -> list[Value]:
        inside = minimum(self.simt, offset, self.simt.constant(size - VECTOR_BYTES))
        return self.simt.load_words(source + self.simt.wide(inside), 4)

    def load(self, source: Value, block: int) -> list[Value]:
        """This lane's words of its row of a block, of vectors side by side at `source`."""
        start = self.vector(block) * (self.shape.dim * ITEM_BYTES)
        places = [source + self.simt.wide(start + place) for place in self.places()]
        return [word for place in places for word in self.simt.load_words(place, 4)]

    def vector(self, block: int) -> Value:
        """Which vector this lane's row of a block is. Rows behind the last one repeat it: their
        products are not put anywhere.
        """
        last = self.simt.constant(self.shape.vectors - 1)
        return minimum(self.simt, self.row + block * BLOCK, last)

    def places(self) -> list[Value]:
        """Where in a vector this lane's words lie, in bytes: four for every chunk."""
        first = self.quad * VECTOR_BYTES
        return [first + chunk * ITEM_BYTES for chunk in range(0, self.shape.dim, CHUNK)]

    def _put_pairs(self, row_block: int, column_block: int, words: list[list[Value]]) -> None:
        """The dots of 16 vectors with 8, where they are pairs, into their places in SMEM."""
        upper, right = words[row_block], words[column_block]
        lower = words[min(row_block + 1, self.blocks - 1)]
        sums = [self.simt.float_constant(0.0)] * 4
        for k in range(0, len(upper), 2):
            left = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
            sums = self.simt.mma(left, right[k : k + 2], sums, self.shape.dtype)
        for index, total in enumerate(sums):
            row = self.row + (row_block * BLOCK + index // 2 * BLOCK)
            column = self.quad * 2 + (column_block * BLOCK + index % 2)
            pair = (row < column) & (column < self.shape.vectors)
            before = row * (self.simt.constant(2 * self.shape.vectors - 1) - row) // 2
            place = (before + column - row - 1) * ITEM_BYTES
            self.simt.store_shared_half(self.pairs + place, total, self.shape.dtype, pair)
