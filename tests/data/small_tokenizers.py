"""Small tokenizers of both kinds, as GPT-2's heirs and as Llama 2 have them; the same in every process."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "It is fine, 漢字 😀 and é.\n\n**Score:** 4/5\n",
    "Final score: 3\r\n  漢漢 😀😀 “Score: 2”",
    "Total score: 5\n\n\n",
] * 3


@functools.cache
def byte_level():
    """Byte-level BPE whose tokens end in the middle of characters, with added tokens that are not special."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pieces across words
    built.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    built.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    built.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "été 漢", "  \n")])
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def sentencepiece():
    """Pieces of whole words with "▁" for spaces; what is in none, a line feed among them, is a token a byte."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = []
    for word in (
        "▁▁",
        "▁It",
        "▁is",
        "▁fine",
        "Score",
        "▁Score",
        "score",
        "▁score",
        "▁Total",
        "**",
        ":",
        "4",
        "▁4",
        "/5",
        "é",
        "漢字",
    ):
        for end in range(1, len(word) + 1):
            tokens += [letter for letter in word if letter not in tokens]
            if word[:end] not in tokens:
                merges.append((word[: end - 1], word[end - 1]))
                tokens.append(word[:end])
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    built = Tokenizer(model)
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
