"""Tokenizers as transformers' AutoTokenizer loads them: from a user's folder, and from one that is
handed on.

Three things decide which class it takes (transformers 5.23, `tokenization_auto.py`):
`tokenizer_class` in tokenizer_config.json, the `model_type` in the config.json beside it, and a
list of model types whose class it always takes, whatever the folder says (qwen2 and qwen3_5 among
them). Classes of that kind build a normalizer and a pre-tokenizer of their own and take only the
vocabulary from tokenizer.json. So every tokenizer that is handed on is loaded again and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from trainer.data.fault import first_line
from trainer.data.native import FILES, bounded, decoded, encoded, is_of_library, require_numbers, silent_panics

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The properties of a tokenizer that its user sees, besides the tokens.
SETTINGS = (
    *NAMED,
    *("extra_special_tokens", "chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names"),
    *("split_special_tokens", "clean_up_tokenization_spaces"),
)
# Paths on the machine that saved the tokenizer, and code, which is never run here.
NOT_KEPT = ("auto_map", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
# Takes tokenizer.json as it is, in every version of transformers.
PLAIN_CLASS = "PreTrainedTokenizerFast"
# transformers does not know this class. Unless it may run this file, it takes the class we name
# beside it.
CODE = "tokenizer_as_saved.py"
AUTO_MAP = {"AutoTokenizer": [None, f"{CODE.removesuffix('.py')}.TokenizerAsSaved"]}
SOURCE = '''"""This folder's tokenizer as its tokenizer.json has it.

By the model's type alone transformers would build another one.
"""

from transformers import PreTrainedTokenizerFast


class TokenizerAsSaved(PreTrainedTokenizerFast):
    pass
'''
TEXTS = (
    "Hello, world! It's the 3rd time we're here; don't stop.",
    "def f(x):\n    return [x, -1.5e3]  # two\n\n\n\tif  y:\r\n",
    "  leading, trailing  and   inner spaces   ",
    "UPPER lower CamelCase snake_case https://example.org/?a=1&b=2",
    "12345 67,890.12 ½ ² Ⅳ １２３",
    "naïve café Å ﬁ ﬀ ß İstanbul ǅ",
    # Decomposed, which some normalize.
    "nai\u0308ve cafe\u0301 A\u030a \u1100\u1161 \u0041\u030a\u0301",
    "你好，世界。こんにちは 안녕하세요 สวัสดี नमस्ते Привет مرحبا שלום",
    "🙂 👩‍👩‍👧 🇩🇪 \u200b\u00a0\u3000\ufeff\u2028x\x07\x7f",
    "a" * 60 + " " * 20 + "\n" * 5 + "!?" * 8,
    "▁a Ġb ##c @@ <0x41> <unk>",
    "",
)
# Bytes: allows twenty seconds more, because disks that many ranks share are slow.
IMPORTS = 2_000_000
ADDED = 24  # added tokens that get texts of their own; one more text has all of them


def load(name: str) -> tuple[dict[str, Any], Any]:
    """Return the tokenizer_config.json of a folder or hub name, less what is never kept, and the
    tokenizer transformers loads.

    Raises whatever transformers raises if it cannot load a tokenizer, or if the tokenizer has no
    form as tokenizer.json.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    loaded, config = bounded(
        lambda: (AutoTokenizer.from_pretrained(name, trust_remote_code=False), kept(get_tokenizer_config(name))),
        f"reading it from {name}",
        size=_size(Path(name)),
    )
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Backend):
        raise TypeError(f"a {type(loaded).__name__} has no form as tokenizer.json")
    require_numbers(loaded.backend_tokenizer)
    if loaded.chat_template:
        config["chat_template"] = templates_in_config(
            loaded.chat_template if isinstance(loaded.chat_template, dict) else {"default": loaded.chat_template}
        )
    return config, loaded


def _size(folder: Path) -> int | None:
    """Return the bytes to be read, with the classes that transformers reads; None for a hub name,
    which its client reads at its own pace."""
    if not folder.is_dir():
        return None
    return IMPORTS + sum(path.stat().st_size for name in FILES if (path := folder / name).is_file())


def backend_of(loaded: Any) -> Backend:
    """Return the backend of what `load` returned as a file would give it back: scores of pieces may
    lose their last digit there."""
    return Backend.from_str(loaded.backend_tokenizer.to_str())


def reason(error: Exception, folder: Path | None = None) -> str:
    """Return the error in one line. transformers takes a sentencepiece file for another kind if
    that package is missing."""
    if folder is not None and (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
        return "its tokenizer.model needs the package sentencepiece: pip install sentencepiece"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_KEPT and not key.startswith("_")}


def templates_in_config(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Return chat templates, given by name, in the form of tokenizer_config.json."""
    if list(templates) == ["default"]:
        return templates["default"]
    return [{"name": name, "template": template} for name, template in templates.items()]


def named_by(loaded: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return special tokens that the config does not name, or names otherwise.

    They come from an older special_tokens_map.json, or are those of the class.
    """
    found: dict[str, Any] = {}
    for name in NAMED:
        token, said = getattr(loaded, name), config.get(name)
        if token is not None and str(token) != (said.get("content") if isinstance(said, dict) else said):
            found[name] = str(token)
    if loaded.extra_special_tokens and not {"extra_special_tokens", "additional_special_tokens"} & config.keys():
        found["extra_special_tokens"] = [str(token) for token in loaded.extra_special_tokens]
    return found


def settings_of(loaded: Any) -> dict[str, Any]:
    """Return the settings of `loaded` besides its tokens, as JSON values."""
    return {name: getattr(loaded, name) if name == "chat_template" else _plain(getattr(loaded, name)) for name in SETTINGS}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def first_difference(ours: Backend, theirs: Backend) -> str | None:
    """Return the first text that two tokenizers encode or decode differently, and how; None if
    there is none."""

    def compare() -> str | None:
        with _exact(ours), _exact(theirs):
            return next((told for text in _battery(ours) if (told := _difference(ours, theirs, text))), None)

    with silent_panics():
        return bounded(compare, "encoding short texts", size=0)


@contextmanager
def _exact(backend: Backend) -> Iterator[None]:
    """Switch off truncation, padding and dropout inside the context."""
    backend.no_truncation()
    backend.no_padding()
    dropout, split = getattr(backend.model, "dropout", None), backend.encode_special_tokens
    if dropout:
        backend.model.dropout = None
    try:
        yield
    finally:
        backend.encode_special_tokens = split
        if dropout:
            backend.model.dropout = dropout


def _battery(backend: Backend) -> Iterator[str]:
    yield from TEXTS
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    for token in islice(added, ADDED):
        yield from (token, f"a {token} b", f"a{token}{token}\n{token}", f"A{token.lower()} {token.upper()}")
    yield "".join(added)
    yield f"a{' '.join(added)}b"


def _difference(ours: Backend, theirs: Backend, text: str) -> str | None:
    """Return how two tokenizers differ on a text, or None. If both fail on it in the same way, they
    do not differ."""
    for split in (False, True):
        ours.encode_special_tokens = theirs.encode_special_tokens = split
        for around in (True, False):
            a, b = (_Read.of(backend, text, around=around) for backend in (ours, theirs))
            if a.same_as != b.same_as:
                return f"{text[:40]!r} is {a} and {b}"
    a, b = (_Read.of(backend, (text, TEXTS[0]), around=True) for backend in (ours, theirs))
    if a.same_as != b.same_as:
        return f"the pair of {text[:40]!r} and another is {a} and {b}"
    for skip in (False, True):
        x, y = (_tried(partial(decoded, backend, a.ids, skip_special=skip)) for backend in (ours, theirs))
        if x != y:
            return f"the tokens of {text[:40]!r} are read back as {x[:40]!r} and {y[:40]!r}"
    return None


@dataclass(frozen=True)
class _Read:
    """A text as a tokenizer reads it, or the reason why it cannot."""

    tokens: Sequence[str] = ()
    ids: Sequence[int] = ()
    type_ids: Sequence[int] = ()
    failure: str = ""

    @classmethod
    def of(cls, backend: Backend, text: Any, *, around: bool) -> _Read:
        found = _tried(partial(encoded, backend, [text], around=around, places=True))
        return cls(failure=found) if isinstance(found, str) else cls(found[0].tokens, found[0].ids, found[0].type_ids)

    @property
    def same_as(self) -> tuple[Any, ...]:
        return self.ids, self.type_ids, self.failure

    def __str__(self) -> str:
        return f"refused ({self.failure})" if self.failure else f"{len(self.ids)} tokens {self.tokens[:8]}"


def _tried(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or the library's message if it fails."""
    try:
        return work()
    except BaseException as error:  # a panic of the library is not an Exception
        if not is_of_library(error):
            raise
        return first_line(error)


def save_code(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names beside the tokenizer."""
    (folder / CODE).write_text(SOURCE, encoding="utf-8")
