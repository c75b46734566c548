"""Files in the cache folder that are not what was published."""

import os

import pytest

from dsv4_ops import artifacts
from dsv4_ops.build import find_library
from graph_tests.build.tiny_project import ALL


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove_the_checksum(path):
    path.with_name(f"{path.name}.sha256").unlink()


def leave_the_checksum_of_another(path):
    path.with_name(f"{path.name}.sha256").write_text("0" * 64)


DAMAGES = [truncate, flip_a_bit, empty, remove_the_checksum, leave_the_checksum_of_another]
damaged = pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])


@damaged
def test_damaged_library_is_linked_again(tiny, damage):
    library, _ = tiny.build()
    content = library.read_bytes()
    tiny.compiled()
    damage(library)
    assert find_library(["90a"], tiny.project) is None
    assert tiny.build()[0] == library
    assert library.read_bytes() == content and artifacts.is_intact(library)
    assert tiny.compiled() == ["link"]


@damaged
def test_damaged_object_is_compiled_again(tiny, cache, damage):
    library, _ = tiny.build()
    content = library.read_bytes()
    tiny.compiled()
    library.unlink()
    (norm,) = cache.glob("norm_norm-*.o")
    damage(norm)
    assert tiny.build()[0].read_bytes() == content
    assert artifacts.is_intact(norm)
    assert tiny.compiled() == ["link", "norm/norm.cpp"]


@pytest.mark.parametrize("steps", [0, 1])
def test_publishing_that_stops_half_way_leaves_no_artifact(tmp_path, monkeypatch, steps):
    """`steps` of the two renames happen, over an older artifact that was damaged."""
    made, path = tmp_path / "made", tmp_path / "artifact"
    for content in ("old", "new"):
        made.write_text(content)
        if content == "old":
            artifacts.publish(made, path)
            path.write_text("damaged")
    left = [os.replace] * steps

    def replace_or_die(source, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_or_die)
        artifacts.publish(made, path)
    assert not artifacts.is_intact(path)
    made.write_text("new")
    artifacts.publish(made, path)
    assert artifacts.is_intact(path) and path.read_text() == "new"


def test_intact_library_needs_no_objects(tiny, cache):
    library, _ = tiny.build()
    assert len(ALL) == len([path.unlink() for path in cache.glob("*.o")])
    tiny.compiled()
    assert tiny.build() == (library, "")
    assert tiny.compiled() == []
