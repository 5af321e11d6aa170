"""A tiny tokenizer, made on the spot: words and punctuation over a fixed vocabulary, with or without a chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}"
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.name }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
"""Ids 0 to 4."""

MERGES = [("a", "b"), ("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s"), ("Ġ", "n"), ("Ġn", "o")]
"""What is more than one byte: `ab`, ` yes`, ` no` and the parts on the way."""


def tiny_tokenizer(chat: bool = True, reverse: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: id 5 + b for byte number b of the alphabet, then `MERGES`; puts <s> before text.

    With `chat`: a ChatML template that writes <s> itself, and <|im_end|> as eos; otherwise eos is </s>.
    With `reverse` the bytes have their ids in the opposite order: another tokenizer of the same size.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {token: id for id, token in enumerate([*SPECIAL, *letters, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat else "</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML if chat else None,
    )
