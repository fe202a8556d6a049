"""What all kinds that run a transformer share: loading a checkpoint, tokenising, and forwards in length-sorted batches under a token budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer, normalizers
from torch import Tensor

from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import Tokens
from rerank_lab.models.checkpoint import Checkpoint
from rerank_lab.models.late_checkpoint import LateCheckpoint
from rerank_lab.models.packed import Packed
from rerank_lab.models.padded import ForwardOutput, Padded

T = TypeVar("T")
# Buffers and unused poolers in old checkpoints. transformers computes the same without them.
SPARE = re.compile(r"(.*\.)?(position_ids|token_type_ids|rotary_emb\.inv_freq|attention\.(bias|masked_bias)|pooler\.dense\.(weight|bias))")
LONGEST = 2**31 - 1  # tokens of a text if neither model nor tokenizer has a limit
# Padded tokens of one batch. On a CPU, small batches keep the activations in cache; a GPU needs large ones.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 65536, "mps": 16384}
# Characters tokenised at once: an Encoding takes about a hundred times the memory of the Tokens made of it.
CHARACTERS = 1 << 18


def encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """Tokenises texts without special tokens, a limited number of characters at once."""
    start, size = 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHARACTERS or end == len(texts):
            yield from tokenizer.encode_batch(list(texts[start:end]), add_special_tokens=False)
            start, size = end, 0


def in_advance(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yields the results of calls in order. While one result is used, another thread makes the next call."""
    with ThreadPoolExecutor(1, thread_name_prefix="in-advance") as pool:
        waiting: Future[T] | None = None
        for call in calls:
            following = pool.submit(call)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def load_checkpoint(
    kind: Any, folder: Path, name: str, spare: str | None = None, apart: AbstractSet[str] = frozenset(), number: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads a Hugging Face model in eval mode, and its tokenizer. Code in the folder is never run.

    Args:
        kind: AutoModel or another Auto class of transformers.
        folder: the checkpoint.
        name: what messages call the model.
        spare: weights with this in their name may be missing; transformers initialises them.
        apart: names of weights that the caller reads itself.
        number: the type of its weights.

    Raises:
        UserError: the folder does not load, weights are missing or unused, or there is no fitting fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        # Weights that do not fit are reported below; the library's own message is meant for training.
        model, info = kind.from_pretrained(folder, dtype=number, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many types
        raise UserError(f"model {name!r}: {folder} does not load: {str(error).strip().partition(chr(10))[0]}; are its files whole? copy it again") from error
    for key, stored, wanted in sorted(map(tuple, info["mismatched_keys"])):
        shapes = f"{' x '.join(map(str, stored))} in the file and {' x '.join(map(str, wanted))} by config.json"
        raise UserError(f"model {name!r}: {folder} does not load: the weights {key} are {shapes}; name a checkpoint that its config.json describes")
    if missing := sorted(key for key in info["missing_keys"] if spare is None or spare not in key):
        raise UserError(f"model {name!r}: the weights {_some(missing)} are not in {folder}")
    left = {key for key in info["unexpected_keys"] if not SPARE.fullmatch(key)} - apart
    if left and not left <= _heads(model.config):
        raise UserError(
            f"model {name!r}: nothing takes the weights {_some(sorted(left))} in {folder}, so {type(model).__name__} is not all of it; "
            "name a checkpoint that its config.json describes"
        )
    if not tokenizer.is_fast:
        raise UserError(f"model {name!r} has no fast tokenizer (tokenizer.json), which is needed")
    # If a tokenizer's files are missing, transformers makes one with only the special tokens. A model's vocabulary may be padded to a round size.
    vocabulary = getattr(model.config, "vocab_size", 0)
    if len(tokenizer) < vocabulary // 2:
        raise UserError(f"model {name!r}: the tokenizer in {folder} knows {len(tokenizer)} tokens, the model {vocabulary}")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _heads(config: Any) -> set[str]:
    """Names of all weights of a language model, with its head, which an encoder does not load; empty for another architecture."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    kind = getattr(transformers, architecture, None)
    if kind is None or not architecture.endswith(("ForMaskedLM", "ForPreTraining", "ForCausalLM", "LMHeadModel")):
        return set()
    with torch.device("meta"):
        return set(kind(config).state_dict())


def fast_tokenizer(tokenizer: Any, *, lower: bool) -> Tokenizer:
    """The Tokenizer inside a fast tokenizer of transformers, without padding and truncation.

    Args:
        tokenizer: of transformers.
        lower: whether texts are lower-cased first, as sentence-transformers does.
    """
    found: Tokenizer = tokenizer.backend_tokenizer
    found.no_padding()
    found.no_truncation()
    if lower:
        before = [] if found.normalizer is None else [found.normalizer]
        found.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return found


class Padding(NamedTuple):
    """How a model is padded: its padding token, and whether it takes token_type_ids."""

    pad_id: int
    token_types: bool


def padding(model: Any, tokenizer: Any) -> Padding:
    """The Padding of a model and its tokenizer. The model's padding token is used if both have one."""
    own = next((n for n in (getattr(model.config, "pad_token_id", None), tokenizer.pad_token_id) if n is not None), 0)
    return Padding(own, "token_type_ids" in tokenizer.model_input_names)


def limit_of(found: Checkpoint | LateCheckpoint, model: Any, tokenizer: Any, specials: int) -> int:
    """How many tokens one input may have, special ones counted.

    This is the folder's limit, or else the tokenizer's, and at most the number of positions that the model has.

    Args:
        found: the checkpoint.
        model, tokenizer: of transformers.
        specials: number of special tokens of an input.

    Raises:
        UserError: the limit leaves no token for the text.
    """
    limits = [found.max_seq_length or tokenizer.model_max_length, position_count(model)]
    limit = min((min(n, LONGEST) for n in limits if isinstance(n, int) and n > 0), default=512)
    if limit <= specials:
        raise UserError(f"model {found.name!r}: a limit of {limit} tokens leaves none for the text")
    return limit


def position_count(model: Any) -> int | None:
    """How many tokens a model has positions for; None: no limit.

    Some models (RoBERTa, MPNet, Longformer) do not use the first positions, up to the padding token's.
    """
    total = getattr(model.config, "max_position_embeddings", None)
    table = next((module for name, module in model.named_modules() if name.endswith("position_embeddings")), None)
    unused = getattr(table, "padding_idx", None)
    return total - (0 if unused is None else unused + 1) if isinstance(total, int) and total > 0 else None


def plan_batches(lengths: Sequence[int], budget: int, equal_lengths: bool = False) -> list[np.ndarray]:
    """Groups texts into batches, the longest first.

    Args:
        lengths: tokens of each text.
        budget: padded tokens of a batch at most. A single text may exceed it.
        equal_lengths: whether all texts of a batch must have the same length.

    Returns:
        positions of each batch's texts, int64.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        batch = order[start : start + size]
        if equal_lengths:
            batch = batch[: sum(lengths[i] == lengths[batch[0]] for i in batch)]
        batches.append(batch)
        start += len(batch)
    return batches


def token_budget(device: torch.device) -> int:
    """How many padded tokens a batch may have on a device."""
    return TOKEN_BUDGET.get(device.type, 4096)


def forward(network: Padded | Packed, tokens: Sequence[Tokens], device: torch.device, **wanted: Any) -> Iterator[tuple[np.ndarray, Tensor, ForwardOutput]]:
    """Runs a transformer on all texts, batch by batch.

    Args:
        network: the transformer.
        tokens: the texts.
        device: of the transformer.
        wanted: keyword arguments of `network`, as Packed takes them.

    Yields:
        (positions of the batch's B texts, offsets of their tokens (B + 1, int64), the transformer's output).
    """
    for batch, texts in batches(tokens, network, device):
        with torch.inference_mode():
            yield batch, torch.tensor([0, *texts.lengths], dtype=torch.int64, device=device).cumsum(0), network(*texts, **wanted)


class TokenBatch(NamedTuple):
    """B texts with T tokens together, without padding.

    Attributes:
        ids, types: T, int64, one text after another.
        lengths: tokens of each of the B texts.
        attended: how many of them, from the first, a text's tokens attend to; None: all of every text.
    """

    ids: Tensor
    types: Tensor
    lengths: list[int]
    attended: list[int] | None


def batches(tokens: Sequence[Tokens], network: Padded | Packed, device: torch.device) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """Groups all texts into batches under the device's token budget.

    Yields:
        (positions of the batch's texts, their tokens).

    Raises:
        ModelError: a token id has no embedding.
    """
    embedded = network.model.get_input_embeddings().num_embeddings
    for batch in plan_batches([len(t) for t in tokens], token_budget(device), network.equal_lengths):
        chosen = [tokens[position] for position in batch]
        ids, types = (torch.from_numpy(np.concatenate([getattr(t, name) for t in chosen]).astype(np.int64)) for name in ("ids", "types"))
        if len(ids) and int(ids.max()) >= embedded:
            raise ModelError(
                f"model {network.model.name_or_path!r}: a text holds the token number {int(ids.max())}, and it has embeddings for {embedded}: tokens were added to its "
                "tokenizer alone; name a checkpoint whose model was resized with it"
            )
        attended = [len(t) if t.attended is None else t.attended for t in chosen] if any(t.attended is not None for t in chosen) else None
        yield batch, TokenBatch(ids, types, [len(t) for t in chosen], attended)


def encoder_flops(config: Any, lengths: Tensor, *, first: bool = False) -> int:
    """FLOPs of running a transformer encoder on N texts; a multiplication and an addition count as two.

    A layer has four d × d projections and two of d × m (m = intermediate size), 2·L·(4d² + 2dm), and attention's two
    products over L × L, 4·L²·d. Embeddings, norms, softmax and activations are left out (under 1%).

    Args:
        config: of the transformer.
        lengths: N, int64, tokens of each text, special ones counted.
        first: whether only the first token of the last layer is wanted. That layer then makes keys and values of every token,
            4·L·d², and everything else of one token.
    """
    d, m = config.hidden_size, getattr(config, "intermediate_size", getattr(config, "d_ff", 4 * config.hidden_size))
    total, squares = int(lengths.sum()), int(lengths.square().sum())
    last = 4 * total * d * d + len(lengths) * 2 * (2 * d * d + 2 * d * m) + 4 * total * d if first else 0
    return int((config.num_hidden_layers - first) * (2 * total * (4 * d * d + 2 * d * m) + 4 * squares * d)) + last
