"""Tokenizers that gguf files carry: token ids against transformers, sentencepiece and the published regexes."""

import io

import pytest
import regex
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from selfreward_jax.errors import UserError
from selfreward_jax.weights import fetch, gguf_io

TEXTS = [
    "Hello world, it's what we'll DO'ER.",
    "1234 5678 a  12  3\n 4\t5 x=1e-10;y=0x1F 3.14159",
    "😀 👩‍👩‍👧 émoji ü ñ 漢字かな العربية ½ ² Ⅷ ٣",
    "def f(x):\n    return x ** 2\n\n\n\tif y:\n\t\tpass\r\n",
    "   lead, trail   \n\n  \n",
    "a\u00a0b \u2003c\u200b <|im_start|>user\nhi<|im_end|>\n",
    "",
]


@pytest.fixture
def gguf_of(monkeypatch, tmp_path):
    """`gguf_of(meta)`: a path whose metadata are these."""

    def make(meta):
        monkeypatch.setattr(gguf_io, "_reader", lambda path: None)
        monkeypatch.setattr(gguf_io, "_metadata", lambda reader: meta)
        return tmp_path / "m.gguf"

    return make


def byte_vocabulary(special=()):
    """Metadata of a byte-level vocabulary without merges."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    types = [3 if token in special else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b"],
    }


PUBLISHED = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", PUBLISHED)
def test_words_are_split_as_published(kind, text, gguf_of):
    built = gguf_io.tokenizer(gguf_of({**byte_vocabulary(), "tokenizer.ggml.pre": kind})).backend_tokenizer
    spans = [text[start:stop] for _, (start, stop) in built.pre_tokenizer.pre_tokenize_str(text)]
    assert spans == regex.findall(PUBLISHED[kind], text)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_digits_before_words(text, gguf_of):
    built = gguf_io.tokenizer(gguf_of({**byte_vocabulary(), "tokenizer.ggml.pre": "smollm"})).backend_tokenizer
    spans = [text[start:stop] for _, (start, stop) in built.pre_tokenizer.pre_tokenize_str(text)]
    pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
    assert spans == [word for piece in pieces for word in regex.findall(PUBLISHED["gpt-2"], piece)]


def test_special_tokens_bos_and_template(gguf_of):
    meta = byte_vocabulary(("<s>", "</s>", "<pad>")) | {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    built = gguf_io.tokenizer(gguf_of(meta))
    assert (built.bos_token, built.eos_token, built.pad_token, built.unk_token) == ("<s>", "</s>", "<pad>", None)
    assert built.chat_template == "{{ bos_token }}"
    ab = built.convert_tokens_to_ids("ab")
    assert built("ab</s>").input_ids == [0, ab, 1]  # Llama 3's opens with BOS unless the file says otherwise
    built = gguf_io.tokenizer(gguf_of({**meta, "tokenizer.ggml.add_bos_token": False}))
    assert built("ab").input_ids == [ab]
    assert built.decode([0, ab, 1], skip_special_tokens=True) == "ab"


def test_kinds_that_are_not_built_name_the_way_out(gguf_of):
    with pytest.raises(UserError, match=r"tokenizer.ggml.pre is 'tekken'.*--config.model.tokenizer=PATH_OR_NAME"):
        gguf_io.tokenizer(gguf_of({**byte_vocabulary(), "tokenizer.ggml.pre": "tekken"}))
    with pytest.raises(UserError, match=r"tokenizer.ggml.model is 'bert'.*--config.model.tokenizer=PATH_OR_NAME"):
        gguf_io.tokenizer(gguf_of({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}))
    with pytest.raises(UserError, match=r"tokenizer.ggml.model is None"):
        gguf_io.tokenizer(gguf_of({}))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_give_sentencepiece_ids(prefix, gguf_of):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = [text for text in TEXTS if text] * 4 + ["the cat sat on the mat", "that hat is at the house"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(reference.vocab_size())

    def kind(piece):
        checks = ((2, reference.is_unknown), (3, reference.is_control), (6, reference.is_byte))
        return next((number for number, check in checks if check(piece)), 1)

    built = gguf_io.tokenizer(
        gguf_of(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": [reference.id_to_piece(piece) for piece in pieces],
                "tokenizer.ggml.scores": [reference.get_score(piece) for piece in pieces],
                "tokenizer.ggml.token_type": [kind(piece) for piece in pieces],
                "tokenizer.ggml.add_space_prefix": prefix,
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.unknown_token_id": 0,
            }
        )
    )
    for text in ["the cat  sat", *(text for text in TEXTS if text)]:
        assert built(text).input_ids == [1, *reference.encode(text)], text
        assert built.decode(built(text).input_ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def demo():
    try:
        return fetch.demo_gguf()
    except UserError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.filterwarnings("ignore")  # of transformers, while it reads gguf files
def test_the_demo_tokenizer_agrees_with_transformers(demo):
    ours = gguf_io.tokenizer(demo)
    theirs = AutoTokenizer.from_pretrained(demo.parent, gguf_file=demo.name)
    assert theirs.chat_template == ours.chat_template
    assert theirs.special_tokens_map == ours.special_tokens_map
    plain = [text for text in TEXTS if not any(letter.isnumeric() for letter in text)]
    assert len(plain) >= 4
    for text in [*plain, "x1 a1b22"]:
        assert ours(text).input_ids == theirs(text).input_ids
    # transformers drops the file's `pre: smollm`: white space before digits comes out in other pieces than the model
    # was trained on. With that step put back, all texts agree.
    words = theirs.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
