"""Runs causal language models of the kind of Llama on a CPU: texts one after another without padding, all behind one beginning that is run already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

KINDS = ("gemma", "llama", "mistral", "qwen2", "qwen3")
ROWS = 128  # query rows of one block of attention: a block looks at no key behind its last row, and its weights stay in the CPU's cache
KeysValues = list[tuple[Tensor, Tensor]]  # of each layer; each heads × P × d/heads


class States(NamedTuple):
    """What a run leaves.

    Attributes:
        last: B × d, each text's last state behind the last layer and its norm; none, if only keys and values were asked for.
        keys_values: of each layer, of all tokens; empty unless asked for.
    """

    last: Tensor
    keys_values: KeysValues


class PackedDecoder:
    """A decoder that never reads padding: the model's own maps and norms, with keys and values of a beginning shared by all texts.

    Of the last layer, only what a text's last token needs is computed. A text's state does not depend on what runs beside it.

    Args:
        base: a causal language model of transformers without its head, in eval mode.
    """

    def __init__(self, base: Any):
        self.base, self.layers = base, list(base.layers)
        attention = self.layers[0].self_attn
        self.size, self.scale = int(attention.head_dim), float(attention.scaling)
        self.joined = [_join([getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]) for layer in self.layers]
        self.queries, self.keys = (int(map_.weight.shape[0]) for map_ in (attention.q_proj, attention.k_proj))

    @staticmethod
    def fits(base: Any) -> bool:
        """Whether PackedDecoder can run a model."""
        config = base.config
        whole = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ()) and not (
            config.model_type == "mistral" and getattr(config, "sliding_window", None)
        )
        causal = not getattr(config, "use_bidirectional_attention", None)
        return config.model_type in KINDS and whole and causal and all(p.device.type == "cpu" for p in base.parameters())

    def __call__(self, ids: Tensor, lengths: Sequence[int], shared: KeysValues | None = None, *, keep: bool = False) -> States:
        """Runs the model on B texts with T tokens together.

        Args:
            ids: T, int64, one text after another.
            lengths: of each text, at least 1.
            shared: keys and values of the P tokens that stand before each text; None: there are none.
            keep: whether keys and values are wanted, and no states. There is one text then.
        """
        before = 0 if shared is None else shared[0][0].shape[1]
        ends = [0, *accumulate(lengths)]
        positions = torch.cat([torch.arange(before, before + length, dtype=torch.int64, device=ids.device) for length in lengths])
        x: Tensor = self.base.embed_tokens(ids)
        cos, sin = (part[0][:, None] for part in self.base.rotary_emb(x[None], positions[None]))
        last, kept = torch.tensor(ends[1:], dtype=torch.int64, device=ids.device) - 1, []
        for n, (layer, (weight, bias)) in enumerate(zip(self.layers, self.joined)):
            final = n == len(self.layers) - 1
            read, attention = layer.input_layernorm(x), layer.self_attn
            if final:
                key_value = linear(read, weight[self.queries :], None if bias is None else bias[self.queries :])
                query = linear(read[last], weight[: self.queries], None if bias is None else bias[: self.queries])
            else:
                made = linear(read, weight, bias)
                query, key_value = made[:, : self.queries], made[:, self.queries :]
            query, key, value = (part.reshape(len(part), -1, self.size) for part in (query, key_value[:, : self.keys], key_value[:, self.keys :]))
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            key = _turned(key, cos, sin).transpose(0, 1)
            value = value.transpose(0, 1)
            if keep:
                kept.append((key.contiguous(), value.contiguous()))
                if final:
                    break
            query = _turned(query, cos[last], sin[last]) if final else _turned(query, cos, sin)
            mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            for i, (a, b) in enumerate(pairwise(ends)):
                own = (key[:, a:b], value[:, a:b])
                k, v = own if shared is None else (torch.cat([part, new], 1) for part, new in zip(shared[n], own))
                rows = slice(i, i + 1) if final else slice(a, b)
                self._attend(query[rows], k, v, mixed[rows])
            if final:
                x = x[last]
            x = x + attention.o_proj(mixed.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return States(x[:0] if keep else self.base.norm(x), kept)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Causal attention of a text's last L tokens over all its N tokens.

        Args:
            query: L × heads × d/heads.
            key, value: groups × N × d/heads; each group of heads shares them.
            out: as `query`; receives the result.
        """
        groups, length, before = len(key), len(query), key.shape[1] - len(query)
        later = torch.ones(min(ROWS, length), min(ROWS, length), dtype=torch.bool, device=query.device).triu(1)
        for a in range(0, length, ROWS):
            b = min(a + ROWS, length)
            q = (query[a:b] * self.scale).transpose(0, 1).reshape(groups, -1, self.size)  # the heads of a group, one after another
            weights = torch.bmm(q, key[:, : before + b].transpose(1, 2)).float().view(groups, -1, b - a, before + b)
            weights[..., before + a :].masked_fill_(later[: b - a, : b - a], -torch.inf)
            mixed = torch.bmm(weights.softmax(-1).flatten(1, 2).to(value.dtype), value[:, : before + b])
            out[a:b] = mixed.view(len(query[0]), b - a, self.size).transpose(0, 1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (T × heads × d/heads) with cosines and sines (T × 1 × d/heads)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _join(maps: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Joins weights and biases of linear maps into one tensor each. The maps' own become views, so that nothing is stored twice."""
    joined: list[Tensor] = []
    for name in ("weight", "bias"):
        parts = [getattr(one, name) for one in maps]
        if parts[0] is None:
            return joined[0], None
        joined.append(torch.cat([part.detach() for part in parts]))
        for part, own in zip(parts, torch.split(joined[-1], [len(part) for part in parts])):
            part.data = own
    return joined[0], joined[1]
