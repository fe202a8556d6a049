"""A late-interaction model (ColBERT): a vector for each token of a text, and none for the text. MaxSim of these vectors is its score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from rerank_kernels import exactly, project_normalize
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.after import TOKENS, read_dense
from rerank_lab.models.base import AS_IT_IS, Detail, Origin, Overrides, Tokens, Vectors
from rerank_lab.models.exported import choose, network
from rerank_lab.models.families import weights_of
from rerank_lab.models.folder import Folder
from rerank_lab.models.forward import encoder_flops, encodings, fast_tokenizer, forward, limit_of, load_checkpoint, padding, position_count
from rerank_lab.models.late_checkpoint import METADATA, PROJECTION, STANFORD, LateCheckpoint, read_late
from rerank_lab.models.registry import Placement, Source, pick_device
from rerank_lab.models.transformer_encoder import READING, TransformerEncoder, fingerprint, own_rows, put_rows, row_offsets, warn


@dataclass(frozen=True, eq=False)
class Side:
    """How texts of one kind, queries or documents, are read.

    Attributes:
        prompt: put before a text, with its marker.
        marker: tokens of the marker: 1, or 0 if there is none.
        limit: tokens of a text that are read, special ones and the marker not counted.
        skipped: ids of tokens without a vector.
        filled: tokens of an expanded text, special ones counted; 0: texts are not expanded.
    """

    prompt: str
    marker: int
    limit: int
    skipped: np.ndarray
    filled: int = 0


class LateInteraction(TransformerEncoder):
    """An encoder whose vectors equal those of sentence_transformers.MultiVectorEncoder, fp32, for `maxsim` and `best`.

    Token vectors are the projected last hidden states at unit length: of all tokens, special ones and markers included, but those of the
    skiplist; of queries, those of the mask tokens that expand them too.

    Args:
        folder: the checkpoint, in a layout that late_checkpoint knows.
        name: what messages and results call it.
        device: torch device.
        runtime, precision: as models.exported.choose takes them. Projection and vectors are fp32 always.
        overrides: prompts other than the folder's; they stand after the marker.

    Raises:
        UserError: there is no such checkpoint, the runtime is not available, or something in the folder or in `overrides` is not supported.
    """

    pools = False
    dimensions = 0
    similarity = "maxsim"

    def __init__(
        self, folder: Path, name: str, *, device: torch.device | str = "cpu", runtime: str = "auto", precision: str = "fp32", overrides: Overrides = AS_IT_IS
    ):
        from transformers import AutoModel

        self.name, self.folder, self.device, files = name, folder, torch.device(device), Folder(folder, name)
        self.checkpoint = found = read_late(files)
        found.check(overrides)
        warn(name, found.notes)
        stanford = files.architecture == "HF_ColBERT" or found.layout == STANFORD
        model, tokenizer = load_checkpoint(AutoModel, found.root, name, spare="pooler", apart={PROJECTION} if stanford else set())
        self.model: nn.Module = model.to(self.device)
        self.config: Any = model.config
        self.runtime, self.precision = choose(runtime, precision), precision
        self.network = network(model, runtime=self.runtime, precision=precision, **padding(model, tokenizer)._asdict())
        self.tokenizer, self.truncation_side = fast_tokenizer(tokenizer, lower=found.lower), str(tokenizer.truncation_side)
        self.mask_id, self.sides = read_sides(found, model, tokenizer, self.tokenizer, overrides)
        self.specials: int = tokenizer.num_special_tokens_to_add(False) + self.sides["document"].marker
        self.limit = self.sides["document"].limit
        maps = [_projection(found)] if found.layout == STANFORD else [read_dense(place, name, TOKENS) for place in found.dense]
        self.project = nn.Sequential(*maps).to(self.device)
        self.fingerprint, self.weights = fingerprint(folder), fingerprint(found.root, weights_of(found.root))

    @cached_property
    def token_dimensions(self) -> int:
        """Columns of the token vectors."""
        linear = [module.out_features for name, module in self.project.named_modules() if isinstance(module, nn.Linear) and "residual" not in name]
        return int(linear[-1] if linear else self.config.hidden_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """As Encoder.notes."""
        return self.checkpoint.notes

    def reading(self) -> str:
        """As Encoder.reading: layout, prompts, lengths, expansion, skiplist."""
        return self.checkpoint.reading(self.prompt("query"), self.prompt("document"))

    def key(self) -> str:
        """As Encoder.key: 24 hexadecimal digits."""
        parts = [self.fingerprint, "late interaction", self.checkpoint.of_documents(self.prompt("document")), self.arithmetic, self.device.type]
        parts += ["truncated from the left"] * (self.truncation_side == "left") + ["no padding"] * self.network.equal_lengths
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def origin(self) -> Origin:
        """As Encoder.origin."""
        return origin_of(self.checkpoint, self.weights, self.sides)

    def prompt(self, kind: str) -> str:
        """What the model puts before a text of a kind, "query" or "document": its marker and its prompt."""
        return self.sides[kind].prompt

    def tokenize(self, texts: Sequence[str], kind: str, max_tokens: int) -> list[Tokens]:
        """As Encoder.tokenize; the model's limit for this kind applies too. A marker is not counted."""
        side, found = self.sides[kind], []
        limit = min(max_tokens, side.limit) + side.marker
        for encoding in encodings(self.tokenizer, [side.prompt + text for text in texts]):
            wanted = len(encoding) - side.marker
            encoding.truncate(limit, direction=self.truncation_side)
            found.append(self._tokens(Tokens.of(self.tokenizer.post_process(encoding), wanted), side))
        return found

    def _tokens(self, read: Tokens, side: Side) -> Tokens:
        ids, types, attended = read.ids, read.types, None
        if (missing := side.filled - len(ids)) > 0:
            assert self.checkpoint.expansion is not None
            attended = None if self.checkpoint.expansion.attend else len(ids)
            ids, types = np.concatenate([ids, np.full(missing, self.mask_id, ids.dtype)]), np.concatenate([types, np.zeros(missing, types.dtype)])
        return Tokens(ids, types, np.isin(ids, side.skipped), read.full_length, attended)

    @exactly(tensors=True)
    def encode_tokens(self, texts: Sequence[Tokens], *, detail: Detail = Detail.TOKENS, progress: Callable[[int], object] = lambda done: None) -> Vectors:
        """As Encoder.encode_tokens. Below Detail.TOKENS there is nothing to compute."""
        offsets, count = row_offsets(texts, detail), len(texts)
        tokens = torch.zeros(int(offsets[-1]), self.token_dimensions, dtype=torch.float32, device="cpu")
        for batch, _, states in forward(self.network, texts if detail else (), self.device):
            rows = self.project(states.last[own_rows(texts, batch).to(self.device)].float())
            put_rows(tokens, project_normalize(rows, None, torch.float32).cpu(), batch, offsets)
            progress(len(batch))
        if not detail:
            progress(count)
        if not bool(tokens.isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite vector")
        lengths = torch.tensor([t.full_length for t in texts], dtype=torch.int64, device="cpu")
        none = torch.zeros(count, 0, dtype=torch.float32, device="cpu")
        return Vectors(none, lengths, offsets, tokens, torch.zeros(0, 0, dtype=torch.float16, device="cpu"))

    def flops(self, lengths: Tensor, detail: Detail) -> int:
        """As Encoder.flops: the transformer and the projection; 0 without token vectors."""
        if not detail:
            return 0
        lengths = lengths + self.specials
        maps = sum(module.weight.numel() for module in self.project.modules() if isinstance(module, nn.Linear))
        return encoder_flops(self.config, lengths) + 2 * int(lengths.sum()) * maps


def origin_of(found: LateCheckpoint, weights: str, sides: Mapping[str, Side]) -> Origin:
    """What decides the token vectors of a checkpoint with these weights (their hash), whose texts are read so."""
    dense = "".join(fingerprint(place) for place in found.dense)
    by, reading = hashlib.sha256(dense.encode()).hexdigest() if dense else "", fingerprint(found.folder, (*READING, METADATA))
    return Origin(weights, reading, by, sides["query"].prompt, sides["document"].prompt)


def read_sides(found: LateCheckpoint, model: Any, tokenizer: Any, fast: Tokenizer, asked: Overrides) -> tuple[int | None, dict[str, Side]]:
    """How a model reads queries and documents. Its tokenizer is made to read markers as one token.

    Args:
        found: the checkpoint.
        model, tokenizer: of transformers. Of the model, the shape is enough.
        fast: the Tokenizer inside the tokenizer, without padding and truncation.
        asked: prompts in place of the folder's.

    Returns:
        the id of the token that expands queries (None: they are not expanded), and a Side for "query" and "document".

    Raises:
        UserError: queries cannot be expanded, or a limit leaves no token for the text.
    """
    _register(tokenizer, found.markers)
    number = None if found.expansion is None else _mask_id(found, tokenizer)
    return number, {kind: _side(found, model, tokenizer, fast, kind, getattr(asked, f"{kind}_prompt")) for kind in ("query", "document")}


def _side(found: LateCheckpoint, model: Any, tokenizer: Any, fast: Tokenizer, kind: str, asked: str | None) -> Side:
    """How texts of a kind are read; `asked` is a prompt in place of the folder's."""
    query = kind == "query"
    prompt, length = (found.query_prompt, found.query_length) if query else (found.document_prompt, found.document_length)
    marker = _marker(fast, prompt)
    expansion = found.expansion if query else None
    if expansion is not None and expansion.fixed:
        length = expansion.length
    elif expansion is not None and length is not None:
        length = max(length, expansion.length)
    specials = tokenizer.num_special_tokens_to_add(False) + bool(marker)
    limit = limit_of(replace(found, max_seq_length=length or found.max_seq_length), model, tokenizer, specials) - specials
    filled = 0 if expansion is None else expansion.length
    if filled > (position_count(model) or filled):
        raise UserError(f"model {found.name!r} expands queries to {filled} tokens, and has positions for {position_count(model)}; set query_length lower")
    unknown = tokenizer.unk_token_id
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (found.skiplist if kind in found.skipped_in else ())}
    skipped = [n for word, n in ids.items() if n is not None and (n != unknown or word == tokenizer.unk_token)]
    text = prompt if asked is None else marker + asked
    return Side(text, int(bool(marker)), limit, np.array(skipped, dtype=np.int32), filled)


def _marker(tokenizer: Tokenizer, prompt: str) -> str:
    """The beginning of a prompt that the tokenizer reads as one added token ([Q], [unused0]), with the white space behind it; "" if there is none."""
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    if not len(encoding) or encoding.ids[0] not in tokenizer.get_added_tokens_decoder():
        return ""
    end = encoding.offsets[0][1]
    return prompt[: end + len(prompt[end:]) - len(prompt[end:].lstrip())]


def _register(tokenizer: Any, markers: Sequence[str]) -> None:
    """Makes the tokenizer read each marker that it knows as one token, as sentence-transformers does: as text, [unused0] would fall into pieces."""
    from transformers import AddedToken

    known, added = tokenizer.get_vocab().keys() | tokenizer.added_tokens_encoder.keys(), []
    for marker in markers:
        token = next((one for one in (marker, *marker.split(None, 1)[:1]) if one.strip() and one in known), None)
        if token is not None and tokenizer.tokenize(token) != [token]:
            added.append(AddedToken(token, normalized=False, special=True))
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": added})


def _mask_id(found: LateCheckpoint, tokenizer: Any) -> int:
    """The id of the token that expands queries.

    Raises:
        UserError: the tokenizer has none, or pads on the left.
    """
    assert found.expansion is not None
    token = found.expansion.token
    known = [tokenizer.mask_token_id, tokenizer.eos_token_id] if token is None else [tokenizer.convert_tokens_to_ids(token)]
    number = next((n for n in known if n is not None and (n != tokenizer.unk_token_id or token == tokenizer.unk_token)), None)
    if number is None:
        raise UserError(f"model {found.name!r} expands queries by {token or 'a mask token'}, which its tokenizer does not know; copy the whole model")
    if tokenizer.padding_side == "left":
        raise UserError(
            f"model {found.name!r} expands queries on the left (padding_side in {found.root / 'tokenizer_config.json'}), which is not computed here"
        )
    return int(number)


def _projection(found: LateCheckpoint) -> nn.Linear:
    """The projection among the transformer's weights, as Stanford's checkpoints have it."""
    try:
        for path in sorted(found.root.glob(weights_of(found.root)[0])):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    weight = file.get_tensor(PROJECTION) if PROJECTION in file.keys() else None  # noqa: SIM118
            else:
                weight = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(PROJECTION)
            if weight is not None:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cpu", dtype=torch.float32)
                linear.load_state_dict({"weight": weight})
                return linear.eval()
    except Exception as error:  # torch, pickle and safetensors raise errors of their own
        raise UserError(f"model {found.name!r}: {path} does not load: {' '.join(str(error).split()):.200}; copy it again") from error
    raise UserError(f"model {found.name!r}: the weights in {found.root} have no {PROJECTION}, its projection of token vectors; copy the whole model")


def load(source: Source, placement: Placement, subspace: str | None = None) -> LateInteraction:
    """Loads a late-interaction model.

    Args:
        source: its name and folder.
        placement: where and how it runs.
        subspace: must be None.

    Raises:
        UserError: the model is not found or not supported, or a subspace is given.
    """
    if subspace is not None:
        raise UserError(f"model {source.name!r} takes no subspace: a late-interaction model has a projection of its own")
    device = pick_device(placement.device)
    return LateInteraction(
        source.folder.path, source.name, device=device, runtime=placement.runtime, precision=placement.precision, overrides=placement.overrides
    )
