"""Runs BERT and its kind on a CPU, on texts one after another without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rerank_kernels import add_norm_, bias_gelu_, packed_attention
from rerank_lab.models.padded import ForwardOutput

ARCHITECTURES = ("BertModel", "RobertaModel", "XLMRobertaModel")


class Packed:
    """A transformer that never reads padding: the same weights and arithmetic as the model, in fewer passes over memory.

    One matrix product makes queries, keys and values; their weights are joined, and the model's own become views. Each text
    attends only to itself. If only the first token is wanted, the last layer computes only that one. In fp32 the products
    leave biases out, and the operation that reads the result adds them. Attention does not change the bias of values, so
    it is merged into the bias of the linear map after attention.

    Args:
        model: a BertModel, RobertaModel or XLMRobertaModel in eval mode on the CPU, fp32.
        dtype: of linear maps and attention. Residual sums, norms and embeddings stay fp32. The model's linear maps are
            converted in place.
        token_types: whether the model's tokenizer gives segments; False: all segments are 0.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, *, token_types: bool = True):
        self.model, self.dtype, self.token_types, self.equal_lengths, config = model, dtype, token_types, False, model.config
        model.encoder.requires_grad_(False)
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(dtype)
        self.heads, self.width = int(config.num_attention_heads), int(config.hidden_size)
        self.pad_id = None if type(model).__name__ == "BertModel" else int(config.pad_token_id)
        self.joined = [_join([getattr(layer.attention.self, name) for name in ("query", "key", "value")]) for layer in model.encoder.layer]
        self.plain = dtype == torch.float32
        self.layers = [_Layer.of(layer, bias[2 * self.width :] if self.plain else None) for layer, (_, bias) in zip(model.encoder.layer, self.joined)]
        self.gelu = self.plain and config.hidden_act == "gelu"

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether Packed can run a transformer."""
        config = model.config
        plain = getattr(config, "position_embedding_type", "absolute") in (None, "absolute") and not getattr(config, "is_decoder", False)
        on_cpu = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
        return type(model).__name__ in ARCHITECTURES and plain and on_cpu

    def __call__(
        self,
        ids: Tensor,
        types: Tensor,
        lengths: Sequence[int],
        attended: Sequence[int] | None = None,
        *,
        first: bool = False,
        keep: int | None = None,
        keys_values: range = range(0),
    ) -> ForwardOutput:
        """Runs the model on B texts with T tokens together.

        Args:
            ids, types: T, int64, one text after another.
            lengths: of each text, at least 1.
            attended: how many tokens of each text, from the first, its tokens attend to; None: all of them.
            first: whether only each text's first token of the last layer is wanted.
            keep: a layer whose input is wanted too; None: no layer.
            keys_values: layers whose keys and values are wanted too.
        """
        ends = torch.tensor([0, *lengths], dtype=torch.int64, device=ids.device).cumsum(0)
        types = types if self.token_types else torch.zeros_like(types)
        starts = torch.repeat_interleave(ends[:-1], ends.diff())
        positions = torch.arange(len(ids), dtype=torch.int64, device=ids.device) - starts
        key_ends, keys = ends, None
        if attended is not None:
            counts = torch.tensor(attended, dtype=torch.int64, device=ids.device)
            keys = positions < torch.repeat_interleave(counts, ends.diff())
            key_ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if self.pad_id is not None:  # RoBERTa's positions begin after pad_id; a padding token inside a text gets pad_id and is not counted
            present = (ids != self.pad_id).long()
            before = torch.cat([present.new_zeros(1), present.cumsum(0)])
            positions = (before[1:] - before[starts]) * present + self.pad_id
        x: Tensor = self.model.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]
        kept, seen, d = {}, [], self.width
        for n, (layer, (weight, bias)) in enumerate(zip(self.layers, self.joined)):
            if n == keep:
                kept[n] = x
            read, asked = x.to(self.dtype), ends
            bare = self.plain and n not in keys_values  # biases are added by the next operation
            if first and n == len(self.layers) - 1:
                asked = torch.arange(len(ends), dtype=torch.int64, device=ids.device)
                joined, rows = linear(read, weight[d:], None if bare else bias[d:]), x[ends[:-1]]
                queries = linear(read[ends[:-1]], weight[:d], None if bare else bias[:d])
            else:
                joined, rows = linear(read, weight, None if bare else bias), x
                queries, joined = joined[:, :d], joined[:, d:]
            if n in keys_values:
                seen.append(joined)
            read_by = joined if keys is None else joined[keys]
            mixed = packed_attention(queries, read_by[:, :d], read_by[:, d:], asked, key_ends, self.heads, bias[:d] if bare else None)
            x = self._after(layer, mixed, rows, layer.behind if bare else layer.attended.bias)
        return ForwardOutput(x, kept, torch.cat(seen, 1) if seen else None)

    def _after(self, layer: _Layer, attended: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The part of a layer after attention. `bias` is the bias of the linear map that follows attention."""
        x, up = self._add_norm(layer.attended, attended, bias, rows), layer.up
        if self.gelu:
            wide = bias_gelu_(linear(x, up.weight), up.bias)
        else:
            wide = layer.activation(linear(x.to(self.dtype), up.weight, up.bias))
        return self._add_norm(layer.down, wide, layer.down.bias, x)

    def _add_norm(self, output: _Output, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if self.plain:
            return add_norm_(linear(x, output.weight), bias, residual, output.scale, output.shift, output.eps)
        return add_norm_(linear(x, output.weight, bias).float(), None, residual, output.scale, output.shift, output.eps)


class _Linear(NamedTuple):
    """The tensors of a linear map. A module looks them up by name on every call, which is slower."""

    weight: Tensor
    bias: Tensor


class _Output(NamedTuple):
    """A linear map and the norm after it."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, output: Any) -> _Output:
        return cls(output.dense.weight, output.dense.bias, output.LayerNorm.weight, output.LayerNorm.bias, output.LayerNorm.eps)


class _Layer(NamedTuple):
    """The part of a layer after attention.

    Attributes:
        attended, up, down: its linear maps, in order.
        activation: between `up` and `down`.
        behind: the bias of `attended` with the bias of values merged into it; None if values keep their bias.
    """

    attended: _Output
    up: _Linear
    activation: Any
    down: _Output
    behind: Tensor | None

    @classmethod
    def of(cls, layer: Any, values: Tensor | None) -> _Layer:
        attended, inner = _Output.of(layer.attention.output), layer.intermediate
        behind = None if values is None else linear(values, attended.weight, attended.bias)
        return cls(attended, _Linear(inner.dense.weight, inner.dense.bias), inner.intermediate_act_fn, _Output.of(layer.output), behind)


def _join(parts: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Joins the weights and the biases of linear maps into one tensor each. The maps' own tensors become views, so that nothing is stored twice."""
    weight, bias = (torch.cat([getattr(part, name).detach() for part in parts]) for name in ("weight", "bias"))
    for part, own_weight, own_bias in zip(parts, weight.chunk(len(parts)), bias.chunk(len(parts))):
        part.weight.data, part.bias.data = own_weight, own_bias
    return weight, bias
