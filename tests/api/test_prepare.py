"""Long texts never hold the event loop, however they are cut into prompts."""

from __future__ import annotations

import threading

import httpx
import pytest

from gateway.engine.fake import FakeTokenizer
from tests.support.fake_pool import MODEL, Gateway


@pytest.mark.parametrize(
    ("prompts", "on_the_loop"),
    [
        pytest.param(["x" * 2000] * 8, False, id="many-just-below"),
        pytest.param(["x" * 5000], False, id="one-long"),
        pytest.param(["x"] * 8, True, id="short"),
    ],
)
async def test_where_prompts_are_tokenised(
    monkeypatch: pytest.MonkeyPatch, prompts: list[str], on_the_loop: bool
) -> None:
    """The threshold counts all prompts together."""
    used: set[int] = set()
    encode = FakeTokenizer.encode

    def watched(self: FakeTokenizer, text: str) -> list[int]:
        used.add(threading.get_ident())
        return encode(self, text)

    monkeypatch.setattr(FakeTokenizer, "encode", watched)
    async with Gateway().open() as app:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"model": MODEL, "prompt": prompts, "max_tokens": 1}
            await http.post("/v1/explain", json=body)
    assert used
    assert (threading.get_ident() in used) is on_the_loop
