"""D2's `portable` policy: a numeric format, and kernels of it for CPUs and for CUDA devices with equal bits.

The format, version `FORMAT_VERSION`, says for every operation which roundings happen in which order. How an
implementation splits the work into tiles, threads and vectors is its own affair. All arithmetic is IEEE 754 binary32,
rounded to nearest with ties to even, with denormals; "fma" rounds once. Operands in bf16 and fp16 are converted to fp32
(exactly), and results are rounded to their type once, at the end. float64 and complex numbers are not part of it. The
payload of a NaN is left open, and so is nothing else.

**Dot products** (matrix products, convolutions, attention). k ascends. Its values are cut into segments of 256 and
blocks of 4096. A segment is a chain ``s = fma(a[k], b[k], s)`` that starts at +0. A block is ``+0`` plus its segments,
added in ascending order; the result is ``+0`` plus the blocks, likewise. A batch of products is that many products.
For a convolution k runs over kernel positions in row-major order, then over the channels of the group, and padding is
zeros that are multiplied like other values; the input gradient is, for each kernel position, a product over output
channels, and starting from +0 the positions that exist are added in ascending order; the weight gradient is a product
whose k runs over images, then output positions. Where the kernel is 3x3, its steps are 1, there is one group and
``C * OC >= 32 * (C + OC)``, all three are those of Winograd's F(2x2, 3x3) instead (`winograd.py`). ``alpha``, ``beta``
and biases are separate roundings that follow.

**Sums** (sums, means, variances, norms, and what normalizations, softmax and losses need). The elements, in row-major
order of the summed dimensions, are cut into blocks of 4096. Element i of a block goes to lane i mod 128; a lane starts
at +0 and adds its elements in ascending order; then lanes l and l + 64 are added, then l and l + 32, and so on. The
blocks' sums are summed in the same way until one is left. What is summed is rounded before (``x * x``), never fused.
Products of elements multiply the first half with the second, until one is left; a last odd element waits for the next.

**Functions.** exp, expm1, log, log1p, tanh and erf are the programs in `functions.h`: argument reduction, polynomials
by Horner's scheme in fma (`coefficients.py`), exact scaling. Division and square root are rounded correctly. Sigmoid,
gelu, rsqrt and the like are formulas of these (`elementwise.py`).

**Additions into places** (index_add, scatter_add, gradients of embedding and indexing): a place adds its terms one by
one, in ascending order of their position.

**Random numbers.** Philox 4x32 with 10 rounds; the key is one 64-bit draw from torch's CPU generator per call, the
counter is the element's index divided by 4 and the word its remainder (`random.py`).

**Attention** is composed, in fp32, as torch's own path composes it: q and k times the root of the scale, a product, the
sum with the mask, softmax (0 where all keys are masked), dropout, a product. CUDA makes it in pieces (`attention.py`).

**Everything else** is made of operations that round once per element (`registry.py`: `EXACT`) in the order that the
modules here write them: `normalization.py`, `pooling.py`, `losses.py`, `elementwise.py`; an optimizer's step is the
sequence of operations that torch's own Python code asks for.

Why ``+0`` is written so often: a chain may underflow to -0; adding it to +0 makes the result independent of how many
zeros an implementation pads with.

The policy is in force inside `portable`. Operations that are neither of the format nor exact raise
`UnvettedOperationError`; `audit` lists what a model uses.
"""

from __future__ import annotations

from .dispatch import audit, portable, put_in_force
from .mode import PortableMode, UnvettedOperationError, common_paths, how_covered

__all__ = [
    "FORMAT_VERSION",
    "PortableMode",
    "UnvettedOperationError",
    "audit",
    "common_paths",
    "how_covered",
    "portable",
    "put_in_force",
]

FORMAT_VERSION = 3
"""Version of the format: a change that alters bits raises it."""
