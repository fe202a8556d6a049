"""Runs any Hugging Face transformer, on texts that are padded to the longest of their batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ForwardOutput:
    """The output of a forward on B texts with T tokens together.

    Attributes:
        last: T × d, hidden states of the last layer; B × d if only the first token of each text was asked for.
        kept: layer → T × d, the hidden states that go into it.
        keys_values: T × 2·d·S, keys and values of the S layers that were asked for, in turn; None: of no layer.
    """

    last: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    keys_values: Tensor | None = None


class Padded:
    """Any transformer, run by its own `forward` on padded texts.

    Args:
        model: in eval mode, with or without a head.
        pad_id: the tokenizer's padding token.
        token_types: whether the model takes token_type_ids.
        equal_lengths: whether only texts of equal length may share a batch, because the model reads padding (`reads_padding`).
    """

    def __init__(self, model: Any, pad_id: int, token_types: bool, equal_lengths: bool = False):
        self.model, self.pad_id, self.token_types, self.equal_lengths = model, pad_id, token_types, equal_lengths

    def inputs(self, ids: Tensor, types: Tensor, lengths: Sequence[int], attended: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The model's inputs by name, each B × L, on its device.

        Args:
            ids, types: T, int64, of B texts one after another.
            lengths: of each text.
            attended: as Packed takes it.
        """
        mask = first_of(lengths, max(1, *lengths), ids.device)
        padded = {
            "input_ids": torch.full(mask.shape, self.pad_id, dtype=torch.int64, device=ids.device).masked_scatter_(mask, ids),
            "attention_mask": (mask if attended is None else first_of(attended, mask.shape[1], ids.device)).long(),
        }
        if self.token_types:
            padded["token_type_ids"] = torch.zeros_like(padded["input_ids"]).masked_scatter_(mask, types)
        return {name: tensor.to(self.model.device) for name, tensor in padded.items()}

    def logits(self, ids: Tensor, types: Tensor, lengths: Sequence[int], attended: Sequence[int] | None = None) -> Tensor:
        """Logits of a model with a head: B × labels. Arguments as for `inputs`."""
        logits: Tensor = self.model(**self.inputs(ids, types, lengths, attended)).logits
        return logits

    def __call__(
        self,
        ids: Tensor,
        types: Tensor,
        lengths: Sequence[int],
        attended: Sequence[int] | None = None,
        *,
        keep: int | None = None,
        keys_values: range = range(0),
    ) -> ForwardOutput:
        """As Packed.__call__, without `first`, which only saves work there."""
        inputs, seen, hooks = self.inputs(ids, types, lengths, attended), [], []
        for part in [getattr(self.model.encoder.layer[n].attention.self, name) for n in keys_values for name in ("key", "value")]:
            hooks.append(part.register_forward_hook(lambda _, __, output: seen.append(output)))
        try:
            output = self.model(**inputs, output_hidden_states=keep is not None)
        finally:
            for hook in hooks:
                hook.remove()
        inside = first_of(lengths, inputs["input_ids"].shape[1], self.model.device)
        kept = {} if keep is None else {keep: output.hidden_states[keep][inside].float()}
        return ForwardOutput(output.last_hidden_state[inside].float(), kept, torch.cat([part[inside] for part in seen], 1) if seen else None)


def first_of(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """B × width, bool: true for the first so many of each row."""
    return torch.arange(width, dtype=torch.int64, device=device) < torch.tensor(counts, dtype=torch.int64, device=device)[:, None]


@torch.inference_mode()
def reads_padding(network: Padded) -> bool:
    """Whether a transformer's output depends on padding, although the mask should hide it. Convolutions and Fourier transforms read padding."""
    vocabulary = int(getattr(network.model.config, "vocab_size", 0) or 0)
    ids = [n for n in range(vocabulary - 1, 0, -1) if n != network.pad_id][:8]

    def made(*texts: list[int]) -> Tensor:
        flat = torch.tensor([n for text in texts for n in text], dtype=torch.int64, device="cpu")
        output = network.model(**network.inputs(flat, torch.zeros_like(flat), [len(text) for text in texts]))
        found: Tensor = output.logits[0] if hasattr(output, "logits") else output.last_hidden_state[0, :3]
        return found.float()

    alone, padded = made(ids[:3]), made(ids[:3], ids)
    return not torch.allclose(alone, padded, rtol=1e-3, atol=1e-3 * float(alone.abs().mean()))
