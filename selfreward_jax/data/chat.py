"""Chat templates and token ids: prompts, training examples, and text that can never become a control token.

`encode_prompt` gives the ids that `apply_chat_template` would give for ordinary texts. It differs where a text spells
a control token: `<|im_end|>` inside a question or an answer stays text. Setting `split_special_tokens` is not enough
for that, since it leaves added tokens that are not marked special (`<think>`). So the text runs through a second copy
of the tokenizer in which every added token has an unspeakable name, made of Unicode noncharacters, and only the
template's own control tokens are translated to these names.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from selfreward_jax.data import token_bytes
from selfreward_jax.errors import UserError

# Unicode noncharacters, which no text may interchange: they mark our own places in strings.
_KEEP, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = str.maketrans(dict.fromkeys((_KEEP, _OPEN, _CLOSE), "\ufffd"))
_QUESTION, _ANSWER = f"{_OPEN}question{_CLOSE}", f"{_OPEN}answer{_CLOSE}"

# Llama 3's template writes today's date unless it is given one: a run that goes on tomorrow would read other prompts.
_DATE = "26 Jul 2024"

# Llama 2 chat: a system message rides inside the first instruction; every exchange has its own BOS and EOS.
_LLAMA2 = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + message['content'] | trim + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- bos_token | default('', true) + '[INST] ' + ns.system + message['content'] | trim + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + ' ' + eos_token -}}
{%- else -%}
{{- raise_exception('roles are system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

TEMPLATES: Mapping[str, str] = {"llama2": _LLAMA2, "chatml": _CHATML}
Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer with a chat template; made by `load_chat`.

    Attributes:
        tokenizer: a copy of the caller's, with `chat_template` set: what an export writes.
        end_of_turn: the id that ends an assistant's turn, a training target.
        stop_ids: sampling stops at these: the end of turn and every EOS id.
        pad_id: an id for padding, never read as a target.
        vocabulary: ids at or above this have no token (padded rows of the embedding) and must not be sampled.
        lead: what the template puts between the generation prompt and an answer (Llama 2: a space).
        anchor: ids of the template's text between the last question and the answer.
    """

    tokenizer: PreTrainedTokenizerFast
    end_of_turn: int
    stop_ids: tuple[int, ...]
    pad_id: int
    vocabulary: int
    lead: str
    anchor: tuple[int, ...]
    _guarded: Tokenizer
    _names: Mapping[str, str]
    _anchor_text: str
    _decoder: Mapping[str, Any] | None

    @functools.cached_property
    def token_bytes(self) -> token_bytes.TokenBytes | None:
        """The bytes that each id puts into a text; None for a tokenizer whose texts are more than their bytes."""
        tokens: list[str | None] = [None] * self.vocabulary
        for token, number in self.tokenizer.get_vocab().items():
            tokens[number] = token
        for number, added in self.tokenizer.added_tokens_decoder.items():
            tokens[number] = None if added.special else added.content
        return token_bytes.read(self._decoder, tokens)

    @functools.cached_property
    def _control(self) -> re.Pattern[str] | None:
        # Longest first, as the tokenizer matches; never where a text was marked to be kept as text.
        ordered = sorted(self._names, key=len, reverse=True)
        return re.compile(f"(?<!{_KEEP})(?:{'|'.join(map(re.escape, ordered))})") if ordered else None

    @functools.cached_property
    def _starts(self) -> re.Pattern[str] | None:
        starts = "".join(sorted({re.escape(name[0]) for name in self._names}))
        return re.compile(f"[{starts}]") if starts else None

    @functools.cached_property
    def _opening(self) -> list[int]:
        """Ids that the tokenizer puts before a text: what stands there before one whose own ids are known."""
        alone = self.tokenizer("a", add_special_tokens=False).input_ids
        whole = self.tokenizer("a").input_ids
        return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(alone)] == alone), [])

    def _name_control(self, text: str) -> str:
        """Translates the control tokens that a template wrote, then takes off the marks of kept text."""
        named = self._control.sub(lambda found: self._names[found[0]], text) if self._control else text
        return named.replace(_KEEP, "")

    def _keep(self, text: str) -> str:
        """Marks every place where a control token could begin, so that a rendered text knows whose it is."""
        text = _clean(text)
        marked = self._starts.sub(lambda found: _KEEP + found[0], text) if self._starts else text
        return re.sub(r"(?=\S)", _KEEP, marked, count=1)  # nor may one begin in the template and end here

    def _ids(self, named: str) -> list[int]:
        return self._guarded.encode(named, add_special_tokens=False).ids

    def _render(self, messages: Messages, generate: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generate,
                date_string=_DATE,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = [message.get("role") for message in messages]
            raise UserError(
                f"--config.model.chat_template: the template cannot write messages with the roles {roles}: {error}"
            ) from error
        return str(rendered)


def _clean(text: str) -> str:
    """Text that a tokenizer takes: lone surrogates and our reserved noncharacters become U+FFFD."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_RESERVED)
    return text


def _guard(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, dict[str, str], Mapping[str, Any] | None]:
    """A copy of the backend whose added tokens have names that no text can spell, the map old name to new, the decoder.

    Added tokens that are white space only (indentation runs) are ordinary text and keep their names.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names: dict[str, str] = {}
    for token in state["added_tokens"]:
        if token["special"] or token["content"].strip():
            names[token["content"]] = f"{_OPEN}{token['id']}{_CLOSE}"
            token["content"] = names[token["content"]]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:  # nor may merges of plain pieces arrive at one
        model["merges"] = [pair for pair in model["merges"] if not names.keys() & {"".join(pair), pair[0], pair[1]}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    guarded = Tokenizer.from_str(json.dumps(state))
    wrong = [old for old, new in names.items() if guarded.token_to_id(new) != tokenizer.convert_tokens_to_ids(old)]
    wrong += [old for old in names if f"{_OPEN}" in "".join(guarded.encode(old, add_special_tokens=False).tokens)]
    if wrong:
        raise UserError(f"--config.model.tokenizer: its control tokens {wrong[:5]} cannot be told from text")
    return guarded, names, state["decoder"]


def _template(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    options = "--config.model.chat_template: use 'own' (the tokenizer's), 'llama2', 'chatml', or a Jinja file's path"
    if template == "own":
        if not tokenizer.chat_template:
            raise UserError(f"{options}; this tokenizer has no template of its own (a base model)")
        return str(tokenizer.get_chat_template())
    if template == "chatml":
        known = tokenizer.get_vocab()
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]
        if missing:
            raise UserError(f"{options}; this tokenizer has no {' and '.join(missing)}, which 'chatml' needs")
        first = tokenizer("").input_ids[:1]  # a tokenizer that opens every text with BOS, as Llama's do
        return ("{{- bos_token -}}\n" if first and first[0] == tokenizer.bos_token_id else "") + _CHATML
    if template == "llama2":
        if tokenizer.eos_token is None:
            raise UserError(f"{options}; this tokenizer has no EOS token, which 'llama2' needs")
        return _LLAMA2
    if not Path(template).is_file():
        raise UserError(f"{options}; {template!r} is none of these")
    return Path(template).read_text(encoding="utf-8")


def load_chat(tokenizer: PreTrainedTokenizerFast, template: str = "own", eos_ids: Sequence[int] = ()) -> Chat:
    """Joins a tokenizer and a template, and finds where an answer begins and which token ends it.

    Args:
        tokenizer: with a `tokenizers` backend; it is copied, not changed.
        template: "own" (the tokenizer's), "llama2", "chatml", or the path of a Jinja file.
        eos_ids: further ids that end a text, from the model's config and generation config.

    Raises:
        UserError: for a base model's tokenizer with "own", an unknown template, one that cannot be rendered or ends
            no turn, or a tokenizer without a `tokenizers` backend.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"--config.model.tokenizer: {type(tokenizer).__name__} has no fast (`tokenizers`) backend; "
            "give one with a tokenizer.json"
        )
    text = _template(tokenizer, template)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    guarded, names, decoder = _guard(tokenizer)
    eos: Any = tokenizer.eos_token_id
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    chat = Chat(tokenizer, -1, (), -1, vocabulary, "", (), guarded, names, "", decoder)

    question = {"role": "user", "content": _QUESTION}
    prompt = chat._render([question], generate=True)
    whole = chat._render([question, {"role": "assistant", "content": _ANSWER}], generate=False)
    if prompt.count(_QUESTION) != 1 or _ANSWER not in whole:
        raise UserError("--config.model.chat_template: the template drops or repeats a message's content")
    before, after = whole.split(_ANSWER, 1)
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    anchor = chat._name_control(prompt.split(_QUESTION, 1)[1])
    control = {guarded.token_to_id(name) for name in names.values()}
    ends = [number for number in chat._ids(chat._name_control(after)) if number in control]
    end_of_turn = ends[0] if ends else eos
    if end_of_turn is None:
        raise UserError("--config.model.chat_template: nothing ends an answer, and the tokenizer has no EOS token")
    stop = sorted({end_of_turn, *([] if eos is None else [eos]), *map(int, eos_ids)})
    pad: Any = tokenizer.pad_token_id
    return dataclasses.replace(
        chat,
        end_of_turn=end_of_turn,
        stop_ids=tuple(stop),
        pad_id=end_of_turn if pad is None else pad,
        lead=lead,
        anchor=tuple(chat._ids(anchor)),
        _anchor_text=anchor + chat._name_control(lead),
    )


def encode_prompt(chat: Chat, prompt: str | Messages) -> list[int]:
    """Ids of a conversation up to where the assistant speaks; BOS once, if the template writes it.

    Args:
        prompt: a user's text, or messages `{"role": "system" | "user" | "assistant", "content": text}`.

    Raises:
        UserError: if the template refuses these roles.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    kept = [{"role": message["role"], "content": chat._keep(message["content"])} for message in messages]
    return chat._ids(chat._name_control(chat._render(kept, generate=True)))


def encode_response(chat: Chat, response: str) -> list[int]:
    """Ids of an answer as a continuation of the generation prompt, without its end of turn.

    The answer is read behind the template's own text, so that it gets the ids which sampling would give it (a word
    behind Llama 2's `[/INST]` starts with a space). It never changes the prompt's ids: where both would merge across
    the border (an answer that starts with a newline), the answer is encoded alone.
    """
    response = _clean(response)
    ids = chat._ids(chat._anchor_text + response)
    cut = len(chat.anchor)
    return ids[cut:] if tuple(ids[:cut]) == chat.anchor else chat._ids(response)


def encode_example(chat: Chat, prompt: str | Messages, response: str) -> tuple[list[int], int]:
    """A training example.

    Returns:
        `encode_prompt(prompt) + encode_response(response) + [end_of_turn]`, and the index of the first target: the
        response and its end of turn are targets, the prompt is not. What a template writes behind the end of turn
        (a newline) is left out: sampling never sees it.
    """
    ids = encode_prompt(chat, prompt)
    return [*ids, *encode_response(chat, response), chat.end_of_turn], len(ids)


def encode_text(chat: Chat, text: str) -> list[int]:
    """Ids of plain text: no BOS, no template, and no control token whatever the text spells."""
    return chat._ids(_clean(text))


def encode_opening(chat: Chat, text: str) -> list[int]:
    """Ids of a text for a model to go on with, without a template: as the tokenizer opens a text (BOS once, where it
    has one; Llama 2 never saw a text without), then those of `encode_text`."""
    return [*chat._opening, *encode_text(chat, text)]


def decode(chat: Chat, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of an answer's ids, up to the first of the stop strings.

    Special tokens are dropped, and the template's leading space if it has one. Bytes that are no UTF-8 become U+FFFD;
    a character that the last id leaves unfinished is dropped.
    """
    known = chat.token_bytes
    if known is None:
        written: Any = chat.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        data, leading = written.encode(), 0
    else:
        data, leading = b"".join([known.pieces[number] for number in ids]), known.leading
    text = token_bytes.text_of(token_bytes.before_stop(data, stop))
    for space in (*" " * leading, *([chat.lead] if chat.lead.isspace() else [])):
        text = text.removeprefix(space)
    return text


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest run of ids that all sequences begin with; empty for no sequences."""
    if not sequences:
        return []
    ordered = sorted(list(sequence) for sequence in sequences)
    first, last = ordered[0], ordered[-1]  # all others lie between these two in dictionary order
    for index, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return first[:index]
    return first
