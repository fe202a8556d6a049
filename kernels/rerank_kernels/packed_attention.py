"""A transformer's attention of each of many packed texts to itself: softmax((q + q_bias) kᵀ / √(d / heads)) v, head by head.

It is a CPU operator: most texts in reranking are short, and padding them, or a call for each text, costs more than their
attention. There is no Triton kernel. On a GPU padded batches run torch's fused attention, and the definition answers here.
"""

from __future__ import annotations

from torch import Tensor

from . import backend, checks, cpu, reference
from .ambient import exact


def packed_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, heads: int, q_bias: Tensor | None = None) -> Tensor:
    """Each text's queries attend to its own keys: softmax((q + q_bias) kᵀ / √(d / heads)) v, head by head.

    Biases of k and v can be left out: one of k moves all scores of a query alike, which softmax undoes, and one of v can be added
    to the result.

    Args:
        q: nnz_q × d, any float type; rows may be wider apart than d, as those of a slice of columns are.
        k, v: nnz_k × d, of q's type and device.
        q_offsets, k_offsets: B + 1, int64: text b owns the rows offsets[b] to offsets[b + 1].
        heads: a divisor of d; head h has the d / heads columns from h · d / heads on.
        q_bias: d, of q's type; None: 0.

    Returns:
        nnz_q × d of q's type. Queries of a text without keys get 0. A NaN in a text reaches no other.

    Raises:
        ValueError: arguments that do not fit. MemoryError: no memory for a thread's working space.
    """
    if q.ndim != 2 or k.ndim != 2 or k.shape != v.shape or q.shape[1] != k.shape[1]:
        raise ValueError(f"k and v must be matrices as wide as q, not {tuple(k.shape)}")
    if heads <= 0 or q.shape[1] % heads:
        raise ValueError(f"heads must be a divisor of {q.shape[1]}, not {heads}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must be of one float type, not {q.dtype}, {k.dtype}, {v.dtype}")
    checks.same_device(q=q, k=k, v=v, q_offsets=q_offsets, k_offsets=k_offsets, q_bias=q_bias)
    checks.offsets("q_offsets", q_offsets)
    checks.offsets("k_offsets", k_offsets, len(q_offsets) - 1)
    if q_bias is not None and (q_bias.shape != q.shape[1:] or q_bias.dtype != q.dtype):
        raise ValueError(f"q_bias must be {q.dtype} of length {q.shape[1]}, not {q_bias.dtype} of shape {tuple(q_bias.shape)}")
    on_cpu = backend.resolve(q) == "cpu"
    if on_cpu and (found := cpu.native_packed_attention(q, k, v, q_offsets, k_offsets, heads, q_bias)) is not None:
        return found
    checks.rising(("q_offsets", q_offsets, len(q)), ("k_offsets", k_offsets, len(k)))
    with exact(tensors=False):
        return (cpu.torch_packed_attention if on_cpu else reference.packed_attention)(q, k, v, q_offsets, k_offsets, heads, q_bias)
