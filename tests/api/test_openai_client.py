"""The OpenAI endpoints, driven by OpenAI's own client over a real port."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.fake_pool import MODEL, Gateway

HELLO = [{"role": "user", "content": "hello"}]


def test_chat_in_one_piece(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=5, seed=1
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len("user: hello\nassistant:")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    compression = answer.model_extra["compression"]
    assert raw.headers["x-pressgate-level"] == compression["level"] == "bf16"


def test_stream_gives_the_same_text_and_usage(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 30, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("usage", [True, False], ids=["with-usage", "without-usage"])
def test_compression_comes_in_the_last_chunk_only(client: openai.OpenAI, usage: bool) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="x", max_tokens=4, stream=True,
            stream_options={"include_usage": True} if usage else None,
        )
    )  # fmt: skip
    having = [index for index, c in enumerate(chunks) if "compression" in (c.model_extra or {})]
    assert having == [len(chunks) - 1]
    compression = chunks[-1].model_extra["compression"]
    assert set(compression) == {
        "level", "policy", "policy_version", "reason", "decision_id", "predicted", "measured",
        "slo_met",
    }  # fmt: skip
    assert compression["measured"]["ttft_ms"] <= compression["measured"]["latency_ms"]


def test_n_choices_differ_by_seed_and_repeat(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "x", "n": 3, "seed": 7, "max_tokens": 12}
    first, second = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    alone = client.completions.create(**(asked | {"n": 1, "seed": 9}))
    assert alone.choices[0].text == texts[2]
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens == 1


def test_streamed_choices_are_whole_each(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": ["a", "bb"], "n": 2, "seed": 7, "max_tokens": 9}
    whole = client.completions.create(**asked)
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == dict.fromkeys(range(4), "length")


@pytest.mark.parametrize(
    ("prompt", "choices", "tokens"),
    [
        pytest.param("abc", 1, 3, id="text"),
        pytest.param(["abc", "de"], 2, 5, id="texts"),
        pytest.param([97, 98, 99], 1, 3, id="ids"),
        pytest.param([[97, 98], [99]], 2, 3, id="id-lists"),
    ],
)
def test_prompt_forms(client: openai.OpenAI, prompt: object, choices: int, tokens: int) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)  # type: ignore[call-overload]
    assert len(answer.choices) == choices
    assert answer.usage.prompt_tokens == tokens


def test_text_and_its_ids_are_the_same_prompt(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    by_text = client.completions.create(prompt="abc", **asked)
    by_ids = client.completions.create(prompt=[97, 98, 99], **asked)
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_stop_strings_end_the_answer(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "x", "max_tokens": 40, "seed": 2}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[15:20]
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[stop, "never"], stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(p.choices[0].text for p in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert len(entries) == 6
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
    streamed = client.chat.completions.create(**asked, top_logprobs=3, stream=True)
    got = [e for c in streamed if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert len(got) == 6


def test_completion_logprobs_have_offsets_into_the_text(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "ab", "max_tokens": 5, "logprobs": 2}
    answer = client.completions.create(**asked)
    scores = answer.choices[0].logprobs
    assert scores is not None
    text = answer.choices[0].text
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert text[offset : offset + len(token)] == token
    for token, tops in zip(scores.tokens, scores.top_logprobs, strict=True):
        assert token in tops
    chunks = list(client.completions.create(**asked, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [o for s in streamed for o in s.text_offset] == scores.text_offset


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_scores_the_prompt_as_evaluation_harnesses_ask(
    client: openai.OpenAI, max_tokens: int, stream: bool
) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[[97, 98, 99]], echo=True, logprobs=1, temperature=0,
        max_tokens=max_tokens, stream=stream,
    )  # fmt: skip
    parts = list(answer) if stream else [answer]
    scores = [p.choices[0].logprobs for p in parts if p.choices[0].logprobs]
    tokens = [token for s in scores for token in s.tokens]
    values = [value for s in scores for value in s.token_logprobs]
    tops = [top for s in scores for top in s.top_logprobs]
    assert tokens[:3] == ["a", "b", "c"]
    assert len(tokens) == len(values) == len(tops) == 3 + max_tokens
    assert values[0] is None
    assert tops[0] is None
    assert all(value is not None for value in values[1:])
    text = "".join(p.choices[0].text for p in parts)
    assert text == "".join(tokens)
    if not stream:
        assert answer.usage.completion_tokens == max_tokens


def test_echo_without_logprobs_repeats_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["añ", "b"], echo=True, max_tokens=0)
    assert [choice.text for choice in answer.choices] == ["añ", "b"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_json_schema_reaches_the_engine(client: openai.OpenAI, gateway: Gateway) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "") == {"answer": "fake"}
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(gateway.backend.seen[-1].sampling.json_schema or "") == schema
    client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format={"type": "json_object"}
    )
    assert gateway.backend.seen[-1].sampling.json_schema == "{}"


def test_every_sampling_field_reaches_the_engine(client: openai.OpenAI, gateway: Gateway) -> None:
    client.completions.create(
        model=MODEL, prompt="x", max_tokens=3, temperature=0.5, top_p=0.9, seed=-1,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, user="u",
        stop="zzz", logprobs=2,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True},
    )  # fmt: skip
    sampling = gateway.backend.seen[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == {5: -100}
    assert (sampling.stop, sampling.logprobs, sampling.ignore_eos) == (("zzz",), 2, True)
    assert sampling.seed is not None
    assert 0 <= sampling.seed < 2**63


def test_defaults_are_openai_s(client: openai.OpenAI, gateway: Gateway) -> None:
    client.completions.create(model=MODEL, prompt="x")
    assert gateway.backend.seen[-1].sampling.max_tokens == 16
    assert gateway.backend.seen[-1].sampling.temperature == 1.0
    client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3)
    assert gateway.backend.seen[-1].sampling.max_tokens == 3


def test_models_and_their_levels(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == MODEL
    assert f"{MODEL}@int8" in names
    assert client.models.retrieve(f"{MODEL}@int8").id == f"{MODEL}@int8"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{MODEL}@int3")


def test_message_parts_are_one_text(client: openai.OpenAI, gateway: Gateway) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for content in ("hello", parts):
        messages = [{"role": "developer", "content": content}, {"role": "assistant"}]
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    one, two = gateway.backend.seen[-2:]
    assert one.prompt == two.prompt
    assert bytes(one.prompt).startswith(b"system: hello")


def test_a_pinned_level_serves(client: openai.OpenAI, gateway: Gateway) -> None:
    raw = client.completions.with_raw_response.create(model=f"{MODEL}@bf16", prompt="x")
    assert raw.headers["x-pressgate-level"] == "bf16"
    assert raw.parse().model == f"{MODEL}@bf16"


def test_many_at_once_each_get_their_own_answer(client: openai.OpenAI) -> None:
    def ask(index: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=f"prompt {index}", max_tokens=20, temperature=0
        )
        return answer.choices[0].text

    alone = [ask(index) for index in range(24)]
    with ThreadPoolExecutor(24) as threads:
        assert list(threads.map(ask, range(24))) == alone
    assert len(set(alone)) > 20


def test_errors_are_the_client_s_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
