"""What a user can get wrong on CUDA is an error that names the op, what was expected, what came and how to mend it."""

import os
import subprocess
import sys

import pytest
import torch

import dsv4_ops.ops  # noqa: F401
from dsv4_ops.ops.rope import rope_table

pytestmark = pytest.mark.cuda
OPS = torch.ops.dsv4


def append_arguments() -> dict:
    """Arguments of kv_norm_rope_append, which has no Python wrapper in front of its kernel."""
    return {
        "pool": torch.zeros(2, 64 * 584, dtype=torch.uint8, device="cuda"),
        "kv": torch.randn(2, 1, 512, device="cuda").bfloat16(),
        "weight": torch.ones(512, device="cuda").bfloat16(),
        "rope_table": rope_table(64, 32, 1e4).cuda(),
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32, device="cuda"),
        "positions": torch.tensor([[3], [-1]], dtype=torch.int32, device="cuda"),
        "eps": 1e-6,
        "page_size": 64,
    }


WRONG = {
    "kv of another dtype": ("kv", lambda t: t.half(), "kv must be .*float16"),
    "kv of another width": ("kv", lambda t: t[..., :256], "must be"),
    "weight of another size": ("weight", lambda t: t[:100], "weight must be"),
    "positions in int64": ("positions", lambda t: t.long(), "positions must be .*int64"),
    "positions of another batch": ("positions", lambda t: t[:1], "must be"),
    "a table on the CPU": ("block_table", lambda t: t.cpu(), "block_table must be on cuda:0 .*on the CPU"),
    "a pool that is too small": ("pool", lambda t: t[:, :1000].contiguous(), "pool must be"),
    "a pool of another dtype": ("pool", lambda t: t.view(torch.int16), "pool must be"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_kernel_checks_what_it_is_given(name, change, message):
    arguments = append_arguments()
    OPS.kv_norm_rope_append(*arguments.values())
    before = arguments["pool"].clone()
    with pytest.raises(RuntimeError, match=f"dsv4::kv_norm_rope_append: .*{message}"):
        OPS.kv_norm_rope_append(*(arguments | {name: change(arguments[name])}).values())
    torch.cuda.synchronize()
    assert torch.equal(arguments["pool"], before)


def test_tensors_on_different_devices():
    x = torch.randn(2, 128, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="dsv4::rms_norm: weight must be on cuda:0 .*on the CPU"):
        OPS.rms_norm(x, torch.ones(128), 1e-6)


def test_a_functional_op_says_what_it_wants_before_it_allocates():
    with pytest.raises(ValueError, match=r"dsv4::quant_fp8: x must be .*got \[2, 100\] bfloat16"):
        OPS.quant_fp8(torch.randn(2, 100, device="cuda").bfloat16(), 128)


def call_in_a_fresh_process(**environment: str) -> str:
    """What a call on a CUDA tensor raises where the library cannot be loaded; the same on the CPU must work."""
    code = (
        "import torch, dsv4_ops.ops\n"
        "x = torch.ones(2, 128)\n"
        "torch.ops.dsv4.quant_fp8(x, 128)\n"
        "try:\n    torch.ops.dsv4.quant_fp8(x.cuda(), 128)\n"
        "except RuntimeError as error:\n    print(type(error).__name__, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_cache_folder_that_cannot_be_written():
    message = call_in_a_fresh_process(DSV4_CACHE="/proc/self/cache")
    assert "MissingKernelError dsv4::quant_fp8" in message and "DSV4_CACHE" in message


def test_building_forbidden_and_nothing_built(tmp_path):
    message = call_in_a_fresh_process(DSV4_CACHE=str(tmp_path), DSV4_NO_BUILD="1")
    assert "MissingKernelError dsv4::quant_fp8" in message and "dsv4 build" in message


def test_an_architecture_that_is_not_supported(tmp_path):
    message = call_in_a_fresh_process(DSV4_CACHE=str(tmp_path), DSV4_ARCHS="80")
    assert "MissingKernelError dsv4::quant_fp8" in message and "90a" in message and "100a" in message


def test_ops_run_on_the_current_stream():
    """A kernel on a side stream sees what that stream wrote right before it."""
    x = torch.zeros(64, 4096, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        x.fill_(3.0)
        q, scale = OPS.quant_fp8(x, 128)
    side.synchronize()
    expected = torch.ops.dsv4.quant_fp8(torch.full((64, 4096), 3.0).bfloat16(), 128)
    assert torch.equal(q.cpu().view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale.cpu(), expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_run_on_the_gpu_of_their_tensors():
    assert torch.cuda.current_device() == 0
    x = torch.randn(5, 256).bfloat16()
    with torch.cuda.device(0):
        q, scale = OPS.quant_fp8(x.to("cuda:1"), 128)
    expected = OPS.quant_fp8(x, 128)
    assert q.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(q.cpu().view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(
        scale.cpu(), expected[1]
    )
    with pytest.raises(RuntimeError, match="weight must be on cuda:1"):
        OPS.rms_norm(x.to("cuda:1"), torch.ones(256, device="cuda:0"), 1e-6)
