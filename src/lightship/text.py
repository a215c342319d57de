"""Text for calibration and for held-out measurement: JSON lines per scene, tokenized into fixed-length sequences."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import LightshipError
from lightship.files import digest_of, digest_of_file
from lightship.recipe import TextSource, ThroughputLoad

if TYPE_CHECKING:
    import torch


def digest_of_text(sources: Sequence[TextSource]) -> str:
    """SHA-256 over the scenes' names and the content of their files.

    Raises:
        LightshipError: a file is missing.
    """
    return digest_of([[source.scene, digest_of_file(_existing(source))] for source in sources])


def read_sequences(source: TextSource, tokenizer: Any, tokens: int, sequence_tokens: int) -> "list[torch.Tensor]":
    """Tokenize a scene, document after document, into int64 sequences [sequence_tokens] until `tokens` are reached.

    Documents are joined with the tokenizer's end-of-sequence token; `messages` go through its chat template.

    Raises:
        LightshipError: the file is missing, a line is not a document, or there is less than one whole sequence.
    """
    import torch

    ids: list[int] = []
    path = _existing(source)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        ids += _document_ids(line, f"{path}:{number}", tokenizer)
        if len(ids) >= tokens:
            break
    sequences = torch.tensor(ids[:tokens]).split(sequence_tokens)
    whole = [s for s in sequences if len(s) == sequence_tokens]
    if not whole:
        raise LightshipError(f"{path} holds {len(ids)} tokens, fewer than one sequence of {sequence_tokens}; add text")
    return whole


def read_prompts(source: TextSource, tokenizer: Path, load: ThroughputLoad) -> list[list[int]]:
    """Prompts for a load, `load.prompt_tokens` tokens each: one a request, or as many as the text gives."""
    from lightship.causal_lm import load_tokenizer

    wanted = load.requests * load.prompt_tokens
    return [ids.tolist() for ids in read_sequences(source, load_tokenizer(tokenizer), wanted, load.prompt_tokens)]


def _document_ids(line: str, where: str, tokenizer: Any) -> list[int]:
    try:
        document = json.loads(line)
        if "messages" in document:
            text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
        else:
            text = document["text"]
    except (ValueError, KeyError, TypeError):
        raise LightshipError(f'{where} is not {{"text": …}} or {{"messages": […]}}') from None
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def _existing(source: TextSource) -> Path:
    path = Path(source.path)
    if not path.is_file():
        raise LightshipError(f"the text of scene {source.scene!r} is missing: {path}; check the recipe's paths")
    return path


def read_scenes(text: Any, tokenizer: Any) -> "dict[str, list[torch.Tensor]]":
    return {s.scene: read_sequences(s, tokenizer, text.tokens_per_scene, text.sequence_tokens) for s in text.sources}
