"""Floors and the peers' sums, by hand."""

import pytest

from benchmarks.cases import all_cases
from benchmarks.floors import H200, LAUNCH_US, Ceilings, Traffic, floor
from benchmarks.peers import add_up, best_peer, fastest, kernel, load
from benchmarks.shapes import FLASH, PRO

ROUND = Ceilings(copy=4e12, read_only=5e12, fp8=1000e12, bf16=500e12, fp32=50e12)


@pytest.mark.parametrize(
    "traffic, us",
    [
        (Traffic(4_000_000, 4_000_000), 2.0),  # a copy
        (Traffic(5_000_000, 0), 1.0),  # a reduction
        (Traffic(9_000_000, 4_000_000), 2.0 + 1.0),  # a copy, and 5 MB more to read
        (Traffic(0, 4_000_000), 1.0),  # writes alone go at the speed of a copy
        (Traffic(0, 0), 0.0),
    ],
)
def test_memory_floor(traffic, us):
    assert floor(traffic, ROUND).us == pytest.approx(us)
    assert floor(traffic, ROUND).bound == "memory"


@pytest.mark.parametrize("unit, us", [("fp8", 1.0), ("bf16", 2.0), ("fp32", 20.0)])
def test_flops_bound_where_they_take_longer(unit, us):
    least = floor(Traffic(4_000, 4_000, **{f"{unit}_flops": 1_000_000_000}), ROUND)
    assert (least.bound, least.us) == (unit, pytest.approx(us))


def test_floor_of_hc_post_at_4096_tokens():
    """Four of five streams go with a written one: 470 MB at 4.3 TB/s, 59 MB at 4.7."""
    case = next(case for case in all_cases((PRO,), (4096,)) if case.op_name == "hc_post")
    assert floor(case.traffic, H200).us == pytest.approx(469.76 / 4.3 + 59.05 / 4.7, rel=1e-3)


def test_what_takes_less_than_a_launch_is_latency():
    assert floor(Traffic(1000, 1000), H200).is_latency
    assert not floor(Traffic(0, int(LAUNCH_US * 4.4e6)), H200).is_latency


def test_traffic_adds_up():
    assert Traffic(1, 2, 3, 4, 5) + Traffic(10, 20) == Traffic(11, 22, 3, 4, 5)


def test_fastest_row_of_a_peer():
    """Of all numbers of splits."""
    time = fastest(kernel("dg_tf32_hc_prenorm_gemm", m=1, k=16384))
    assert (time.us, time.cold_us) == (pytest.approx(3.05, abs=0.01), pytest.approx(4.0, abs=0.01))


def test_chain_is_added():
    chain = (kernel("sgl_fused_q_norm_rope", m=16, h=128), kernel("sgl_fused_k_norm_rope_flashmla", m=16))
    total = add_up(chain)
    assert total.names == "sgl_fused_q_norm_rope + sgl_fused_k_norm_rope_flashmla"
    assert total.us == pytest.approx(1.79 + 1.10, abs=0.02)


def test_best_chain_has_the_least_warm_time():
    chains = (
        (kernel("vllm_fused_qnorm_rope_kv_insert", m=128, h=128),),
        (kernel("sgl_fused_q_norm_rope", m=128, h=128),),
    )
    assert best_peer(chains).kernels == ("sgl_fused_q_norm_rope",)


def test_chain_with_a_shape_that_was_not_measured_does_not_count():
    unmeasured = kernel("tl_act_quant_fp8", m=5, n=4096)
    assert add_up((kernel("sgl_fused_k_norm_rope_flashmla", m=1), unmeasured)) is None
    assert best_peer(((unmeasured,),)) is None and best_peer(()) is None


def test_unknown_kernel_or_column_is_an_error():
    with pytest.raises(KeyError):
        fastest(kernel("no_such_kernel", m=1))
    with pytest.raises(ValueError, match="rows"):
        fastest(kernel("sgl_fused_q_norm_rope", rows=1))


def test_peers_of_all_cases_exist():
    """best_peer raises for a kernel or column that the data does not have."""
    for case in all_cases((FLASH, PRO)):
        best_peer(case.peers)


def test_rows_of_the_data_fit_their_columns():
    for name, table in load()["kernels"].items():
        assert table["columns"][-2:] == ["us", "us_cold"] and table["source"], name
        assert all(len(row) == len(table["columns"]) and row[-2] > 0 for row in table["rows"]), name
