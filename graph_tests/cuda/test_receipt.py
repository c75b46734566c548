"""CUDA sources cannot change without a run of the GPU tests, or a sentence that says why there was none."""

import json

from dsv4_ops.build import source_hash
from graph_tests.cuda.run import RECEIPT


def problem(receipt: dict, sources: str) -> str | None:
    """What is wrong with a receipt for these sources, None if nothing."""
    if receipt.get("stale"):
        return None if receipt.get("reason", "").strip() else "the receipt is marked stale without a reason"
    if receipt["source_hash"] != sources:
        return (
            "dsv4_ops/csrc changed since the GPU tests ran: run `python -m graph_tests.cuda.run` on a GPU and commit "
            'the receipt, or set "stale": true and a "reason" in it'
        )
    if receipt["tests"]["failed"] or not receipt["tests"]["passed"]:
        return "the receipt is of a run that did not pass"
    return None


def test_the_receipt_is_of_these_sources():
    assert problem(json.loads(RECEIPT.read_text()), source_hash()) is None


def test_a_receipt_of_other_sources_needs_a_reason():
    counts = {"status": 0, "passed": 3, "failed": 0, "skipped": 0}
    fresh = {"source_hash": "a", "tests": counts}
    assert problem(fresh, "a") is None
    assert "csrc changed" in problem(fresh, "b")
    assert "without a reason" in problem({"stale": True, "reason": " "}, "b")
    assert problem({"stale": True, "reason": "no GPU was to be had"}, "b") is None
    assert "did not pass" in problem({"source_hash": "a", "tests": counts | {"failed": 1}}, "a")
