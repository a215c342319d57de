"""The source model, one block at a time: only the block at work has weights, and never its routed experts.

transformers builds the architecture without memory; a block's attention, norms, router and shared expert are read when
it is entered and dropped when it is left. In the place of the routed experts stands a tap that keeps what would have
reached them and gives zeros: since a MoE layer's output is a sum, the experts' share is added afterwards, an expert at
a time. Multi-token-prediction layers, which transformers does not build, are entered as DeepSeek describes: the
projection of the next token's embedding beside the last hidden state.

Shape suffixes: B sequences, S tokens of one, T = B * S, H hidden size, K experts a token.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightship.causal_lm import fill, meta_model
from lightship.checkpoint import Checkpoint

BATCH_TOKENS = 8192
"""Calibration tokens that go through a block at once."""


@dataclass(frozen=True)
class MoEInputs:
    """What reaches a layer's experts: x_TH hidden states, experts_TK chosen, weights_TK theirs."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor


class ExpertTap(nn.Module):
    """Takes the place of a layer's routed experts; `seen` is what the last call would have given them."""

    seen: MoEInputs | None = None

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        self.seen = MoEInputs(x_TH, experts_TK, weights_TK)
        return torch.zeros_like(x_TH)


class MTPEntry(nn.Module):
    """What leads into a multi-token-prediction layer."""

    def __init__(self, norm: type[nn.Module], hidden_size: int, eps: float) -> None:
        super().__init__()
        self.enorm = norm(hidden_size, eps=eps)
        self.hnorm = norm(hidden_size, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, next_embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.eh_proj(torch.cat([self.enorm(next_embeddings), self.hnorm(hidden)], dim=-1))


class Block:
    """One decoder layer with its weights, without its routed experts."""

    def __init__(self, layer: nn.Module, tap: ExpertTap | None, context: "BlockStream") -> None:
        self._layer = layer
        self._tap = tap
        self._context = context

    def __call__(self, hidden_BSH: torch.Tensor) -> tuple[torch.Tensor, MoEInputs | None]:
        """Hidden states in, hidden states out without the routed experts' share, and what reaches those."""
        arguments = self._context.arguments(*hidden_BSH.shape[:2])
        out_BSH = self._layer(hidden_BSH, **arguments)
        return out_BSH, self._tap.seen if self._tap else None


class BlockStream:
    """A checkpoint's blocks, each loaded to `device` in `dtype` while it is used."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._reader = checkpoint.reader()
        self._model = meta_model(checkpoint, dtype)
        self._body = self._model.model
        self._body.rotary_emb.to(device)
        self._layers = list(self._body.layers)
        self._arguments: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def main_layers(self) -> int:
        return len(self._layers)

    @contextmanager
    def embedding(self) -> Iterator[nn.Module]:
        """The token embedding: int64 [B, S] -> [B, S, H]."""
        yield self._filled(copy.deepcopy(self._body.embed_tokens), "model.embed_tokens")

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        yield self._filled(copy.deepcopy(self._body.norm), "model.norm")

    @contextmanager
    def block(self, number: int) -> Iterator[Block]:
        """Layer `number`; numbers from `main_layers` on are multi-token-prediction layers."""
        layer = copy.deepcopy(self._layers[min(number, self.main_layers - 1)])
        tap = None
        if hasattr(layer.mlp, "experts"):
            tap = layer.mlp.experts = ExpertTap()
        yield Block(self._filled(layer, f"model.layers.{number}"), tap, self)

    @contextmanager
    def mtp_entry(self, number: int) -> Iterator[nn.Module]:
        """What leads into multi-token-prediction layer `number`: (next embeddings, hidden) [B, S, H] -> [B, S, H]."""
        norm = self._body.norm
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        with torch.device("meta"):
            entry = MTPEntry(type(norm), self.checkpoint.dimensions.hidden_size, eps)
        yield self._filled(entry, f"model.layers.{number}")

    def arguments(self, sequences: int, tokens: int) -> dict[str, Any]:
        """What the model hands to every layer for a batch of that shape: positions, mask."""
        if (sequences, tokens) not in self._arguments:
            layers, self._body.layers = self._body.layers, nn.ModuleList([_Catcher()])
            try:
                embeddings = torch.zeros(
                    sequences, tokens, self.checkpoint.dimensions.hidden_size, dtype=self.dtype, device=self.device
                )
                self._body(inputs_embeds=embeddings, use_cache=False)
            except _CaughtError as caught:
                self._arguments[sequences, tokens] = caught.arguments
            finally:
                self._body.layers = layers
        return self._arguments[sequences, tokens]

    def _filled(self, module: nn.Module, name: str) -> nn.Module:
        fill(module, name, self._reader, self.dtype, self.device)
        return module.eval()


class _CaughtError(Exception):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _Catcher(nn.Module):
    """In the place of the first layer: hands out what the model gave it."""

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ARG002
        raise _CaughtError(arguments)
