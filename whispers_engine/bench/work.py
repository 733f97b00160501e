"""The least that a model's step must read and compute, with the weights as they are kept."""

from __future__ import annotations

from dataclasses import dataclass

from whispers_engine.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """One model in one precision.

    Attributes:
        item: bytes a number: of keys and values, and of an embedding table that is not the head.
        stored: bytes of all weights that are kept.
    """

    config: ModelConfig
    item: int
    stored: int

    @property
    def _layer(self) -> int:
        """Weights of one layer's matrices."""
        c = self.config
        attention = (2 * c.q_heads + 2 * c.kv_heads) * c.head_dim
        return c.hidden_size * (attention + 3 * c.intermediate_size)

    @property
    def _head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def weights(self) -> int:
        """Bytes of all weights that a step reads whole: every matrix, the head, the norms."""
        return self.stored - (0 if self.config.tied_head else self._head * self.item)

    @property
    def position(self) -> int:
        """Bytes of one position's keys and values in all layers."""
        c = self.config
        return 2 * c.num_layers * c.kv_heads * c.head_dim * self.item

    def decode(self, experts: int, context: int, own: float) -> tuple[float, float]:
        """Bytes and operations of one step of E rows: the context's keys once, `own` further ones for each expert."""
        c = self.config
        moved = self.weights + self.position * (context + experts * own)
        attention = 4 * c.q_heads * c.head_dim * c.num_layers * (context + own)
        return moved, experts * (2 * (c.num_layers * self._layer + self._head) + attention)

    def prefill(self, tokens: int) -> tuple[float, float]:
        """Bytes and operations of a prompt from nothing to its last token's logits.

        Of all other tokens the last layer's keys and values alone are ever read.
        """
        c = self.config
        layers, stored = c.num_layers - 1, 2 * c.hidden_size * c.kv_heads * c.head_dim
        linears = tokens * (layers * self._layer + stored) + self._layer - stored
        pairs = layers * tokens * (tokens + 1) / 2 + tokens  # of a query and a key
        flops = 2 * (linears + self._head) + 4 * c.q_heads * c.head_dim * pairs
        return self.weights + self.position * tokens, flops
