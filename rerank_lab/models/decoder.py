"""Runs a causal language model on sequences that begin alike: what they share is run once, and its keys and values serve all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.packed_decoder import KeysValues, PackedDecoder


class Decoder:
    """A causal language model that answers with one of two tokens. No other logit is computed.

    Args:
        model: a causal language model of transformers, in eval mode, on its device.
        yes: the token whose logit is the score.
        no: the token whose logit is subtracted from it; None: none is.
        name: of the model, for messages.

    Raises:
        UserError: the model has no such token, or another way from its last state to its logits.
    """

    def __init__(self, model: Any, yes: int, no: int | None, name: str):
        self.base, self.name = model.base_model, name
        head, asked = model.get_output_embeddings(), [yes] if no is None else [yes, no]
        if head is None or not all(0 <= token < head.weight.shape[0] for token in asked):
            raise UserError(f"model {name!r} answers with the tokens {asked}, which its vocabulary does not have; copy the whole model")
        self.rows = head.weight[asked].detach().float()
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias[asked].detach().float()
        self.embedded = int(model.get_input_embeddings().num_embeddings)
        config = model.config.get_text_config()
        self.layers, self.linear = int(config.num_hidden_layers), sum(map_.weight.numel() for map_ in self.base.modules() if isinstance(map_, torch.nn.Linear))
        self.width = int(config.num_attention_heads) * int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.packed = PackedDecoder(self.base) if PackedDecoder.fits(self.base) else None
        self._probe(model, asked)

    def shared(self, ids: np.ndarray) -> KeysValues:
        """Keys and values of a beginning of P tokens (P, int64)."""
        from transformers.cache_utils import DynamicCache

        if self.packed is not None:
            return self.packed(self._tensor(ids), [len(ids)], keep=True).keys_values
        held = DynamicCache()
        self.base(input_ids=self._tensor(ids[None]), past_key_values=held, use_cache=True)
        return [(layer.keys[0], layer.values[0]) for layer in held.layers]

    def answers(self, rests: Sequence[np.ndarray], shared: KeysValues | None = None) -> Tensor:
        """The scores of B sequences, fp32.

        Args:
            rests: their tokens behind the shared beginning, at least one each (int64).
            shared: keys and values of the beginning; None: there is none.
        """
        if self.packed is not None:
            last = self.packed(self._tensor(np.concatenate(rests)), [len(rest) for rest in rests], shared).last
        else:
            last = self._padded(rests, shared)
        logits = torch.nn.functional.linear(last.float(), self.rows, self.bias)
        return logits[:, 0] if len(self.rows) == 1 else logits[:, 0] - logits[:, 1]

    def _padded(self, rests: Sequence[np.ndarray], shared: KeysValues | None) -> Tensor:
        """Each sequence's last state (B × d), by the model's own forward."""
        lengths = torch.tensor([len(rest) for rest in rests], dtype=torch.int64, device=self.rows.device)
        ids = np.zeros((len(rests), int(lengths.max())), dtype=np.int64)
        for row, rest in zip(ids, rests):
            row[: len(rest)] = rest  # padding stands behind a text, where a causal model does not look from within it
        given = {"use_cache": False} if shared is None else {"past_key_values": _beside(shared), "use_cache": True}
        states: Tensor = self.base(input_ids=self._tensor(ids), **given).last_hidden_state
        return states[torch.arange(len(rests), dtype=torch.int64, device=states.device), lengths - 1]

    def flops(self, lengths: Sequence[int], before: int) -> int:
        """FLOPs of sequences of these lengths behind a beginning that is run already; a multiplication and an addition count as two.

        A token takes two for each weight of the layers' linear maps, and in each layer attention's 4·d for itself and each token before it.

        Args:
            lengths: tokens of each.
            before: tokens of the beginning.
        """
        pairs = sum(length * before + length * (length + 1) // 2 for length in lengths)
        return 2 * self.linear * sum(lengths) + 4 * self.width * self.layers * pairs

    def _tensor(self, ids: np.ndarray) -> Tensor:
        if ids.size and int(ids.max()) >= self.embedded:
            raise ModelError(
                f"model {self.name!r}: a text holds the token number {int(ids.max())}, and it has embeddings for {self.embedded}: tokens were added to its "
                "tokenizer alone; name a checkpoint whose model was resized with it"
            )
        return torch.from_numpy(ids).to(self.rows.device)

    @torch.inference_mode()
    def _probe(self, model: Any, asked: Sequence[int]) -> None:
        """Compares a sequence that is run in parts with the model's own logits."""
        ids = np.arange(1, 1 + min(12, self.embedded - 1), dtype=np.int64)
        try:
            logits = model(input_ids=self._tensor(ids[None]), use_cache=False).logits[0, -1, list(asked)].float()
            whole, apart = self.answers([ids]), self.answers([ids[8:], ids[8:9]], self.shared(ids[:8]))[:1]
        except Exception as error:  # a model of another kind can fail in any way
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UserError(f"model {self.name!r}: {type(model).__name__} does not read texts as a causal reranker does ({reason})") from error
        wanted = logits[:1] if len(asked) == 1 else logits[:1] - logits[1:]
        near = 1e-3 if self.base.dtype == torch.float32 else 0.1
        if not all(torch.allclose(found, wanted, rtol=near, atol=near * float(logits.abs().max())) for found in (whole, apart)):
            raise UserError(
                f"model {self.name!r}: {type(model).__name__} makes its logits in another way than causal rerankers do, which is not computed here; "
                "name a model of the kind of Qwen, Llama, Mistral or Gemma"
            )


def _beside(shared: KeysValues) -> Any:
    """Keys and values of a beginning as transformers takes them: each layer's own are put behind them, and nothing is kept."""
    from transformers.cache_utils import Cache

    return Cache(layers=[_layer()(keys[None], values[None]) for keys, values in shared])


@cache
def _layer() -> Any:
    """The class of such a layer. transformers is slow to import, so it is made when it is first used."""
    from transformers.cache_utils import DynamicLayer

    class Beginning(DynamicLayer):  # type: ignore[misc]
        def __init__(self, keys: Tensor, values: Tensor):
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            size = len(keys)
            return torch.cat([self.keys.expand(size, -1, -1, -1), keys], 2), torch.cat([self.values.expand(size, -1, -1, -1), values], 2)

    return Beginning
