"""Versions, inheritance, matching and candidates of policies, over a real port."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gateway.config import ApiKey
from gateway.policy import rollout
from gateway.policy.policy import Policy
from tests.support.fake_pool import MODEL, OPEN, Gateway, make_settings
from tests.support.live import LiveServer

TEXT = "/v1/completions"


def key(name: str, *scopes: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes)


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "max_tokens": 4} | fields


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """As `ops`, who may everything; each test has policies of its own names."""
    base = Policy(name="base", ttft_ms=5000, max_ppl_ratio=1.5)
    settings = make_settings(
        policies=(OPEN, base, Policy(name="child", extends="base", tpot_ms=900)),
        api_keys=(key("ops", "inference", "admin"), key("user", "inference")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "SHARE_SECONDS", 0.01)
        with (
            LiveServer(Gateway(settings).open) as server,
            httpx.Client(
                base_url=server.url, timeout=30, headers={"authorization": "Bearer ops"}
            ) as client,
        ):
            yield client


def fault(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def ok(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json() if response.content else None


def eventually(holds: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
    return found


def test_every_change_is_a_version_with_author_time_and_comment(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/v", json={"ttft_ms": 300}, params={"comment": "first try"}))
    ok(http.put("/v1/policies/v", json={"ttft_ms": 200, "match": {"header": {"x-v": "1"}}}))
    ok(http.delete("/v1/policies/v", params={"comment": "not wanted"}))
    rows = ok(http.get("/v1/policies/v/versions"))["data"]
    assert [(row["version"], row["kind"], row["comment"]) for row in rows] == [
        (3, "delete", "not wanted"),
        (2, "put", None),
        (1, "put", "first try"),
    ]
    assert {row["author"] for row in rows} == {"ops"}
    assert all(row["at"].endswith("Z") for row in rows)
    assert ok(http.get("/v1/policies/v/versions/2"))["document"] == {
        "ttft_ms": 200,
        "match": {"header": {"x-v": "1"}},
    }
    assert ok(http.get("/v1/policies/v/diff", params={"from": 1, "to": 2}))["changes"] == [
        {"field": "match.header.x-v", "to": "1"},
        {"field": "ttft_ms", "from": 300, "to": 200},
    ]
    latest = ok(http.get("/v1/policies/v/diff"))
    assert (latest["from"], latest["to"]) == (2, 3)
    made = ok(http.post("/v1/policies/v:rollback", json={"version": 1, "comment": "back"}))
    assert (made["version"], made["of"], made["kind"]) == (4, 1, "rollback")
    assert made["in_force"] is True
    assert ok(http.get("/v1/policies/v"))["ttft_ms"] == 300
    assert ok(http.get("/v1/policies/v"))["match"]["header"] == {}


def test_a_configured_policy_can_be_rolled_back_to(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/base", json={"ttft_ms": 4000}))
    assert ok(http.get("/v1/policies/child"))["ttft_ms"] == 4000
    assert ok(http.get("/v1/policies/child"))["max_ppl_ratio"] is None
    ok(http.post("/v1/policies/base:rollback", json={"version": 0}))
    assert ok(http.get("/v1/policies/child"))["ttft_ms"] == 5000
    rows = ok(http.get("/v1/policies/base/versions"))["data"]
    assert (rows[-1]["version"], rows[-1]["author"]) == (0, "configuration")


def test_metadata_chooses_the_policy(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/m", json={"match": {"metadata": {"tier": "gold"}}}))
    for metadata, expected in (({"tier": "gold", "n": "1"}, "m"), ({"tier": "tin"}, "default")):
        answer = ok(http.post(TEXT, json=text(metadata=metadata)))
        assert answer["compression"]["policy"] == expected
    assert fault(http.post(TEXT, json=text(metadata={"tier": 3})), 400)["param"] == "metadata.tier"
    ok(http.delete("/v1/policies/m"))


def test_an_explanation_falls_under_the_policy_of_what_it_explains(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/texts", json={"match": {"path": TEXT, "header": {"x-e": "1"}}}))
    for body, expected in (
        (text(), "texts"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}, "default"),
    ):
        answer = ok(http.post("/v1/explain", json=body, headers={"x-e": "1"}))
        assert answer["policy"] == expected


def test_hours_choose_the_policy(http: httpx.Client) -> None:
    """One of the two always holds, whatever the time is."""
    for name, hours in (("am", {"end": "12:00"}), ("pm", {"start": "12:00"})):
        match = {"path": TEXT, "header": {"x-h": "1"}, "hours": hours}
        ok(http.put(f"/v1/policies/{name}", json={"match": match}))
    answer = ok(http.post(TEXT, json=text(), headers={"x-h": "1"}))
    assert answer["compression"]["policy"] in ("am", "pm")
    assert ok(http.get("/v1/policies/am"))["match"]["hours"]["end"] == "12:00"


@pytest.mark.parametrize(
    ("call", "status", "param"),
    [
        pytest.param(("PUT", "/v1/policies/x", {"extends": "nobody"}), 400, "extends", id="parent"),
        pytest.param(("PUT", "/v1/policies/base", {"extends": "child"}), 400, "extends", id="loop"),
        pytest.param(
            ("PUT", "/v1/policies/x", {"match": {"hours": {"zone": "Mars/Base"}}}),
            400,
            "match.hours.zone",
            id="zone",
        ),
        pytest.param(
            ("PUT", "/v1/policies/x", {"match": {"hours": {"begin": "9:00"}}}),
            400,
            "match.hours.begin",
            id="unknown in hours",
        ),
        pytest.param(("PUT", "/v1/policies/x?comment=" + "c" * 501, {}), 400, "comment", id="long"),
        pytest.param(("GET", "/v1/policies/nobody/versions", None), 404, "sla.policy", id="none"),
        pytest.param(("GET", "/v1/policies/base/versions/99", None), 404, "version", id="version"),
        pytest.param(("GET", "/v1/policies/base/versions/x", None), 400, "number", id="word"),
        pytest.param(("GET", "/v1/policies/base/diff?from=99", None), 404, "version", id="diff"),
        pytest.param(("POST", "/v1/policies/base:rollback", {}), 400, "version", id="which"),
        pytest.param(
            ("POST", "/v1/policies/base:rollback", {"version": 99}), 404, "version", id="unknown"
        ),
        pytest.param(("POST", "/v1/policies/base:canary", {}), 400, "policy", id="no candidate"),
        pytest.param(
            ("POST", "/v1/policies/base:canary", {"policy": {"ttft": 1}}),
            400,
            "policy.ttft",
            id="candidate's field",
        ),
        pytest.param(
            ("POST", "/v1/policies/base:canary", {"policy": {}, "percent": 0}),
            400,
            "percent",
            id="no share",
        ),
        pytest.param(
            ("POST", "/v1/policies/base:canary", {"policy": {"match": {"path": "/x"}}}),
            400,
            "policy.match",
            id="another match",
        ),
        pytest.param(
            ("POST", "/v1/policies/nobody:canary", {"policy": {}}), 404, "sla.policy", id="of none"
        ),
        pytest.param(("POST", "/v1/policies/base:promote", None), 409, None, id="promote none"),
        pytest.param(("POST", "/v1/policies/base:abort", {}), 409, None, id="abort none"),
        pytest.param(("GET", "/v1/policies/base/canary", None), 404, None, id="no canary"),
    ],
)
def test_bad_calls_name_the_field_and_change_nothing(
    http: httpx.Client, call: tuple[str, str, Any], status: int, param: str | None
) -> None:
    before = http.get("/v1/policies").json()
    method, path, body = call
    assert fault(http.request(method, path, json=body), status)["param"] == param
    assert http.get("/v1/policies").json() == before


def test_changing_policies_needs_the_admin_scope(http: httpx.Client) -> None:
    mine = {"authorization": "Bearer user"}
    for verb in ("rollback", "canary", "promote", "abort"):
        body = {"version": 0}
        assert http.post(f"/v1/policies/base:{verb}", json=body, headers=mine).status_code == 403
    assert http.get("/v1/policies/base/versions", headers=mine).status_code == 200


def test_a_parent_that_is_extended_cannot_go(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/parent", json={"ttft_ms": 900}))
    ok(http.put("/v1/policies/heir", json={"extends": "parent"}))
    assert "heir" in fault(http.delete("/v1/policies/parent"), 409)["message"]
    ok(http.put("/v1/policies/parent", json={"ttft_ms": 800}))
    assert ok(http.get("/v1/policies/heir"))["ttft_ms"] == 800
    ok(http.delete("/v1/policies/heir"))
    ok(http.delete("/v1/policies/parent"))


def test_a_candidate_that_attains_less_is_dropped_by_itself(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/c", json={"max_ppl_ratio": 1.5}))
    plan = {"percent": 50, "min_requests": 10, "max_drop": 0.05}
    worse = {"policy": {"latency_ms": 0.001, "max_ppl_ratio": 1.5}}
    started = ok(http.post("/v1/policies/c:canary", json=plan | worse | {"comment": "try"}))
    assert (started["state"], started["percent"], started["version"]) == ("collecting", 50, 2)
    assert ok(http.get("/v1/policies/c"))["latency_ms"] is None

    def answered() -> bool:
        ok(http.post(TEXT, json=text(sla={"policy": "c"}, user=f"u{time.monotonic_ns()}")))
        return http.get("/v1/policies/c/canary").status_code == 404

    eventually(answered)
    row = ok(http.get("/v1/policies/c/versions"))["data"][0]
    assert (row["version"], row["kind"], row["author"], row["of"]) == (
        3,
        "fallback",
        "pressgate",
        2,
    )
    assert row["comment"].startswith("attainment 0.0% of ")
    assert ok(http.get("/v1/policies/c"))["latency_ms"] is None
    metrics = http.get("/metrics").text
    assert 'pressgate_policy_changes_total{kind="fallback",policy="c"} 1.0' in metrics
    assert 'pressgate_policy_canary_percent{policy="c"} 0.0' in metrics
    assert 'pressgate_policy_canary_requests_total{arm="canary",met="false",policy="c"}' in metrics


def test_a_candidate_is_widened_and_promoted(http: httpx.Client) -> None:
    ok(http.put("/v1/policies/w", json={"max_ppl_ratio": 1.5}))
    candidate = {"policy": {"max_ppl_ratio": 1.5, "ttft_ms": 60_000}}
    ok(http.post("/v1/policies/w:canary", json=candidate | {"percent": 1}))
    wider = ok(http.post("/v1/policies/w:canary", json={"percent": 99.999, "min_requests": 5}))
    assert (wider["version"], wider["percent"]) == (3, 99.999)
    for _ in range(3):
        answer = ok(http.post(TEXT, json=text(sla={"policy": "w"})))
        assert answer["compression"]["policy_version"] == 3
    arms = eventually(
        lambda: (s := ok(http.get("/v1/policies/w/canary")))["canary"]["requests"] == 3 and s
    )
    assert arms["stable"]["requests"] == 0
    assert arms["canary"]["attainment"] == 1.0
    made = ok(http.post("/v1/policies/w:promote", json={"comment": "good"}))
    assert (made["kind"], made["of"]) == ("promote", 3)
    assert ok(http.get("/v1/policies/w"))["ttft_ms"] == 60_000
    answer = ok(http.post(TEXT, json=text(sla={"policy": "w"})))
    assert answer["compression"]["policy_version"] == 4
    assert ok(http.post(TEXT, json=text()))["compression"]["policy_version"] == 0
    ok(http.post("/v1/policies/w:canary", json={"policy": {}}))
    ok(http.post("/v1/policies/w:abort"))
    assert ok(http.get("/v1/policies/w"))["ttft_ms"] == 60_000
