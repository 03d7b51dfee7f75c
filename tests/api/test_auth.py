"""Keys, scopes, and what stays open."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import httpx
import pytest

from gateway.config import ApiKey
from gateway.policy.policy import Match, Policy
from tests.support.fake_pool import MODEL, OPEN, Gateway, make_settings
from tests.support.live import LiveServer

TEXT = "/v1/completions"
ASK = {"model": MODEL, "prompt": "x", "max_tokens": 1}


def key(name: str, *scopes: str) -> ApiKey:
    digest = hashlib.sha256(f"secret-{name}".encode()).hexdigest()
    return ApiKey.model_validate({"name": name, "sha256": digest, "scopes": scopes})


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer secret-{name}"}


@pytest.fixture(scope="module")
def locked() -> Iterator[httpx.Client]:
    keys = (key("user", "inference"), key("boss", "inference", "admin"), key("ops", "admin"))
    policies = (OPEN, Policy(name="gold", match=Match(api_key=("boss",)), build=False))
    gateway = Gateway(make_settings(api_keys=keys, policies=policies))
    with (
        LiveServer(gateway.open) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "path", ["/", "/console.js", "/console.css", "/healthz", "/readyz", "/metrics", "/docs"]
)
def test_open_without_a_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"authorization": "Bearer wrong"}, id="wrong"),
        pytest.param({"authorization": "secret-user"}, id="no-scheme"),
        pytest.param({"authorization": "Basic secret-user"}, id="other-scheme"),
        pytest.param({"authorization": "Bearer"}, id="empty"),
        pytest.param({"authorization": "Bearer " + "x" * 10_000}, id="long"),
        pytest.param(
            {"authorization": "Bearer " + hashlib.sha256(b"secret-user").hexdigest()}, id="digest"
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/policies", "/v1/jobs", "/nowhere"])
def test_no_valid_key_no_entry(locked: httpx.Client, headers: dict[str, str], path: str) -> None:
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("who", "method", "path", "status"),
    [
        ("user", "POST", TEXT, 200),
        ("user", "POST", "/v1/explain", 200),
        ("user", "GET", "/v1/levels", 200),
        ("user", "GET", "/v1/policies", 200),
        ("user", "PUT", "/v1/policies/p", 403),
        ("user", "DELETE", "/v1/policies/p", 403),
        ("user", "POST", "/v1/levels/int8:build", 403),
        ("user", "POST", "/v1/levels/int8:evict", 403),
        ("ops", "POST", TEXT, 403),
        ("ops", "POST", "/v1/explain", 403),
        ("ops", "GET", "/v1/levels", 200),
        ("ops", "POST", "/v1/levels/int8:build", 202),
        ("boss", "POST", TEXT, 200),
    ],
)
def test_scopes(locked: httpx.Client, who: str, method: str, path: str, status: int) -> None:
    json = ASK if method != "GET" else None
    response = locked.request(method, path, json=json, headers=bearer(who))
    assert response.status_code == status, response.text
    if status == 403:
        assert response.json()["error"]["code"] == "insufficient_scope"


def test_the_key_decides_which_policy_matches(locked: httpx.Client) -> None:
    for who, policy in (("user", "default"), ("boss", "gold")):
        answer = locked.post(TEXT, json=ASK, headers=bearer(who)).json()
        assert answer["compression"]["policy"] == policy


def test_a_policy_of_another_key_is_refused(locked: httpx.Client) -> None:
    headers = bearer("user") | {"x-pressgate-policy": "gold"}
    assert locked.post(TEXT, json=ASK, headers=headers).status_code == 403


@pytest.mark.parametrize("path", [TEXT, "/v1/explain"])
def test_a_key_bound_to_a_policy_cannot_name_another(locked: httpx.Client, path: str) -> None:
    headers = bearer("boss") | {"x-pressgate-policy": "default"}
    response = locked.post(path, json=ASK, headers=headers)
    assert response.status_code == 403
    assert "it may name: gold" in response.json()["error"]["message"]
    own = bearer("boss") | {"x-pressgate-policy": "gold"}
    assert locked.post(path, json=ASK, headers=own).status_code == 200


def test_web_pages_of_others_cannot_act_on_an_open_gateway(http: httpx.Client) -> None:
    path = "/v1/levels/int8:evict"
    response = http.post(path, headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403
    assert http.post(path, headers={"sec-fetch-site": "same-origin"}).status_code != 403
