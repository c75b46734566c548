"""A cache folder of its own for every test, and a project of three small sources."""

import pytest

from graph_tests.build.tiny_project import TinyProject


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache folder"
    monkeypatch.setenv("DSV4_CACHE", str(folder))
    for name in ("DSV4_ARCHS", "DSV4_NO_BUILD"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def tiny(tmp_path, cache):
    project = TinyProject(tmp_path)
    yield project
    project.release()
