"""Cases of `dsv4 bench`: inputs that the operators take, and the bytes that they move."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.call import check_finite, prepare
from benchmarks.cases import all_cases
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.shapes import FLASH, PRO
from benchmarks.targets import COLD_TARGETS, TARGETS
from dsv4_ops.registry import TABLE, Inline, Op
from graph_tests.bench.tiny_widths import TINY

TINY_TOKENS = (1, 3, 260)  # two decode steps and a prefill chunk
CASES = all_cases((TINY,), TINY_TOKENS)
RELEASED = {case.name: case for case in all_cases((FLASH, PRO))}
MIB = 1 << 20


def named(name: str) -> Traffic:
    return RELEASED[name].traffic


def tensor_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_takes_the_inputs_and_writes_every_output(case):
    check_finite(case.op, case.make(Inputs("cpu")))


@pytest.mark.parametrize("case", [case for case in CASES if case.op.alloc is not None], ids=lambda case: case.name)
def test_traffic_counts_every_input_and_output_byte(case):
    """Of tables and pools only what is touched counts, and a reader of the 128x4 layout skips its padding."""
    arguments = case.make(Inputs("cpu"))
    outputs = case.op.alloc(*arguments)
    assert case.traffic.written == tensor_bytes(outputs if isinstance(outputs, tuple) else (outputs,))
    schema = case.op.overload._schema.arguments
    assert all(argument.has_default_value() for argument in schema[len(arguments) :])
    names = [argument.name for argument in schema[: len(arguments)]]
    tensors = {name: value for name, value in zip(names, arguments, strict=True) if isinstance(value, Tensor)}
    whole = tensor_bytes(value for name, value in tensors.items() if not partly_read(case.op_name, name))
    rope = case.tokens * 4 * TINY.rope_dim if "rope_table" in tensors else 0
    if all(not partly_read(case.op_name, name) or name == "rope_table" for name in tensors):
        assert case.traffic.read == whole + rope
    else:
        assert whole + rope < case.traffic.read <= tensor_bytes(tensors.values())


def partly_read(op: str, name: str) -> bool:
    tiled = op in ("dequant_nvfp4_128x4", "nvfp4_scale_from_128x4") and name == "scale"
    experts = op.startswith("moe_") and name.startswith("w") and name != "weights"
    return tiled or experts or name == "rope_table" or name.endswith(("pool", "table"))


def test_every_operator_has_a_case():
    assert {case.op_name for case in CASES} == set(TABLE)


def test_names_are_unique_and_models_share_cases():
    names = [case.name for case in all_cases((FLASH, PRO))]
    assert len(names) == len(set(names))
    assert names.count("csa_compress_append T=1 D 512, a group ends") == 1


def test_targets_name_cases():
    missing = [name for name in (*TARGETS, *COLD_TARGETS) if name not in RELEASED and name.split()[0] in TABLE]
    assert missing == []
    assert not TARGETS.keys() & COLD_TARGETS.keys()


def test_traffic_of_hc_post_by_hand():
    """f and four streams of 7168 bf16 in, four streams out, post [4] and comb [4, 4] in fp32."""
    row = 4096 * 7168 * 2
    traffic = named("hc_post T=4096 dim 7168")
    assert (traffic.read, traffic.written) == (5 * row + 4096 * 20 * 4, 4 * row)


def test_traffic_of_hc_pre_by_hand():
    """At one token the fp32 weights [24, 4 * 4096] are nearly everything: 1.5 MiB."""
    traffic = named("hc_pre T=1 dim 4096")
    assert traffic.read == 1.5 * MIB + 4 * (3 + 24) + 4 * 4096 * 2
    assert traffic.written == 4096 * 2 + 20 * 4
    assert traffic.bf16_flops == 3 * 2 * 4 * 4096 * 24
    assert traffic.fp32_flops == 2 * 4 * 4096 * 2


def test_traffic_of_csa_decode_by_hand():
    """A group ends: kv and score of 7 halves of the state and of the new token, one row of biases; 584 bytes out."""
    half = 2 * 512 * 4
    traffic = named("csa_compress_append T=1 D 512, a group ends")
    biases, norm, rope, tables = 1024 * 4, 512 * 2, 64 * 4, 4 + 4
    assert traffic.read == 7 * half + 2 * half + biases + norm + rope + tables
    assert traffic.written == 2 * half + 584


def test_traffic_of_an_open_group_by_hand():
    traffic = named("csa_compress_append T=128 D 512, no group ends")
    token = 2 * 1024 * 4
    assert (traffic.read, traffic.written) == (128 * (token + 4) + 1024 * 4, 128 * token)


def test_traffic_of_a_key_insert_by_hand():
    traffic = named("kv_norm_rope_append T=16 D 512")
    assert traffic.read == 16 * (512 * 2 + 4 + 64 * 4 + 4) + 512 * 2
    assert traffic.written == 16 * 584


def test_decode_inputs_end_a_group_in_every_sequence():
    """If no group ended, the compressor would be timed without its work."""
    case = next(case for case in CASES if case.name == "csa_compress_append T=3 D 128, a group ends")
    state, pool, *rest = case.make(Inputs("cpu"))
    before = pool.clone()
    case.op.overload(state, pool, *rest)
    assert int((pool != before).any(1).sum()) == 3


def test_same_seed_gives_the_same_inputs():
    case = CASES[0]
    first, second = (case.make(Inputs("cpu"))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_prepared_call_runs_the_operator():
    (call,) = prepare(CASES[0], "cpu")
    assert all(tensor.numel() for tensor in call())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_output_that_is_not_finite_is_an_error(wrong):
    with pytest.raises(RuntimeError, match="dsv4::rms_norm: y not finite, or not written"):
        check_finite(TABLE["rms_norm"], (torch.full((2, 4), wrong), torch.ones(4), 1e-6))


def test_output_that_is_not_written_is_an_error():
    """A kernel that leaves elements out looks fast."""

    class Packet:
        @staticmethod
        def out(x, *, y):
            y[:1] = x[:1]

    class HalfWritten(Op):
        packet = Packet

    op = HalfWritten("half", "", None, torch.empty_like, Inline.NEVER, ("y",), None)
    with pytest.raises(RuntimeError, match="dsv4::half: y not finite, or not written"):
        check_finite(op, (torch.ones(2, 4),))
