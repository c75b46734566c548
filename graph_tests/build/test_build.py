"""What is compiled when, what is found without compiling, and what a failing build says."""

import ctypes
import io
import shutil
import threading
from pathlib import Path

import pytest

from dsv4_ops import build as build_module
from dsv4_ops.build import BuildError, Project, build, cache_folder, find_library, source_hash
from graph_tests.build.tiny_project import ALL, TinyProject, text_of, wait_until


def value(library, name):
    return getattr(ctypes.CDLL(str(library)), name)()


def no_toolchain():
    raise BuildError("there is no compiler here")


def in_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    return stream


def test_cold_build_compiles_everything_and_the_next_one_nothing(tiny):
    library, printed = tiny.build()
    assert tiny.compiled() == ["link", *ALL]
    assert value(library, "norm") == 14
    lines = printed.splitlines()
    assert lines[0] == "dsv4_ops: compiling 3 of 3 objects for sm_90a"
    assert lines[1].startswith(f"dsv4_ops: built {library} in ") and len(lines) == 2
    assert tiny.build() == (library, "")
    assert tiny.compiled() == []


def test_a_terminal_shows_how_many_are_done(tiny):
    terminal = in_a_terminal()
    build(["90a"], tiny.project, progress=terminal)
    steps = [part for part in terminal.getvalue().split("\r\x1b[K") if not part.endswith("\n")]
    assert [step.split()[1] for step in steps if step] == ["1/3", "2/3", "3/3"]


def test_editing_one_source_compiles_that_source(tiny):
    first, _ = tiny.build()
    tiny.compiled()
    tiny.write("sample/sample.cpp", 'extern "C" int sample() { return 2; }\n')
    second, printed = tiny.build()
    assert tiny.compiled() == ["link", "sample/sample.cpp"]
    assert "compiling 1 of 3 objects" in printed
    assert (value(first, "sample"), value(second, "sample")) == (1, 2)


@pytest.mark.parametrize(
    ("header", "users"),
    [("norm/norm.h", ["norm/norm.cpp"]), ("common/limit.h", ["norm/norm.cpp", "quant/quant.cpp"])],
    ids=["beside the source", "through -I and through a relative path"],
)
def test_editing_a_header_compiles_its_users(tiny, header, users):
    tiny.build()
    tiny.compiled()
    tiny.write(header, (tiny.csrc / header).read_text().replace("= ", "= 10 * "))
    library, _ = tiny.build()
    assert tiny.compiled() == ["link", *users]
    assert value(library, "norm") == 140


def test_a_header_of_a_header_counts_and_so_does_one_in_angle_brackets(tiny):
    base = '#pragma once\n#include "limit.h"\nconstexpr int kBase = 1;\n'  # a circle, which `#pragma once` allows
    tiny.write("common/limit.h", "#pragma once\n#include <common/base.h>\nconstexpr int kLimit = kBase + 1;\n")
    tiny.write("common/base.h", base)
    assert value(tiny.build()[0], "quant") == 2
    tiny.compiled()
    tiny.write("common/base.h", base.replace("1", "4"))
    assert value(tiny.build()[0], "quant") == 5
    assert tiny.compiled() == ["link", "norm/norm.cpp", "quant/quant.cpp"]


def test_a_new_header_that_hides_another_compiles_its_users(tiny):
    tiny.build()
    tiny.compiled()
    tiny.write("norm/common/limit.h", "constexpr int kLimit = 100;\n")
    assert value(tiny.build()[0], "norm") == 200
    assert tiny.compiled() == ["link", "norm/norm.cpp"]


def test_going_back_to_old_sources_compiles_nothing(tiny):
    old, _ = tiny.build()
    text = (tiny.csrc / "norm/norm.h").read_text()
    tiny.write("norm/norm.h", "constexpr int kScale = 3;\n")
    assert tiny.build()[0] != old
    tiny.compiled()
    tiny.write("norm/norm.h", text)
    assert tiny.build() == (old, "")


def test_include_of_a_macro_is_refused(tiny):
    """The builder would not see that the file behind the macro changed, and use an old object."""
    tiny.write("norm/norm.cpp", '#define HEADER "norm.h"\n#include HEADER\n')
    with pytest.raises(BuildError, match=r"norm.cpp: #include HEADER"):
        tiny.build()


def test_other_flags_are_another_library(tiny):
    first, _ = tiny.build()
    flags = {**tiny.project.flags, ".cpp": ("-O1", "-fPIC", "-I.")}
    other = Project("tiny", tiny.csrc, flags, tiny.project.toolchain)
    assert find_library(["90a"], other) is None
    assert build(["90a"], other, progress=io.StringIO()) != first


def test_another_compiler_compiles_again_but_an_existing_library_is_kept(tiny):
    library, _ = tiny.build()
    tiny.compiled()
    newer = TinyProject(tiny.folder, identity="another g++")
    assert newer.build() == (library, "")
    library.unlink()
    newer.build()
    assert newer.compiled() == ["link", *ALL]


def test_library_of_another_machine_is_found_without_a_compiler(tiny, tmp_path, monkeypatch):
    library, _ = tiny.build()
    csrc = shutil.copytree(tiny.csrc, tmp_path / "another machine" / "csrc")
    cache = shutil.copytree(library.parent, tmp_path / "another machine" / "cache")
    monkeypatch.setenv("DSV4_CACHE", str(cache))
    there = Project("tiny", csrc, tiny.project.flags, no_toolchain)
    assert find_library(["90a"], there) == cache / library.name
    assert build(["90a"], there) == cache / library.name
    (csrc / "norm/norm.h").write_text("constexpr int kScale = 9;\n")
    assert find_library(["90a"], there) is None
    with pytest.raises(BuildError, match="no compiler here"):
        build(["90a"], there)


def test_library_for_more_architectures_serves(tiny):
    both = build(["100a", "90a"], tiny.project, progress=io.StringIO())
    tiny.compiled()
    assert find_library(["90a"], tiny.project) == find_library(["100a"], tiny.project) == both
    assert tiny.build() == (both, "")


def test_library_for_fewer_architectures_does_not_serve(tiny):
    tiny.build()
    assert find_library(["90a", "100a"], tiny.project) is None


def test_failing_compile_shows_the_lines_of_the_compiler(tiny):
    tiny.write("quant/quant.cpp", '#warning "not this line"\nint quant() { return 0; }\n')
    tiny.write("sample/sample.cpp", 'extern "C" int sample() {\n  return undefined_thing;\n}\n')
    with pytest.raises(BuildError) as error:
        tiny.build()
    message = str(error.value)
    assert "sample/sample.cpp:2:10: error: 'undefined_thing' was not declared" in message
    assert f"{tiny.folder / 'compiler'} -O0 -fPIC -I. -c sample/sample.cpp" in message
    assert "not this line" not in message and "norm.cpp" not in message and "ninja" not in message
    assert find_library(["90a"], tiny.project) is None


def test_after_a_failing_compile_the_good_objects_are_kept(tiny):
    tiny.write("sample/sample.cpp", "int sample() { return undefined_thing; }\n")
    with pytest.raises(BuildError):
        tiny.build()
    compiled = [source for source in tiny.compiled() if source != "sample/sample.cpp"]
    tiny.write("sample/sample.cpp", "int sample() { return 1; }\n")
    tiny.build()
    assert tiny.compiled() == ["link", *(source for source in ALL if source not in compiled)]


def test_warnings_of_the_compiler_are_printed(tiny):
    """A warning of ptxas that it serialises wgmma is half of a kernel's speed."""
    tiny.write("quant/quant.cpp", '#warning "slow kernel"\nextern "C" int quant() { return 0; }\n')
    assert "slow kernel" in tiny.build()[1]


def test_failing_link_shows_the_lines_of_the_linker(tiny):
    tiny.write("sample/sample.cpp", 'extern "C" int norm() { return 1; }\n')
    with pytest.raises(BuildError, match="cannot be linked(.|\n)*multiple definition of .norm"):
        tiny.build()
    assert find_library(["90a"], tiny.project) is None


def test_launcher_that_is_declared_but_nowhere_defined_fails_the_link(tiny):
    """Where no GPU is, nothing else would find it before the library is loaded on one."""
    declared = 'namespace dsv4 { void launch_norm(int); }\nextern "C" void aoti_of_torch();\n'
    tiny.write("norm/norm.cpp", declared + "void norm() { dsv4::launch_norm(1); aoti_of_torch(); }\n")
    with pytest.raises(BuildError) as error:
        tiny.build()
    assert "undefined reference to `dsv4::launch_norm(int)'" in str(error.value)
    assert "warning: undefined reference to `aoti_of_torch'" not in str(error.value)


def test_sources_edited_during_a_build_are_not_taken_for_the_old_ones(tiny):
    """The object of the new text must not lie under the key of the old text."""
    old = (tiny.csrc / "sample/sample.cpp").read_text()
    tiny.hold("sample/sample.cpp")
    errors = []

    def build_and_keep_the_error():
        try:
            tiny.build()
        except BuildError as error:
            errors.append(str(error))

    thread = threading.Thread(target=build_and_keep_the_error)
    thread.start()
    wait_until(lambda: "sample/sample.cpp" in text_of(tiny.folder / "compiled"), "the compiler is called")
    tiny.write("sample/sample.cpp", 'extern "C" int sample() { return 5; }\n')
    tiny.release()
    thread.join(20)
    assert len(errors) == 1 and "changed while they were compiled" in errors[0]
    tiny.write("sample/sample.cpp", old)
    assert value(tiny.build()[0], "sample") == 1


def test_sources_edited_between_the_two_keys_are_not_taken_for_the_old_ones(tiny, monkeypatch):
    """The library's key is that of the old text, the keys of the objects are those of the new one."""
    find_objects = build_module._find_objects

    def edit_and_find_objects(*arguments):
        tiny.write("sample/sample.cpp", 'extern "C" int sample() { return 5; }\n')
        return find_objects(*arguments)

    monkeypatch.setattr(build_module, "_find_objects", edit_and_find_objects)
    with pytest.raises(BuildError, match="changed while they were compiled"):
        tiny.build()
    assert value(tiny.build()[0], "sample") == 5


def test_a_folder_without_sources_is_refused(tiny):
    shutil.rmtree(tiny.csrc)
    tiny.write("README.md", "nothing here")
    with pytest.raises(BuildError, match=r"no \.cu or \.cpp file"):
        tiny.build()


@pytest.mark.parametrize("folder", ["a file/cache", "/proc/self"], ids=["below a file", "not even root may write"])
def test_cache_folder_that_cannot_be_written(tiny, tmp_path, monkeypatch, folder):
    (tmp_path / "a file").write_text("")
    cache = tmp_path / folder
    monkeypatch.setenv("DSV4_CACHE", str(cache))
    with pytest.raises(BuildError) as error:
        tiny.build()
    assert f"cannot build in the cache folder {cache}" in str(error.value)
    assert "Set DSV4_CACHE to a folder that can be written" in str(error.value)


def test_source_hash_follows_names_and_contents_of_visible_files(tiny, tmp_path):
    first = source_hash(tiny.csrc)
    assert len(first) == 64 and source_hash(shutil.copytree(tiny.csrc, tmp_path / "copy")) == first
    (tiny.csrc / ".sample.cpp.swp").write_text("an editor's")
    assert source_hash(tiny.csrc) == first
    (tiny.csrc / "sample/sample.cpp").rename(tiny.csrc / "sample/renamed.cpp")
    renamed = source_hash(tiny.csrc)
    tiny.write("norm/norm.h", "constexpr int kScale = 3;\n")
    assert len({first, renamed, source_hash(tiny.csrc)}) == 3


def test_default_cache_folder_is_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("DSV4_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache/dsv4_ops"
