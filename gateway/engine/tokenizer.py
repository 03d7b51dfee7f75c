"""Text to token ids and back, and chat templates. Torch-free; reads a checkpoint's own files.

`tokenizer.json` is read with the `tokenizers` library; only a folder without one goes through
transformers (which converts sentencepiece models, and imports torch). A repository's code is never
run; chat templates run in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from gateway.errors import InvalidRequest, ModelError

_MAX_TEMPLATE = 256 * 1024


class NoChatTemplate(InvalidRequest):
    """The model has no chat template: only plain completions work."""

    code = "no_chat_template"


class BadChat(InvalidRequest):
    """The chat template refuses these messages; the message says why."""

    code = "invalid_messages"


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_ids: tokens that end a generation (of `generation_config.json`, else the config's).
        template: source of the chat template, or None.
        pieces: texts of single tokens met so far (see `text.Detokenizer`); None where the text of
            a token depends on its neighbours.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_ids: frozenset[int] = frozenset(),
        template: str | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.eos_ids = eos_ids
        self.template = template
        self._special = dict(special or {})
        self.pieces: dict[int, str] | None = {} if _is_plain(backend.decoder) else None

    @cached_property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model expects at the beginning (BOS)."""
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 come out as U+FFFD, special tokens not at all."""
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def token_text(self, token: int) -> str:
        """Text of one token by itself, special tokens by name (for logprobs)."""
        return self.decode([token], special=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            NoChatTemplate: the model has none.
            BadChat: the template refuses the messages.
        """
        return self.encode(self.render(messages), special=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, from the model's chat template."""
        if self.template is None:
            raise NoChatTemplate("this model has no chat template; use /v1/completions")
        from jinja2 import TemplateError

        try:
            return str(
                self._template.render(
                    messages=[dict(m) for m in messages],
                    add_generation_prompt=True,
                    tools=None,
                    documents=None,
                    **self._special,
                )
            )
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BadChat(f"the chat template refuses this: {error}", param="messages") from error

    @cached_property
    def _template(self) -> Any:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise TemplateError(message)

        def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            autoescape=False,  # prompts are no HTML
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        assert self.template is not None, "render checks"
        try:
            return environment.from_string(self.template)
        except TemplateSyntaxError as error:
            raise BadChat(f"the model's chat template is broken: {error}") from error


def _is_plain(decoder: Any) -> bool:
    """Whether text is the tokens' bytes in a row, but for its very beginning."""
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    fused = False
    for part in state.get("decoders", [state]):
        kind = part.get("type")
        if kind not in {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
            return False
        # What looks at the fused text may see over the border of tokens.
        if fused and (kind == "Replace" or (kind == "Strip" and part.get("stop"))):
            return False
        fused = fused or kind == "Fuse"
    return True


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        ModelError: no tokenizer there, or one that only its repository's code could read.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    return Tokenizer(
        _backend(folder),
        eos_ids=_eos_ids(folder),
        template=_read_template(folder, config),
        special=_special_tokens(folder, config),
    )


def _backend(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer as Backend

        try:
            return Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception for every bad file
            raise ModelError(f"{file}: not a tokenizer: {error}") from error
    if not any(
        (folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")
    ):
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json or a sentencepiece model)")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder}: {type(loaded).__name__} has no fast tokenizer")
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return value


def _eos_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        if isinstance(found, int):
            return frozenset({found})
        if isinstance(found, list):
            return frozenset(int(token) for token in found)
    return frozenset()


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    found: Any = config.get("chat_template")
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    if isinstance(found, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        return None
    if len(found) > _MAX_TEMPLATE:
        raise ModelError(f"{folder}: a chat template of {len(found)} characters")
    return found


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    texts = {name: merged.get(name) for name in names}
    return {
        name: text["content"] if isinstance(text, dict) else str(text)
        for name, text in texts.items()
        if text is not None
    }
