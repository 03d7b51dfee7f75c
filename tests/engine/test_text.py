"""Streaming text: whole characters, no part of a stop string, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gateway.engine.text import Detokenizer, StopFilter, TextStream
from gateway.engine.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Detokenizer(tokenizer.decode, prompt or [])
    return [*(stream.push(token) for token in ids), stream.flush()]


@given(st.text(max_size=40))
def test_byte_level_text_comes_out_whole(builtin_tokenizer: Tokenizer, text: str) -> None:
    ids = builtin_tokenizer.encode(text)
    assert "".join(pieces(builtin_tokenizer, ids)) == text


@given(st.text(alphabet=st.characters(min_codepoint=0x80), min_size=1, max_size=20))
def test_one_byte_tokens_never_split_a_character(bytes_tokenizer: Tokenizer, text: str) -> None:
    got = pieces(bytes_tokenizer, bytes_tokenizer.encode(text))
    assert "".join(got) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in got)


def test_a_character_begun_in_the_prompt_is_completed(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("né")
    assert "".join(pieces(bytes_tokenizer, ids[-1:], ids[:-1])) == "é"


def test_an_unfinished_character_at_the_end_is_marked(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("a🎉")[:-1]
    assert "".join(pieces(bytes_tokenizer, ids)) == "a\N{REPLACEMENT CHARACTER}"


def test_invalid_bytes_do_not_hold_the_text_back(bytes_tokenizer: Tokenizer) -> None:
    bad = bytes_tokenizer.encode("é")[1]
    got = pieces(bytes_tokenizer, [bad] * 40)
    assert "".join(got[:10])


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's scheme: ▁ for a space, stripped at the beginning, bytes as a fallback."""
    vocab = [("<unk>", 0.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    vocab += [("▁", -2.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz")]
    vocab += [("▁the", -1.0), ("▁cat", -1.0), ("sat", -1.0)]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@given(st.lists(st.sampled_from(["the", "cat", "sat", "naïve", "🎉", "x"]), min_size=2, max_size=8))
def test_sentencepiece_keeps_the_space_after_the_prompt(
    sentencepiece_tokenizer: Tokenizer, words: list[str]
) -> None:
    text = " ".join(words)
    ids = sentencepiece_tokenizer.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text
    for split in range(1, len(ids)):
        whole = "".join(pieces(sentencepiece_tokenizer, ids[split:], ids[:split]))
        head = sentencepiece_tokenizer.decode(ids[:split]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert head + whole == text


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_stop_filter_equals_cutting_the_whole_text(chunks: list[str], stops: list[str]) -> None:
    whole = "".join(chunks)
    hits = [at for stop in stops if (at := whole.find(stop)) >= 0]
    shown, stopped = "", False
    stream = StopFilter(stops)
    for chunk in chunks:
        text, stopped = stream.push(chunk)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += stream.flush()
    assert stopped is bool(hits)
    if len(stops) <= 1 or not hits:
        assert shown == (whole[: hits[0]] if hits else whole)
    else:
        # Of several stop strings the one completed first wins; nothing of it is shown.
        assert whole.startswith(shown)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)


def test_a_stop_string_over_a_token_border_shows_nothing_of_itself(
    bytes_tokenizer: Tokenizer,
) -> None:
    stream = TextStream(bytes_tokenizer.decode, [], ["ENDE", "stop"])
    out, stopped = "", False
    for token in bytes_tokenizer.encode("one END, two ENDE three"):
        text, stopped = stream.push(token)
        out += text
        assert "ENDE" not in out
        if stopped:
            break
    assert stopped
    assert out == "one END, two "


@given(st.lists(st.integers(0, 8191), max_size=30), st.integers(0, 8))
def test_remembered_pieces_change_nothing(
    builtin_tokenizer: Tokenizer, ids: list[int], prompt: int
) -> None:
    whole = builtin_tokenizer
    assert whole.pieces is not None
    slow = Detokenizer(whole.decode, ids[:prompt])
    expected = [*(slow.push(token) for token in ids[prompt:]), slow.flush()]
    for _ in range(2):  # the second time from memory
        quick = Detokenizer(whole.decode, ids[:prompt], whole.pieces)
        assert [*(quick.push(token) for token in ids[prompt:]), quick.flush()] == expected


@given(st.lists(st.integers(0, 288), max_size=40), st.integers(0, 5))
def test_remembered_pieces_change_nothing_with_byte_fallback(
    sentencepiece_tokenizer: Tokenizer, ids: list[int], prompt: int
) -> None:
    whole = sentencepiece_tokenizer
    assert whole.pieces is not None
    slow = Detokenizer(whole.decode, ids[:prompt])
    expected = [*(slow.push(token) for token in ids[prompt:]), slow.flush()]
    for _ in range(2):
        quick = Detokenizer(whole.decode, ids[:prompt], whole.pieces)
        assert [*(quick.push(token) for token in ids[prompt:]), quick.flush()] == expected


def test_known_pieces_need_no_tokenizer(bytes_tokenizer: Tokenizer) -> None:
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return bytes_tokenizer.decode(ids)

    pieces: dict[int, str] = {}
    ids = bytes_tokenizer.encode("abcabcabcabc" * 20)
    stream = Detokenizer(decode, ids[:3], pieces)
    shown = "".join(stream.push(token) for token in ids[3:])
    assert shown == ("abc" * 80)[3:]
    assert len(asked) < 10
    # A character in pieces after all that is still put together.
    assert "".join(stream.push(token) for token in bytes_tokenizer.encode("é!")) == "é!"


def test_pieces_are_not_remembered_where_neighbours_change_them() -> None:
    vocab = {"[UNK]": 0, "do": 1, "##n": 2, "'": 3, "t": 4}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert Tokenizer(backend).pieces is None
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("a b", "c")])
    assert Tokenizer(backend).pieces is None
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer(backend).pieces == {}
