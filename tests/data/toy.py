"""A byte-level BPE tokenizer of a few hundred tokens, and chat templates with the habits of real ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jaxalign.data.chat import Tokenizer, make_tokenizer
from jaxalign.data.records import Message

SPECIAL = ("<|bos|>", "<|eos|>", "<|turn|>", "<|end|>", "<|pad|>")

CHATML = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|turn|>system\nBe kind.<|end|>\n' }}{% endif %}" + CHATML
)
BOS = "{{ bos_token }}" + CHATML
# Drops thoughts from every answer but the last, as Qwen3 does.
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|turn|>' + m['role'] + '\n' + text + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
# Opens a thought in the generation prompt that it never writes into a conversation, as R1 does.
OPENS_THOUGHT = CHATML.replace("<|turn|>assistant\n", "<|turn|>assistant\n<think>\n")
# A BOS before every question, and the answer between spaces, as Llama 2 does.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_USER = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM_ALLOWED = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
)
# The prompt ends in a line break that may merge with what the answer begins with.
GLUED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '\n' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|turn|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


@cache
def backend() -> Any:
    """Bytes, a few merges (two line breaks among them), and the special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ċ", "Ċ"),
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("Ġw", "o"),
        ("Ġ", "a"),
    ]
    vocab = {token: i for i, token in enumerate([*letters, *dict.fromkeys(a + b for a, b in merges)])}
    made: Any = Backend(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return made


def wrap(
    template: str | None = CHATML,
    *,
    eos: str | None = "<|eos|>",
    pad: str | None = "<|pad|>",
    add_bos: bool = False,
) -> Any:
    """The same as a transformers tokenizer; `add_bos` gives it a post-processor that puts BOS in front."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    own: Any = Backend.from_str(backend().to_str())
    if add_bos:
        named = [("<|bos|>", own.token_to_id("<|bos|>"))]
        own.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=named)
    hf: Any = PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<|bos|>",
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    hf.chat_template = template
    return hf


def toy(template: str | None = CHATML, *, add_bos: bool = False, **options: Any) -> Tokenizer:
    return make_tokenizer(wrap(template, add_bos=add_bos, **options), name="toy", add_bos=add_bos)


def chat(*turns: str) -> tuple[Message, ...]:
    """`chat("s:Be brief", "u:hello", "a:hi")`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(roles[turn[0]], turn[2:]) for turn in turns)


def shared(name: str) -> Path | None:
    """A published file beside the checkout, or None."""
    path = Path(__file__).parents[3] / "shared" / "data" / name
    return path if path.exists() else None
