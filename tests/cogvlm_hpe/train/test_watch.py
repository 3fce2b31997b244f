"""What is watched beside the loss."""

import pytest
import torch
from tiny_model import small_config

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.adapter import add_lora, trainable
from cogvlm_hpe.train.plan import trace
from cogvlm_hpe.train.watch import Work, delta_norms, peak_flops, whole_norm


def test_work_between_what_was_traced_is_on_the_line() -> None:
    """One and four questions of 64 tokens are traced; two of 32 are some attention away from the line through them."""
    config = RunConfig(
        "unused",
        ModelConfig("unused", dtype="fp32"),
        ShardsConfig([SetConfig("unused")]),
        AdapterConfig(rank=2, scope="text"),
        TrainConfig(micro_batch=2),
    )
    work, between = Work.of(config, small_config()), trace(config, small_config(), questions=2, tokens=32)
    assert work.flops(2, 2 * 2 * 32) == pytest.approx(between.forward_flops + between.backward_flops, rel=0.1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("Radeon", None)],
)
def test_the_peak_of_a_device_by_its_name(name: str, tflops: float | None) -> None:
    peak = peak_flops(name)
    assert peak == (None if tflops is None else tflops * 1e12)


def test_norms_of_what_an_adapter_adds_are_those_of_dense_matrices() -> None:
    model = CogVLMForCausalLM(small_config())
    lora = add_lora(model, AdapterConfig(rank=3, alpha=5, targets=["language.mlp", "glue"], scope="all"), "unused")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in trainable(model).items()}
    deltas = [
        5 / 3 * (b @ weights[name.replace("lora_B", "lora_A")]) for name, b in weights.items() if "lora_B" in name
    ]
    norms = delta_norms(weights, lora)
    assert [(group, len(of)) for group, of in norms.items()] == [("language.mlp", 6), ("glue", 4)]
    assert sum(norms.values(), []) == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
    assert whole_norm([3.0, 4.0]) == 5.0
