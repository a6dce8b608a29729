"""FI_* variables: strict parsing, and errors that name the variable."""

import dataclasses

import fi_core as fi
import pytest
from fi_core.settings import Settings, read_settings, settings


def test_defaults() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"PATH": "/bin", "HOME": "/"}) == Settings()


def test_every_setting_is_read() -> None:
    environ = {
        "FI_CHECK": "1",
        "FI_SHADOW": "0.25",
        "FI_BACKEND": "triton",
        "FI_DISABLE_PLUGINS": "a,,b",
        "FI_CACHE_DIR": "/somewhere",
    }
    expected = Settings(True, 0.25, "triton", ("a", "b"), "/somewhere")
    assert read_settings(environ) == expected
    assert len(environ) == len(dataclasses.fields(Settings))
    assert str(expected.cache_folder) == "/somewhere"


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(Settings().cache_folder) == "/caches/fi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Settings().cache_folder) == "/home/someone/.cache/fi"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("FI_CHECK", "yes"),
        ("FI_CHECK", ""),
        ("FI_CHECK", "2"),
        ("FI_SHADOW", "1.5"),
        ("FI_SHADOW", "-0.1"),
        ("FI_SHADOW", "nan"),
        ("FI_SHADOW", "some"),
    ],
)
def test_values_that_do_not_parse(variable: str, text: str) -> None:
    with pytest.raises(fi.SettingsError, match=variable):
        read_settings({variable: text})


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.cache_clear()
    monkeypatch.setenv("FI_SHADOW", "0.5")
    assert settings().shadow == 0.5
    monkeypatch.setenv("FI_SHADOW", "0.75")
    assert settings().shadow == 0.5
    settings.cache_clear()
    assert settings().shadow == 0.75
    monkeypatch.undo()
    settings.cache_clear()
