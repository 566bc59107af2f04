"""Where what can be made again is kept, and what is said where nothing can be."""

import pathlib
import pwd
import types

import pytest

from mimic_video import cache
from mimic_video.errors import ConfigError


@pytest.fixture
def no_home(monkeypatch):
    """As in a container, of a user who is not in its list."""
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


@pytest.fixture
def settings(monkeypatch):
    """What `keep_compiled_programs` asks of JAX."""
    found = {}
    monkeypatch.setattr(cache, "jax", types.SimpleNamespace(config=types.SimpleNamespace(update=found.__setitem__)))
    return found


def test_the_users_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.user_cache("index") == pathlib.Path("/home/me/.cache/mimic_video/index")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/own")
    assert cache.user_cache("index") == pathlib.Path("/home/me/own/mimic_video/index")


def test_without_a_home_the_variable_is_named(no_home):
    with pytest.raises(ConfigError, match=r"home directory.*; expected it in HOME, or a folder for caches in XDG_CACHE_HOME"):
        cache.user_cache("index")


def test_programs_that_cannot_be_kept_are_compiled_all_the_same(no_home, settings, monkeypatch, tmp_path, caplog):
    cache.keep_compiled_programs()
    assert settings == {"jax_enable_compilation_cache": False}
    assert "compiled programs are not kept" in caplog.text and "JAX_COMPILATION_CACHE_DIR" in caplog.text
    settings.clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    cache.keep_compiled_programs()
    assert settings == {"jax_enable_compilation_cache": False} and str(tmp_path / "file") in caplog.text
    settings.clear()
    caplog.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache.keep_compiled_programs()
    assert settings == {"jax_compilation_cache_dir": str(tmp_path / "new/mimic_video/xla")} and not caplog.text


def test_a_tilde_is_the_home_directory_in_the_compilers_cache(monkeypatch, tmp_path, settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/xla")
    cache.keep_compiled_programs()
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "xla") and (tmp_path / "xla").is_dir()
