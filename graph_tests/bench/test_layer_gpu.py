"""The chain of a layer's products, and the bytes that a decode step must read."""

from dataclasses import replace

import pytest
import torch

from benchmarks.decode_gpu import layers_of, whole_markdown
from benchmarks.layer_gpu import EXPERTS, calls_of, markdown, measure, products
from benchmarks.random_model import CHUNK, FLASH_LAYERS, LAYERS, config_of
from benchmarks.shapes import FLASH
from benchmarks.step_bytes import cache_bytes, distinct_experts, weight_bytes
from graph_tests.bench.tiny_widths import TINY
from model.state import CacheFormat, StateSizes
from model.storage import Storage
from model.transformer import DeepseekV4
from model.weight_formats import FP8, MXFP4, WeightFormats


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_chain_runs_on_inputs_of_its_own(tokens, experts):
    first, second = calls_of(products(TINY, tokens, experts), "cpu", layers=2)
    for one, other in zip(first, second, strict=True):
        results = [call() for call in (one, other)]
        results = [result[-1] if isinstance(result, tuple) else result for result in results]  # the gate's weights
        assert results[0].shape == results[1].shape and not torch.equal(*results)


def test_chain_reads_what_the_goal_counts():
    """217 MB of a layer's weights but for the hyper-connections' 3.1, and 30 MB of compressors and indexer."""
    read = sum(case.traffic.read for case in products(FLASH, 1, "mxfp4"))
    assert read == pytest.approx(217.6e6 - 3.1e6 + 29.9e6, rel=0.002)


def test_chain_has_every_product_of_a_csa_block():
    """In a block each of them is one operator; what the others are is in graph_tests/graphs/test_passes.py."""
    names = [case.op_name for case in products(FLASH, 1, "mxfp4")]
    assert names.count("linear_fp8") == 6 and names.count("linear_fp32") == 1 and "linear_dense" not in names
    assert {"grouped_linear_w8a16", "gate", "moe_mxfp4"} < set(names) and len(names) == 10


def test_chain_table():
    row = {"tokens": 1, "experts": "mxfp4", "layer_us": 70.0, "gb_a_second": 3500.0, "floor_us": 52.5}
    rows = [row | {"target_us": 75.0, "alone_us": 90.0}, row | {"tokens": 16, "target_us": None, "alone_us": 95.5}]
    assert markdown({"rows": rows}).splitlines()[2:] == [
        "| 1 | mxfp4 | 70.0 | 3500 | 52.5 | 75% | 75 | 90.0 |",
        "| 16 | mxfp4 | 70.0 | 3500 | 52.5 | 75% |  | 95.5 |",
    ]


def flash(experts: int = 256) -> DeepseekV4:
    """Shapes only."""
    storage = Storage(WeightFormats(linear=FP8, experts=MXFP4), torch.device("meta"))
    config = config_of(replace(FLASH, n_routed_experts=experts), FLASH_LAYERS)
    return DeepseekV4(config, storage, CacheFormat(), StateSizes(1, CHUNK, CHUNK, FLASH.sliding_window))


def test_whole_flash_reads_the_published_bytes():
    """11.21 GB a token at batch 1: 419 tokens a second at 4.7 TB/s. However many experts there are."""
    for experts in (224, 256):
        assert weight_bytes(flash(experts), 1) == pytest.approx(11.21e9, rel=0.002)


def test_whole_flash_with_224_experts_fits_an_h200():
    """137.6 GB; 64 sequences of 8K need 3.3 GB more. torch sees 150 GB of memory."""
    model = flash(224)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held == pytest.approx(137.6e9, rel=0.002)
    model.allocate(StateSizes(64, 8192 + 64, CHUNK, FLASH.sliding_window))
    assert held + sum(buffer.nbytes for buffer in model.state.buffers()) < 143e9


def test_experts_that_a_step_reads():
    config = config_of(FLASH)
    assert distinct_experts(config, 1) == pytest.approx(6)
    assert distinct_experts(config, 64) == pytest.approx(256 * (1 - (250 / 256) ** 64))


def test_cache_bytes_by_hand():
    """584 bytes an entry, 68 an index key of 4 tokens."""
    config, context = config_of(FLASH), 8192  # window, csa, hca, csa
    selected, keys, compressed = 512 * 584, 2048 * 68, 64 * 584
    assert cache_bytes(config, 3, context) == 3 * (4 * 128 * 584 + 2 * (selected + keys) + compressed)


def test_schedule_of_the_released_model():
    kinds = [kind for kind, _ in FLASH_LAYERS]
    assert len(kinds) == 43 and kinds.count("csa") == 21 and kinds.count("hca") == 20
    assert kinds[:5] == ["window", "window", "csa", "hca", "csa"] and kinds[-1] == "csa"
    assert [hashed for _, hashed in FLASH_LAYERS[:4]] == [True, True, True, False]
    assert layers_of(4) is LAYERS and layers_of(43) == FLASH_LAYERS and len(layers_of(7)) == 7


def test_table_of_a_whole_model():
    operators = {f"op{number}": {"us": 1.0, "kernels": 1, "share": 0.1} for number in range(9)}
    run = {"step_us": 4000.0, "floor_us": 2400.0, "tokens_a_second": 250.0, "gb_a_second": 2800.0}
    runs = [run | {"batch": batch, "kernels_a_layer": 20.5, "operators": operators} for batch in (1, 64)]
    runs[1]["compiled"] = True
    one, many = whole_markdown({"layers": ["window", "csa", "hca"], "runs": runs}).splitlines()[2:]
    assert one.startswith("| 1 | as written | 4000 | 250 | 2800 | 60% | 20.5 | 16185 | op0 10%, ")
    assert many.startswith("| 64 | compiled |") and "| 20.5 |  | op0" in many  # not measured


@pytest.mark.cuda
def test_measured_chain_of_tiny_products_on_a_gpu():
    row = measure(TINY, 1, "mxfp4")
    assert 0 < row["floor_us"] < row["layer_us"] and len(row["products"]) == 10
