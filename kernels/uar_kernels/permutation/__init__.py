"""Copy each token to its experts' rows, and add the rows of each token up again."""

from uar_kernels.permutation.bytes import minimum_bytes, moved_bytes
from uar_kernels.permutation.op import Permuted, begin_permute, permute, unpermute

__all__ = [
    "Permuted",
    "begin_permute",
    "minimum_bytes",
    "moved_bytes",
    "permute",
    "unpermute",
]
