"""Text for calibration and for held-out measurement: scenes of rows, tokenized into fixed-length sequences.

for scene, sequences in read_scenes(recipe.calibration, load_tokenizer(checkpoint)).items(): ...
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightship.dialogue import render_dialogue
from lightship.errors import LightshipError
from lightship.files import digest_of
from lightship.recipe import CalibrationText, FidelityText, TextSource, ThroughputLoad
from lightship.rows import Row, digest_of_rows, read_rows

if TYPE_CHECKING:
    import torch


def digest_of_text(sources: Sequence[TextSource]) -> str:
    """SHA-256 over what decides the tokens: each source's scene, settings and content, but not where a file lies.

    Raises:
        LightshipError: a file is missing, or a dataset cannot be found.
    """
    return digest_of([[_settings(source), digest_of_rows(source)] for source in sources])


def read_scenes(text: CalibrationText | FidelityText, tokenizer: Any) -> "dict[str, list[torch.Tensor]]":
    """Tokenize every scene into int64 sequences [sequence_tokens]; sources that share a scene follow one another.

    A source gives `tokens_per_scene` x its weight tokens, or as many as it has.

    Raises:
        LightshipError: see `read_sequences`.
    """
    scenes: dict[str, list[torch.Tensor]] = {}
    for source in text.sources:
        tokens = source.share(text.tokens_per_scene)
        scenes.setdefault(source.scene, []).extend(read_sequences(source, tokenizer, tokens, text.sequence_tokens))
    return scenes


def read_sequences(source: TextSource, tokenizer: Any, tokens: int, sequence_tokens: int) -> "list[torch.Tensor]":
    """Tokenize a source, document after document, into int64 sequences [sequence_tokens] until `tokens` are reached.

    Documents are joined with the tokenizer's end-of-sequence token; `messages` go through its chat template. An empty
    document is passed over.

    Raises:
        LightshipError: a file is missing, a row is not a document, or there is less than one whole sequence.
    """
    import torch

    ids: list[int] = []
    for piece in _tokenized(source, tokenizer):
        ids += piece
        if len(ids) >= tokens:
            break
    whole = min(len(ids), tokens) // sequence_tokens
    if not whole:
        raise LightshipError(
            f"scene {source.scene!r}: {source.path or source.dataset} holds {len(ids)} tokens, fewer than one sequence "
            f"of {sequence_tokens}; add text"
        )
    return list(torch.tensor(ids[: whole * sequence_tokens]).split(sequence_tokens))


def read_prompts(source: TextSource, tokenizer: Path, load: ThroughputLoad) -> list[list[int]]:
    """Prompts for a load, `load.prompt_tokens` tokens each: one a request, or as many as the text gives."""
    from lightship.causal_lm import load_tokenizer

    wanted = load.requests * load.prompt_tokens
    return [ids.tolist() for ids in read_sequences(source, load_tokenizer(tokenizer), wanted, load.prompt_tokens)]


def _settings(source: TextSource) -> dict[str, Any]:
    settings = msgspec.structs.asdict(source)
    local = source.path is not None or Path(str(source.dataset)).is_dir()
    return {k: v for k, v in settings.items() if not (local and k in ("path", "dataset"))}


def _tokenized(source: TextSource, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of row after row, with the end-of-sequence token where a document that has tokens ends."""
    started = False
    for row in read_rows(source):
        ids = _encode(_text_of(row, source, tokenizer), tokenizer, row.where)
        started = started or bool(ids)
        if started and row.ends:
            ids.append(tokenizer.eos_token_id)
            started = False
        yield ids


def _text_of(row: Row, source: TextSource, tokenizer: Any) -> str:
    names = ("messages", "text") if source.column is None else (source.column,)
    name = next((name for name in names if row.value.get(name) is not None), names[-1])
    found = row.value.get(name)
    if isinstance(found, list) or (found is not None and name == "messages"):
        return render_dialogue(found, row.value.get("tools"), source.thinking, tokenizer, row.where)
    if isinstance(found, str):
        return found
    wanted = f"has no text in column {name!r}" if source.column else 'is not {"text": …} or {"messages": […]}'
    has = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.value.items()) or "nothing"
    raise LightshipError(f"{row.where} {wanted}; it has {has}; mend the row, or name the text's column by `column`")


def _encode(text: str, tokenizer: Any, where: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LightshipError(f"{where} holds half of a surrogate pair, which is no character; mend the row") from None
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)
