"""The compiled model: one graph for each kind of block and mode, no recompile, no pool copied, eager's tokens."""

import re
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.lowering import lowerings, make_fallback
from torch._inductor.utils import run_and_get_code

from dsv4_ops.backend import dsv4
from dsv4_ops.registry import TABLE
from graph_tests.graphs.rewritten import FusedThenEager
from graph_tests.tiny import tiny_checkpoint
from model.loading import load

BATCH, MAX_SEQ_LEN, CHUNK = 2, 96, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Six layers of three kinds, two of them hashed; window 8, ratios 4 and 8, top-k 4."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "official", layers=6)


def fresh(checkpoint, batch: int = BATCH):
    torch._dynamo.reset()
    return load(checkpoint, max_batch=batch, max_seq_len=MAX_SEQ_LEN, max_chunk=CHUNK)


@torch.no_grad()
def prefill_chunks(model, sizes: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        tokens = torch.randint(0, model.config.vocab_size, (model.state.sizes.max_batch, size), generator=generator)
        logits = model.prefill(tokens, torch.full((model.state.sizes.max_batch,), size))
    return logits


@torch.no_grad()
def greedy(model, steps: int) -> torch.Tensor:
    logits = prefill_chunks(model, [5, 3])
    model.state.active.fill_(True)
    first = model.sample_next(logits, model.state.active.clone())
    return torch.stack([first] + [model.decode_step() for _ in range(steps)])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_three_graphs_for_decode_and_three_for_prefill_of_any_chunk(checkpoint, batch):
    counter = CompileCounterWithBackend(FusedThenEager(fusing=False))
    model = fresh(checkpoint, batch)
    model.compile(backend=counter)
    greedy(model, 2)
    assert counter.frame_count == 6
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.state.reset()
        prefill_chunks(model, [2, 16, 7, 3])
        model.state.active.fill_(True)
        # Positions 28 to 68: past the window, the top-k and every boundary of both ratios.
        for _ in range(40):
            model.decode_step()
        prefill_chunks(model, [1])
    assert counter.frame_count == 6


def test_layers_do_not_add_graphs(tmp_path):
    """61 layers, the schedule of the large model: two HCA layers, then CSA and HCA in turn."""
    heavy, sparse = "heavily_compressed_attention", "compressed_sparse_attention"
    schedule = [heavy, heavy] + [sparse, heavy] * 29 + [sparse]
    schedule[5] = "sliding_attention"
    from graph_tests.random_checkpoint import write_random_checkpoint
    from graph_tests.tiny import quantisable_config

    config = quantisable_config(layers=61) | {"layer_types": schedule, "num_hash_layers": 3}
    write_random_checkpoint(tmp_path / "deep", config)
    counter = CompileCounterWithBackend(FusedThenEager(fusing=False))
    model = fresh(tmp_path / "deep")
    model.compile(backend=counter)
    greedy(model, 2)
    assert counter.frame_count == 6


@pytest.fixture(scope="module")
def inductor(checkpoint):
    """Greedy tokens of the model compiled with backend dsv4, and the code of Inductor for its six graphs."""
    model = fresh(checkpoint)
    model.compile()
    tokens, codes = run_and_get_code(greedy, model, 20)
    return tokens, codes


def test_compiled_tokens_equal_eager(checkpoint, inductor):
    assert torch.equal(inductor[0], greedy(fresh(checkpoint), 20))


def test_generated_code_never_copies_a_pool(inductor):
    """A clone of a mutated argument shows as a copy of a whole pool (pytorch#198031: the silent-wrong variant)."""
    _, codes = inductor
    assert len(codes) == 6
    for code in codes:
        call = code.split("def call(")[1].split("def benchmark_compiled_module")[0]
        mutations = re.findall(r"torch\.ops\.dsv4\.(\w*append\w*)\.default\((\w+)(?:, (\w+))?", call)
        assert mutations
        for name, state, pool in mutations:
            graph_inputs = re.findall(r"arg\d+_1", call)
            assert state in graph_inputs and (name.startswith("qkv_") or pool in graph_inputs), (name, state, pool)
        assert "clone" not in call and "copy_(" not in call


def test_generated_code_opens_what_has_no_kernel_and_calls_what_has_to_be_called(inductor):
    called = {name for code in inductor[1] for name in re.findall(r"torch\.ops\.dsv4\.(\w+)\.\w+\(", code)}
    assert {"linear_fp8", "moe_mxfp4", "index_topk_fp4", "sinkhorn", "qkv_norm_rope_append"} <= called
    assert not called & {"rms_norm", "quant_fp8", "rms_norm_quant_fp8", "swiglu_quant_fp8", "hc_pre", "hc_post", "gate"}


def test_the_backend_is_found_by_name_without_importing_the_package():
    probe = (
        "import sys, torch; found = 'dsv4' in torch._dynamo.list_backends();"
        "print(found, any(name.startswith('dsv4_ops') for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


@pytest.fixture
def inductor_knows_every_op(monkeypatch):
    """Inductor of torch 2.11 takes minutes for an op of which the backend did not tell it."""
    for op in TABLE.values():
        lowerings.pop(op.overload, None)

    def found_by_inductor(target, *arguments, **keywords):
        assert target.namespace != "dsv4", f"the backend did not register {target}"
        return make_fallback(target, *arguments, **keywords)

    monkeypatch.setattr("torch._inductor.graph.make_fallback", found_by_inductor)
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


@torch.no_grad()
def test_whole_decode_step_compiles_as_one_graph_by_backend_name(checkpoint, inductor_knows_every_op):
    expected = greedy(fresh(checkpoint), 6)
    model = fresh(checkpoint)
    step = torch.compile(model.decode_step, backend="dsv4", fullgraph=True)
    logits = prefill_chunks(model, [5, 3])
    model.state.active.fill_(True)
    tokens = [model.sample_next(logits, model.state.active.clone())]
    tokens.append(step().clone())
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens += [step().clone() for _ in range(5)]
    assert torch.equal(torch.stack(tokens), expected)


@torch.no_grad()
def test_modes_and_options_of_torch_compile_are_accepted():
    weight = torch.randn(64)
    function = lambda x: torch.ops.dsv4.rms_norm(x, weight, 1e-6) + 1  # noqa: E731
    x = torch.randn(3, 64)
    for arguments in ({"mode": "reduce-overhead"}, {"options": {"max-autotune": False}}, {"mode": "default"}):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="dsv4", **arguments)
        torch.testing.assert_close(compiled(x), function(x))


def test_the_backend_function_can_be_passed_itself():
    torch._dynamo.reset()
    x = torch.randn(2, 64)
    compiled = torch.compile(lambda x: torch.ops.dsv4.rms_norm(x, torch.ones(64), 1e-6), backend=dsv4, fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.ops.dsv4.rms_norm(x, torch.ones(64), 1e-6))
