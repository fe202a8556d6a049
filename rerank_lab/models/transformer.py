"""What runs a Hugging Face transformer over texts that stand one after another: Packed for BERT's kind on a CPU, Padded for all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rerank_kernels import add_norm_, bias_gelu_, packed_attention

KINDS = ("BertModel", "RobertaModel", "XLMRobertaModel")


@dataclass
class States:
    """What a forward leaves of B texts, T tokens together.

    Attributes:
        last: T × d, the last layer's; B × d where only the first token of each was asked for.
        kept: number of a layer → T × d, what goes into it.
        keys_values: T × 2·d·S, keys and values of the layers asked for, in turn.
    """

    last: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    keys_values: Tensor | None = None


class Padded:
    """Any transformer, run as it is on texts padded to the longest.

    Args:
        model: in eval mode; a head may stand on it.
        pad_id: the tokenizer's padding token.
        token_types: whether it takes token_type_ids.
        alike: it reads padding, so that texts of one length alone may share a batch (`reads_padding`).
    """

    def __init__(self, model: Any, pad_id: int, token_types: bool, alike: bool = False):
        self.model, self.pad_id, self.token_types, self.alike = model, pad_id, token_types, alike

    def inputs(self, ids: Tensor, types: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        """B × L of what the model takes, of packed tokens."""
        mask = torch.arange(max(1, *lengths), dtype=torch.int64, device=ids.device) < torch.tensor(lengths, dtype=torch.int64, device=ids.device)[:, None]
        padded = {
            "input_ids": torch.full(mask.shape, self.pad_id, dtype=torch.int64, device=ids.device).masked_scatter_(mask, ids),
            "attention_mask": mask.long(),
        }
        if self.token_types:
            padded["token_type_ids"] = torch.zeros_like(padded["input_ids"]).masked_scatter_(mask, types)
        return {name: tensor.to(self.model.device) for name, tensor in padded.items()}

    def logits(self, ids: Tensor, types: Tensor, lengths: Sequence[int]) -> Tensor:
        """B × labels, of a model with a head."""
        logits: Tensor = self.model(**self.inputs(ids, types, lengths)).logits
        return logits

    def __call__(self, ids: Tensor, types: Tensor, lengths: Sequence[int], *, keep: int | None = None, keys_values: range = range(0)) -> States:
        """As Packed's; `first` there only saves work."""
        inputs, seen, hooks = self.inputs(ids, types, lengths), [], []
        for part in [getattr(self.model.encoder.layer[n].attention.self, name) for n in keys_values for name in ("key", "value")]:
            hooks.append(part.register_forward_hook(lambda _, __, output: seen.append(output)))
        try:
            output = self.model(**inputs, output_hidden_states=keep is not None)
        finally:
            for hook in hooks:
                hook.remove()
        inside = inputs["attention_mask"].bool()
        kept = {} if keep is None else {keep: output.hidden_states[keep][inside].float()}
        return States(output.last_hidden_state[inside].float(), kept, torch.cat([part[inside] for part in seen], 1) if seen else None)


@torch.inference_mode()
def reads_padding(network: Padded) -> bool:
    """Whether what a transformer makes of a text depends on the padding behind it, which its mask should hide; convolutions and Fourier transforms do."""
    vocabulary = int(getattr(network.model.config, "vocab_size", 0) or 0)
    ids = [n for n in range(vocabulary - 1, 0, -1) if n != network.pad_id][:8]

    def made(*texts: list[int]) -> Tensor:
        flat = torch.tensor([n for text in texts for n in text], dtype=torch.int64, device="cpu")
        output = network.model(**network.inputs(flat, torch.zeros_like(flat), [len(text) for text in texts]))
        found: Tensor = output.logits[0] if hasattr(output, "logits") else output.last_hidden_state[0, :3]
        return found.float()

    alone, padded = made(ids[:3]), made(ids[:3], ids)
    return not torch.allclose(alone, padded, rtol=1e-3, atol=1e-3 * float(alone.abs().mean()))


class Packed:
    """A transformer that never sees padding: the same weights and arithmetic in fewer passes over memory.

    One product makes queries, keys and values, whose weights stand side by side (the model's own become views of them); each text
    attends to itself alone; where only the first token is wanted, the last layer computes no other. In fp32 the products leave
    biases out: what reads their result next adds them, and a bias of values, which attention takes through as it is, is a part of
    the bias behind it.

    Args:
        model: a BertModel, RobertaModel or XLMRobertaModel in eval mode on the CPU, fp32.
        dtype: of the linear maps and of attention; the sums between them, norms and embeddings stay fp32. The model's own linear
            maps are turned into it.
        token_types: whether the model's tokenizer gives segments; without, all are 0.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, *, token_types: bool = True):
        self.model, self.dtype, self.token_types, self.alike, config = model, dtype, token_types, False, model.config
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
        """Whether a transformer is one that this computes."""
        config = model.config
        plain = getattr(config, "position_embedding_type", "absolute") in (None, "absolute") and not getattr(config, "is_decoder", False)
        on_cpu = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
        return type(model).__name__ in KINDS and plain and on_cpu

    def __call__(
        self, ids: Tensor, types: Tensor, lengths: Sequence[int], *, first: bool = False, keep: int | None = None, keys_values: range = range(0)
    ) -> States:
        """Runs the model.

        Args:
            ids, types: T, int64, of B texts one after another.
            lengths: of each text, at least 1.
            first: of the last layer only each text's first token is wanted.
            keep: a layer whose input is wanted too.
            keys_values: layers whose keys and values are wanted too.
        """
        ends = torch.tensor([0, *lengths], dtype=torch.int64, device=ids.device).cumsum(0)
        types = types if self.token_types else torch.zeros_like(types)
        starts = torch.repeat_interleave(ends[:-1], ends.diff())
        positions = torch.arange(len(ids), dtype=torch.int64, device=ids.device) - starts
        if self.pad_id is not None:  # RoBERTa counts from after its padding token, and leaves that out where a text holds one
            present = (ids != self.pad_id).long()
            before = torch.cat([present.new_zeros(1), present.cumsum(0)])
            positions = (before[1:] - before[starts]) * present + self.pad_id
        x: Tensor = self.model.embeddings(input_ids=ids[None], token_type_ids=types[None], position_ids=positions[None])[0]
        kept, seen, d = {}, [], self.width
        for n, (layer, (weight, bias)) in enumerate(zip(self.layers, self.joined)):
            if n == keep:
                kept[n] = x
            read, asked = x.to(self.dtype), ends
            bare = self.plain and n not in keys_values  # biases are left to what comes next
            if first and n == len(self.layers) - 1:
                asked = torch.arange(len(ends), dtype=torch.int64, device=ids.device)
                joined, rows = linear(read, weight[d:], None if bare else bias[d:]), x[ends[:-1]]
                queries = linear(read[ends[:-1]], weight[:d], None if bare else bias[:d])
            else:
                joined, rows = linear(read, weight, None if bare else bias), x
                queries, joined = joined[:, :d], joined[:, d:]
            if n in keys_values:
                seen.append(joined)
            attended = packed_attention(queries, joined[:, :d], joined[:, d:], asked, ends, self.heads, bias[:d] if bare else None)
            x = self._after(layer, attended, rows, layer.behind if bare else layer.attended.bias)
        return States(x, kept, torch.cat(seen, 1) if seen else None)

    def _after(self, layer: _Layer, attended: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """What a layer does with what was attended to; `bias` stands behind attention."""
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
    """A linear map's own tensors, which a module finds by name at each call."""

    weight: Tensor
    bias: Tensor


class _Output(NamedTuple):
    """A linear map and the norm behind it."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, output: Any) -> _Output:
        return cls(output.dense.weight, output.dense.bias, output.LayerNorm.weight, output.LayerNorm.bias, output.LayerNorm.eps)


class _Layer(NamedTuple):
    """What stands behind attention in a layer.

    Attributes:
        attended, up, down: its linear maps.
        behind: the bias behind attention, with what values' own adds to it; None where values keep theirs.
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
    """Weights and biases of linear maps in one tensor each, of which their own become views, so that nothing is held twice."""
    weight, bias = (torch.cat([getattr(part, name).detach() for part in parts]) for name in ("weight", "bias"))
    for part, own_weight, own_bias in zip(parts, weight.chunk(len(parts)), bias.chunk(len(parts))):
        part.weight.data, part.bias.data = own_weight, own_bias
    return weight, bias
