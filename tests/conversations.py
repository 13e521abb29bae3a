"""Made-up conversations, and a small tokenizer with the special tokens of the shipped chat templates."""

import random
from functools import cache

from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>",
           "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]  # fmt: skip
WORDS = [
    "the",
    "tide",
    "comes",
    "in",
    "twice",
    "a",
    "day,",
    "rust:",
    "sing!",
    "12.5",
    "%",
    "é",
    "東京",
    "\n\n\t{x}",
    "'a'",
    "...",
]


def made_up(count: int = 50, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to four exchanges, a third of them with a system message; contents have odd characters."""
    rng = random.Random(seed)

    def content() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "yes"

    talks = []
    for number in range(count):
        talk = [{"role": "system", "content": content()}] if number % 3 == 0 else []
        for _ in range(rng.randint(1, 4)):
            talk += [{"role": "user", "content": content()}, {"role": "assistant", "content": content()}]
        talks.append(talk)
    return talks


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 300 merges and the words of Llama 3 and Qwen: line feeds in a row are one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    texts = [turn["content"] for talk in made_up() for turn in talk] + ["user assistant system\n\n [INST] [/INST]"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=570, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:8],
    )  # fmt: skip
