"""GPUs that a plan can be made for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from uar_megatron.config import nearest
from uar_megatron.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and its links; bandwidths are of one GPU and one direction.

    Attributes:
        name: as in :data:`GPUS`.
        peak_flops: dense bf16 FLOP/s, the data sheet's figure without sparsity.
        memory: bytes.
        nvlink: bytes/s to the other GPUs of its node.
        network: bytes/s to GPUs of other nodes.
    """

    name: str
    peak_flops: float
    memory: float
    nvlink: float
    network: float


# The network is not the GPU's: one 400 Gb/s port per GPU (50 GB/s) as in DGX H100 and in the H800
# nodes of DeepSeek-V3 (arXiv 2412.19437, section 3.2: NVLink 160 GB/s, InfiniBand 50 GB/s, both as
# measured there); one 200 Gb/s port per GPU (25 GB/s) as in DGX A100. Other figures are half of the
# total NVLink bandwidth that NVIDIA's data sheets give.
GPUS: dict[str, Hardware] = {
    # A100 80GB SXM data sheet: 312 TFLOP/s, 80 GB, NVLink 600 GB/s in both directions together.
    "a100": Hardware("a100", 312e12, 80e9, 300e9, 25e9),
    # A800 80GB SXM: an A100 whose NVLink is cut to 400 GB/s.
    "a800": Hardware("a800", 312e12, 80e9, 200e9, 25e9),
    # H100 SXM data sheet: 989 TFLOP/s, 80 GB, NVLink 900 GB/s.
    "h100": Hardware("h100", 989e12, 80e9, 450e9, 50e9),
    # H800 SXM: an H100 whose NVLink is cut to 400 GB/s; 160 GB/s are measured (see above).
    "h800": Hardware("h800", 989e12, 80e9, 160e9, 50e9),
    # H200 SXM data sheet: 989 TFLOP/s, 141 GB, NVLink 900 GB/s.
    "h200": Hardware("h200", 989e12, 141e9, 450e9, 50e9),
    # H20: 148 TFLOP/s, 96 GB, NVLink 900 GB/s.
    "h20": Hardware("h20", 148e12, 96e9, 450e9, 50e9),
    # B200 of an HGX B200 (its data sheet over 8): 2250 TFLOP/s, 180 GB, NVLink 1800 GB/s.
    "b200": Hardware("b200", 2250e12, 180e9, 900e9, 50e9),
}


def hardware(
    name: str, nvlink_gbs: float | None = None, network_gbs: float | None = None
) -> Hardware:
    """Return a GPU of the table.

    Args:
        name: as in :data:`GPUS`, in any case.
        nvlink_gbs: GB/s per GPU and direction within a node, instead of the table's.
        network_gbs: the same between nodes.

    Raises:
        ConfigError: unknown GPU, or a bandwidth that is not positive and finite.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(
            "--gpu",
            f"{name!r} is not in the table of GPUs",
            allowed=", ".join(GPUS),
            remedy=nearest(name.lower(), GPUS),
        )
    for option, value in {"--nvlink-gbs": nvlink_gbs, "--network-gbs": network_gbs}.items():
        if value is not None and not 0 < value * 1e9 < math.inf:
            raise ConfigError(option, f"{value:g} is not allowed", allowed="more than 0, finite")
    return dataclasses.replace(
        found,
        nvlink=nvlink_gbs * 1e9 if nvlink_gbs else found.nvlink,
        network=network_gbs * 1e9 if network_gbs else found.network,
    )
