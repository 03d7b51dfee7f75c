"""The version is said in one place, the package's metadata."""

from __future__ import annotations

import pytest

from gateway import app
from gateway.config import Settings


def test_the_api_says_the_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Services:
        settings = Settings.model_construct()

    monkeypatch.setattr(app, "version", {"pressgate": "9.8.7"}.__getitem__)
    assert app.make_app(Services()).version == "9.8.7"  # type: ignore[arg-type]
