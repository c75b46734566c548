"""Three small sources and a compiler that writes down what it compiles and can be made to wait."""

import io
import time
from collections.abc import Callable
from pathlib import Path

from dsv4_ops.build import Project, build
from dsv4_ops.toolchain import Tool

SOURCES = {
    "common/limit.h": "constexpr int kLimit = 7;\n",
    "norm/norm.h": "constexpr int kScale = 2;\n",
    "norm/norm.cpp": '#include "norm.h"\n#include "common/limit.h"\nextern "C" int norm() { return kScale*kLimit; }\n',
    "quant/quant.cpp": '#include "../common/limit.h"\nextern "C" int quant() { return kLimit; }\n',
    "sample/sample.cpp": 'extern "C" int sample() { return 1; }\n',
}
ALL = ["norm/norm.cpp", "quant/quant.cpp", "sample/sample.cpp"]
FLAGS = {
    ".cpp": ("-O0", "-fPIC", "-I."),
    "link": ("-shared", "-Wl,-z,defs", "-Wl,--warn-unresolved-symbols"),
}
# A source named in `hold` is not compiled before that file is gone.
COMPILER = """#!/bin/sh
for word in "$@"; do case "$word" in *.cpp) source=$word;; esac; done
echo "${source:-link}" >> "{folder}/compiled"
while [ -n "$source" ] && grep -qsxF "$source" "{folder}/hold"; do sleep 0.02; done
exec g++ "$@"
"""


class TinyProject:
    """Sources in `folder`/csrc and the `project` that builds them for sm_90a; nothing in it needs CUDA."""

    def __init__(self, folder: Path, identity: str = "g++ of this machine"):
        self.folder, self.csrc = folder, folder / "csrc"
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.replace("{folder}", str(folder)))
        compiler.chmod(0o755)
        tool = Tool(str(compiler), identity=identity)
        self.project = Project("tiny", self.csrc, FLAGS, lambda: {".cpp": tool, "link": tool})
        for name, text in SOURCES.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self) -> tuple[Path, str]:
        """The library and what was printed."""
        progress = io.StringIO()
        return build(["90a"], self.project, progress=progress), progress.getvalue()

    def compiled(self) -> list[str]:
        """The sources compiled, and `link` for each link, since the last call."""
        log = self.folder / "compiled"
        lines = sorted(text_of(log).split())
        log.unlink(missing_ok=True)
        return lines

    def hold(self, source: str) -> None:
        (self.folder / "hold").write_text(f"{source}\n")

    def release(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Wait for what another process does; fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def text_of(path: Path) -> str:
    """What is in a file that may not be there yet."""
    return path.read_text() if path.exists() else ""
