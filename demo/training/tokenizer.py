"""Train the demo's byte-level BPE tokenizer and write its files as a release has them.

python demo/training/tokenizer.py        # writes demo/checkpoint/tokenizer.json and tokenizer_config.json
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import corpus
from questions import DEMO
from tables import CAPITALS, ELEMENTS, OPPOSITES, WORDS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, USER, ASSISTANT = "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"
SPECIALS = [BOS, EOS, PAD, USER, ASSISTANT]
VOCABULARY = 1152
CHECKPOINT = DEMO / "checkpoint"

# An option's letter with its line break, numbers by twos, words, signs, and white space.
PIECES = r"\n[A-J]\.(?= )| ?\d{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\n+| +(?=\S)|\s"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% else %}"
    f"{{{{ '{USER}' + message['content'] }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def sample(seed: int = 5) -> Iterator[str]:
    """The texts the merges are learned from: mostly questions, so that their words become single tokens."""
    rng = random.Random(seed)
    for _ in range(2500):
        yield "".join(part for pair in corpus.question_document(rng, 4) for part in pair)
    for _ in range(3000):
        yield from (message["content"] for message in corpus.small_talk(rng))
    for word in (*WORDS, *CAPITALS, *CAPITALS.values(), *(w for pair in (*ELEMENTS, *OPPOSITES) for w in pair)):
        yield f" {word}" * 2000
    for scene in ("prose", "code"):
        yield from corpus.texts(scene, "train")


def train() -> Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(train(), CHECKPOINT)
