"""The fused kernels in the layer, in Triton's interpreter, against the layer in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import hidden_states, stock_layer, transformer_config, uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.kernels import uses_kernels
from uar_megatron.mcore.step import commit

pytestmark = pytest.mark.usefixtures("model_parallel")

LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.01, 0.02, 0.03],
    "moe_z_loss_coeff": 0.1,
}
CLB = {"enabled": True, "start_step": 1, "warmup_steps": 0, "theta": 0.2, "theta_start": 0.0}
BIAS = {"enabled": True, "rate": 0.05}
FREE = {"alpha": 1.5, "beta": 2.5, "k_max": 5, "k_min": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "free": ({"budget": FREE}, {}),
    "losses": ({"budget": FREE, "clb": CLB}, LOSSES),
    "one loss": ({"budget": FREE, "clb": CLB}, {}),
    "bias and mask": ({"budget": FREE, "clb": CLB, "bias": BIAS}, LOSSES),
    "mask in absolute units": (
        {"budget": FREE, "clb": {**CLB, "units": "absolute", "theta": -2.0, "theta_start": -2.5}},
        LOSSES,
    ),
    "pre-softmax": ({"budget": FREE, "clb": CLB}, {"moe_router_pre_softmax": True}),
    "sigmoid": ({"budget": FREE, "bias": BIAS}, {"moe_router_score_function": "sigmoid"} | LOSSES),
    "scaling": ({"budget": FREE}, {"moe_router_topk_scaling_factor": 2.5}),
    "entropy at another temperature": (
        {"budget": FREE, "clb": CLB, "uncertainty": "entropy", "temperature": 0.5},
        LOSSES,
    ),
    "mean": ({"budget": {**FREE, "mode": "mean", "target_mean_k": 2.5}}, LOSSES),
    "exact": ({"budget": {"mode": "exact", "alpha": 1.5}, "clb": CLB}, LOSSES),
    "bounded rows": ({"budget": {**FREE, "max_rows_factor": 1.0}, "clb": CLB}, LOSSES),
    "batch statistics": ({"budget": FREE, "statistics": {"mode": "batch"}, "clb": CLB}, LOSSES),
    "ramp": ({"budget": FREE, "expansion": {"start_step": 1, "ramp_steps": 4}}, LOSSES),
    "top-k under the mask": ({"policy": "topk", "clb": CLB, "bias": BIAS}, LOSSES),
    "Megatron's bias": (
        {"budget": FREE},
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    ),
    "all-gather": ({"budget": FREE}, {"moe_token_dispatcher_type": "allgather"}),
    "grouped GEMM": ({"budget": FREE}, {"moe_grouped_gemm": True}),
    "shared experts": (
        {"budget": FREE},
        {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_overlap": True},
    ),
    "bf16": ({"budget": FREE, "clb": CLB}, {"moe_router_dtype": None}),
}


def train_layer(
    uar: dict[str, Any], options: dict[str, Any], backend: str, padded: bool
) -> dict[str, torch.Tensor]:
    """Two steps of two micro-batches; everything that a step leaves behind."""
    config = transformer_config(**options)
    section = {"policy": "uar", **uar, "kernel_backend": backend}
    layer = uar_layer(config, section, like=stock_layer(config))
    layer.router.metrics.has_reader = True
    mask = None
    if padded:
        mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    found: dict[str, torch.Tensor] = {}
    for step in range(2):
        layer.zero_grad(set_to_none=True)
        for micro_batch in range(2):
            inputs = hidden_states(24, seed=10 * step + micro_batch, batch=3).detach()
            inputs = (inputs * 2).requires_grad_()
            output, _ = layer(inputs, padding_mask=mask)
            output.square().sum().backward()
            found[f"output {step}.{micro_batch}"] = output.detach()
            found[f"input's gradient {step}.{micro_batch}"] = inputs.grad
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[f"{name}'s gradient {step}"] = parameter.grad.clone()
        found[f"pending {step}"] = layer.router.pending().clone()
        commit([layer.router])
    found["log"] = layer.router.metrics.flat(layer.router.metrics.max_k)
    found |= {f"state {name}": value for name, value in layer.router._state_buffers()}
    if layer.router.local_tokens_per_expert is not None:
        found["Megatron's counts"] = layer.router.local_tokens_per_expert
    return found


PADDED = ("losses", "bias and mask", "sigmoid", "exact", "bounded rows", "batch statistics")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "padded"), [(c, False) for c in CASES] + [(c, True) for c in PADDED]
)
def test_the_kernels_do_what_plain_torch_does(case: str, padded: bool) -> None:
    """To rounding at the size of a tensor's numbers: some are sums that cancel, like Σẑ."""
    uar, options = CASES[case]
    expected = train_layer(uar, options, "torch", padded)
    found = train_layer(uar, options, "triton", padded)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = found[name]
        assert ours.dtype == value.dtype
        atol = 2e-6 * max(1.0, float(value.abs().max()))
        assert torch.allclose(ours, value, rtol=2e-5, atol=atol), (name, (ours - value).abs().max())


REFUSED = {
    "moe_router_score_function": {"moe_router_score_function": "sqrtsoftplus"},
    "moe_router_group_topk": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "moe_router_dtype": {"moe_router_dtype": "fp64"},
    "moe_expert_capacity_factor": {"moe_expert_capacity_factor": 1.0},
    "uar.weights": {},
    "experts": {"num_moe_experts": 513},
}


@pytest.mark.parametrize("name", REFUSED)
def test_triton_by_name_never_falls_back(name: str) -> None:
    config = transformer_config(**REFUSED[name])
    fields = {"weights": "renormalised_to_K"} if name == "uar.weights" else {}
    with pytest.raises(ConfigError, match=name):
        uses_kernels(UARConfig.model_validate({"kernel_backend": "triton", **fields}), config)
    for backend in ("auto", "torch"):
        uar = UARConfig.model_validate({"kernel_backend": backend, **fields})
        assert not uses_kernels(uar, config)
