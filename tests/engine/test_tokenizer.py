"""The tokenizer agrees with transformers'; templates run in a sandbox; bad files are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config import BUILTIN
from gateway.engine.tokenizer import BadChat, NoChatTemplate, Tokenizer, load_tokenizer
from gateway.errors import ModelError

from .conftest import save_json

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, né 🎉"}]


def test_agrees_with_transformers(builtin_tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(BUILTIN)
    for text in ("", "The function returns", " naïve 🎉\n\tx", "<|endoftext|>a"):
        ids = builtin_tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert builtin_tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert builtin_tokenizer.chat(MESSAGES) == expected
    assert builtin_tokenizer.vocab_size == len(theirs)
    assert builtin_tokenizer.eos_ids == {theirs.eos_token_id}


def test_needs_no_torch() -> None:
    code = (
        "import sys; from gateway.config import BUILTIN;"
        "from gateway.engine.tokenizer import load_tokenizer;"
        "load_tokenizer(BUILTIN).chat([{'role': 'user', 'content': 'x'}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(BUILTIN / "tokenizer.json", tmp_path)
    return tmp_path


def test_eos_may_be_a_list(folder: Path) -> None:
    save_json(folder / "config.json", {"eos_token_id": 5})
    assert load_tokenizer(folder).eos_ids == {5}
    save_json(folder / "generation_config.json", {"eos_token_id": [3, 4]})
    assert load_tokenizer(folder).eos_ids == {3, 4}


def test_a_model_without_a_template_says_so(folder: Path) -> None:
    with pytest.raises(NoChatTemplate):
        load_tokenizer(folder).chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ raise_exception('roles must alternate') }}", id="refusal"),
        pytest.param("{{ messages.__class__.__mro__ }}", id="escape"),
        pytest.param("{{ messages.append(1) }}", id="mutation"),
        pytest.param("{% for %}", id="syntax"),
        pytest.param("{{ messages[0].content + 1 }}", id="type"),
    ],
)
def test_a_bad_or_hostile_template_is_an_error(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadChat):
        load_tokenizer(folder).chat(MESSAGES)


def test_special_tokens_reach_the_template(folder: Path) -> None:
    save_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": "{{bos_token}}|{{eos_token}}",
        },
    )
    assert load_tokenizer(folder).render(MESSAGES) == "<s>|</s>"


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
