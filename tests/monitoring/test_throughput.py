import pytest

from megasparse.config import Config, parse_config
from megasparse.monitoring.throughput import Throughput, model_flops, peak_bf16_flops


def config(gated: bool = True, groups: int = 2, kv_channels: int = 6) -> Config:
    return parse_config(
        {
            "model": {
                "num_layers": 3, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4,
                "num_query_groups": groups, "kv_channels": kv_channels, "vocab_size": 100,
                "make_vocab_size_divisible_by": 8, "gated": gated,
            },
            "data": {"sequence_length": 8},
            "training": {"global_batch_size": 4, "steps": 10},
        }
    )  # fmt: skip


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_count_every_product_of_one_sequence(gated: bool, groups: int) -> None:
    """Against a count over the matrix shapes of a whole sequence, attention pair by pair."""
    tokens, hidden, ffn, heads, width, vocab = 8, 16, 24, 4, 6, 104

    def product(m: int, n: int, k: int) -> int:
        return 2 * m * n * k

    layer = product(tokens, heads * width, hidden)  # queries
    layer += 2 * product(tokens, groups * width, hidden)  # keys, values
    layer += product(tokens, hidden, heads * width)  # output
    pairs = sum(query + 1 for query in range(tokens))
    layer += heads * (product(pairs, 1, width) + product(pairs, 1, width))  # scores, weighted values
    layer += product(tokens, ffn, hidden) * (3 if gated else 2)
    whole = 3 * layer + product(tokens, vocab, hidden)
    flops = model_flops(config(gated, groups))
    assert flops.forward * tokens == pytest.approx(whole, rel=1e-12)
    assert flops.training == 3 * flops.forward


def test_flops_of_the_paper_size_match_six_times_parameters() -> None:
    """1.5B: 6 N a token for the products, plus attention's scores."""
    paper = parse_config(
        {
            "model": {
                "num_layers": 28, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 32,
                "vocab_size": 49152,
            },
            "data": {"sequence_length": 2048},
            "training": {"global_batch_size": 512, "steps": 30000},
        }
    )  # fmt: skip
    parameters = 28 * (4 * 2048**2 + 3 * 2048 * 5632) + 49152 * 2048
    scores = 3 * 28 * 4 * 2048 * 2049 / 2
    assert model_flops(paper).training == pytest.approx(6 * parameters + scores, rel=1e-12)


@pytest.mark.parametrize(("gated", "products"), [(True, 9), (False, 6)])
def test_executed_flops_shrink_all_but_the_first_product(gated: bool, products: int) -> None:
    flops = model_flops(config(gated))
    assert flops.executed_training([1.0, 1.0, 1.0]) == pytest.approx(flops.training)
    saved = 3 * flops.mlp_per_layer * (products - 1) / products * 0.75
    assert flops.executed_training([1.0, 0.25, 1.0]) == pytest.approx(flops.training - saved)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Some Future GPU", None),
    ],
)
def test_peak_is_the_dense_one_of_the_device(name: str, tflops: float | None) -> None:
    assert peak_bf16_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_metrics_by_hand() -> None:
    throughput = Throughput(config(), world_size=4, device_name="NVIDIA H200")
    metrics = throughput.metrics(tokens=6000, seconds=1.5, union_fractions=[1.0, 1.0, 1.0])
    flops = model_flops(config()).training
    assert metrics["throughput/tokens_per_second"] == 4000
    assert metrics["throughput/tokens_per_second_per_gpu"] == 1000
    assert metrics["throughput/tflops_per_gpu"] == pytest.approx(1000 * flops / 1e12)
    assert metrics["throughput/mfu"] == pytest.approx(1000 * flops / 989.4e12)
    assert metrics["perf/executed_tflops_per_gpu"] == pytest.approx(metrics["throughput/tflops_per_gpu"])


def test_no_mfu_without_a_known_peak_and_nothing_without_time() -> None:
    throughput = Throughput(config(), world_size=1, device_name="Some Future GPU")
    assert "throughput/mfu" not in throughput.metrics(10, 1.0, [1.0] * 3)
    assert throughput.metrics(10, 0.0, [1.0] * 3) == {}
