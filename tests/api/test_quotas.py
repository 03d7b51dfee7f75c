"""What an API key may ask for and use up, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gateway.config import ApiKey
from gateway.policy.quota import Quotas
from tests.support.fake_pool import MODEL, Gateway, make_settings
from tests.support.live import LiveServer

ASK = {"model": MODEL, "prompt": "four", "max_tokens": 6, "ignore_eos": True}
KEYS: dict[str, dict[str, Any]] = {
    "free": {},
    "floored": {"floors": {"ttft_ms": 200, "tpot_ms": 5}},
    "clamped": {"floors": {"ttft_ms": 200, "tighter": "clamp"}},
    "counted": {"quota": {"requests_per_minute": 3, "requests_per_day": 1000}},
    "metered": {"quota": {"tokens_per_minute": 40}},
    "streamed": {"quota": {"requests_per_minute": 2, "tokens_per_day": 5000}},
}


def api_key(name: str, **more: Any) -> ApiKey:
    digest = hashlib.sha256(f"secret-{name}".encode()).hexdigest()
    return ApiKey.model_validate({"name": name, "sha256": digest, **more})


class Metered(Gateway):
    """With the quotas of its keys, at a clock that stands still."""

    def open(self) -> Any:
        self.quotas = Quotas(
            {key.name: key.quota for key in self.settings.api_keys},
            clock=lambda: 1_800_000_000.0,
            on_refusal=self._refused,
        )
        return super().open()

    def _refused(self, key: str, limit: str) -> None:
        self.metrics.quota_refused(key, limit)


@pytest.fixture(scope="module")
def gateway() -> Metered:
    keys = tuple(api_key(name, **more) for name, more in KEYS.items())
    return Metered(make_settings(api_keys=keys))


@pytest.fixture(scope="module")
def url(gateway: Metered) -> Iterator[str]:
    with LiveServer(gateway.open) as server:
        yield server.url


def ask(url: str, key: str, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer secret-{key}"} | more.pop("headers", {})
    return httpx.post(url + path, json=ASK | more, headers=headers, timeout=30)


class TestFloors:
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/explain"])
    def test_a_tighter_budget_is_refused_with_the_floor(self, url: str, path: str) -> None:
        answer = ask(url, "floored", path, sla={"ttft_ms": 50})
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("sla.ttft_ms", "budget_too_tight")
        assert error["type"] == "permission_error"
        assert "200 ms or more, not 50" in error["message"]

    def test_a_header_is_a_budget_too(self, url: str) -> None:
        answer = ask(url, "floored", headers={"x-slo-tpot-ms": "1"})
        assert answer.status_code == 403
        assert "sla.tpot_ms" in answer.json()["error"]["message"]

    def test_what_is_above_the_floor_is_served(self, url: str) -> None:
        assert ask(url, "floored", sla={"ttft_ms": 200, "latency_ms": 1}).status_code == 200
        assert ask(url, "free", sla={"ttft_ms": 50}).status_code == 200

    def test_a_clamped_budget_is_the_floor(self, url: str) -> None:
        told = ask(url, "clamped", "/v1/explain", sla={"ttft_ms": 50, "tpot_ms": 1})
        assert told.json()["budget"] == {"ttft_ms": 200, "tpot_ms": 1}


class TestQuotas:
    def test_requests(self, url: str) -> None:
        left = []
        for _ in range(3):
            answer = ask(url, "counted")
            assert answer.status_code == 200
            left.append(answer.headers["x-ratelimit-remaining-requests"])
        assert left == ["2", "1", "0"]
        refused = ask(url, "counted")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "3 requests per minute" in error["message"]
        text = httpx.get(f"{url}/metrics").text
        assert (
            'pressgate_quota_refusals_total{key="counted",limit="requests_per_minute"} 1.0' in text
        )

    def test_tokens_count_as_they_were_used(self, gateway: Metered, url: str) -> None:
        """4 of prompt and 6 generated; then 24 that are not used, and then 24 that are."""
        assert ask(url, "metered").status_code == 200
        assert gateway.settles()
        unmet = ask(url, "metered", max_tokens=20, sla={"memory_mb": 0.001, "on_miss": "reject"})
        assert unmet.status_code == 422
        assert unmet.headers["x-ratelimit-remaining-tokens"] == "6"
        assert gateway.settles()
        again = ask(url, "metered", max_tokens=20)
        assert again.status_code == 200
        assert again.headers["x-ratelimit-remaining-tokens"] == "6"
        assert gateway.settles()
        over = ask(url, "metered", max_tokens=20)
        assert over.status_code == 429
        assert "40 tokens per minute" in over.json()["error"]["message"]
        never = ask(url, "metered", max_tokens=100)
        assert never.status_code == 429
        assert "retry-after" not in never.headers

    def test_streams_and_the_official_client(self, url: str) -> None:
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="secret-streamed", max_retries=0
        ) as client:
            for _ in range(2):
                raw = client.completions.with_raw_response.create(
                    model=MODEL, prompt="four", max_tokens=3, stream=True
                )
                assert raw.headers["x-ratelimit-limit-requests"] == "2"
                assert list(raw.parse())
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model=MODEL, prompt="four", max_tokens=3)
            assert refused.value.code == "rate_limit_exceeded"
