"""A one-way cross-encoder: the query attends to the document, but the document never to the query, so the document's side can be cached.

Query and document run through a bi-encoder of BERT's kind. In the upper half of the layers, the query runs through copies
of the layers that are changed by low-rank updates. There it also attends to the document's keys and values of the same
layer. The document's side is the unchanged bi-encoder, so fast and best use the same cached vectors.

    u     = unit mean of the query's fused states,  w_i = softplus(W h_i), Σ_i w_i = 1,  over the query's own tokens i
    logit = c_cos u·e_k + c_diag·(u ⊙ e_k) + c_tok Σ_i w_i A_ik + r·mean + r_w·(Σ_i w_i x_i) + bias

with e_k the document's pooled vector, A the subspace attention of `best` (tau = 0.1), h the query's last hidden states in
the bi-encoder, x its fused states, and mean their mean. With the gates of the attention to the document and all
coefficients but c_cos at 0, the logit is c_cos times the cosine.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention, softplus

from rerank_kernels import exactly, subspace_attention
from rerank_lab.errors import ModelError, UserError
from rerank_lab.models.base import AS_IT_IS, Detail, EncodedQuery, Encoder, Inputs, Needs, Vectors, WorkItem
from rerank_lab.models.bi_encoder import BiEncoder, shipped_subspace
from rerank_lab.models.bi_encoder import load as load_encoder
from rerank_lab.models.forward import plan_batches
from rerank_lab.models.registry import DEFAULT_MODEL, REGISTRY, Placement, Source

ADAPTERS = Path(__file__).parent.parent / "data" / "cross-encoders"
TAU = 0.1
# Padded document tokens of one batch. Keys and values of 2,048 tokens take 19 MB in fp32 and stay in the CPU's cache.
DOCUMENT_TOKEN_BUDGET = 2048
NEW: Any = {"dtype": torch.float32, "device": "cpu"}  # arguments for new parameters; the network is moved later


class FusedLayer(nn.Module):
    """A BERT layer for the query that also attends to a document's keys and values.

    In that attention each head has a gate and one additional key, null_key, whose value is zero. A head that finds nothing
    attends to it and adds nothing, and a document without tokens needs no special case.

    Args:
        layer: the BERT layer whose weights are copied.
    """

    def __init__(self, layer: Any):
        super().__init__()
        attention = layer.attention
        self.heads = int(attention.self.num_attention_heads)
        self.query, self.key, self.value, self.output = map(_own, (attention.self.query, attention.self.key, attention.self.value, attention.output.dense))
        self.document_query, self.document_output = _own(attention.self.query), _own(attention.output.dense)
        self.document_output.bias = None
        self.up, self.down = _own(layer.intermediate.dense), _own(layer.output.dense)
        self.norm, self.last_norm = copy.deepcopy(attention.output.LayerNorm), copy.deepcopy(layer.output.LayerNorm)
        self.gate = nn.Parameter(torch.full((self.heads,), 0.1, **NEW))
        self.null_key = nn.Parameter(torch.zeros(self.heads, self.query.out_features // self.heads, **NEW))

    def forward(self, x: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, document_mask: Tensor) -> Tensor:
        """Runs the layer on B pairs.

        Args:
            x: B × Lq × d hidden states of the query; 1 × Lq × d if they are the same for all pairs.
            mask: B × 1 × 1 × Lq, true for the query's tokens; None: there is no padding.
            keys, values: B × heads × (1 + Ld) × d/heads of the document; position 0 holds null_key and zeros.
            document_mask: B × 1 × 1 × (1 + Ld), true for the document's tokens and position 0.

        Returns:
            B × Lq × d states.
        """
        own = scaled_dot_product_attention(self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x)), attn_mask=mask)
        asked = self._split(self.document_query(x)).expand(len(keys), -1, -1, -1)
        read = scaled_dot_product_attention(asked, keys, values, attn_mask=document_mask) * self.gate[:, None, None]
        x = self.norm(x + self.output(own.transpose(1, 2).flatten(2)) + self.document_output(read.transpose(1, 2).flatten(2)))
        states: Tensor = self.last_norm(x + self.down(gelu(self.up(x))))
        return states

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], self.heads, -1).transpose(1, 2)


def _own(linear: nn.Linear) -> Any:
    """A copy of a linear map with storage of its own. In Packed, weights are views of larger tensors, and deepcopy would copy those."""
    own = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, **NEW)  # type: ignore[no-untyped-call]
    own.load_state_dict(linear.state_dict())
    return own


class OneWay(nn.Module):
    """The query's side: the fused layers, and the head that makes a logit.

    Args:
        bert: the bi-encoder's transformer, a BertModel. The fused layers start as copies of its layers.
        layers: which layers are fused, the upper ones. Below them the query runs through the bi-encoder.
    """

    calibration: Tensor

    def __init__(self, bert: Any, layers: range):
        super().__init__()
        d, self.heads = int(bert.config.hidden_size), int(bert.config.num_attention_heads)
        self.layers = nn.ModuleList(FusedLayer(bert.encoder.layer[n]) for n in layers)
        self.token_weight = nn.Linear(d, 1, **NEW)
        self.cosine_scale, self.token_scale = nn.Parameter(torch.tensor(6.0, **NEW)), nn.Parameter(torch.tensor(12.0, **NEW))
        self.diagonal, self.mean_readout, self.token_readout = (nn.Parameter(torch.zeros(d, **NEW)) for _ in range(3))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0], **NEW))  # slope and intercept, fitted on training lists
        nn.init.zeros_(self.token_weight.weight), nn.init.zeros_(self.token_weight.bias)

    def forward(
        self,
        x: Tensor,
        last: Tensor,
        mask: Tensor | None,
        own: Tensor,
        states: Sequence[tuple[Tensor, Tensor]],
        document_mask: Tensor,
        pooled: Tensor,
        A: Tensor,
    ) -> Tensor:
        """Logits of B pairs.

        Args:
            x: B × Lq × d (or 1 × Lq × d) hidden states of the query that go into the fused layers.
            last: B × Lq × d (or 1 × Lq × d) hidden states of the query after the bi-encoder's last layer.
            mask: B × Lq, true for the query's tokens, special ones too; None: there is no padding.
            own: B × Lq (or 1 × Lq), true for the query's tokens, false at special ones and padding.
            states: (keys, values) of each fused layer, as FusedLayer takes them.
            document_mask: B × (1 + Ld), true for the document's tokens and position 0.
            pooled: B × d unit vectors of the documents.
            A: B × Lq subspace attention, 0 at special tokens.

        Returns:
            B logits, calibrated.
        """
        weight = softplus(self.token_weight(last))[..., 0] * own
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
        attends = None if mask is None else mask[:, None, None]
        for layer, (keys, values) in zip(self.layers, states):
            x = layer(x, attends, keys, values, document_mask[:, None, None])
        mean = x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        agreement = normalize(mean, dim=-1) * pooled
        logit = self.cosine_scale * agreement.sum(-1) + 20 * agreement @ self.diagonal + self.token_scale * (weight * A).sum(1)
        logit = logit + mean @ self.mean_readout + (weight[..., None] * x).sum(1) @ self.token_readout
        calibrated: Tensor = self.calibration[0] * logit + self.calibration[1]
        return calibrated


def padded_states(documents: Sequence[Tensor], net: OneWay, longest: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Pads keys and values of B documents for the fused layers, in fp32.

    Args:
        documents: states of each document (Ld × 2·d·S), as VectorCache.states returns them.
        net: its null keys go to position 0.
        longest: how many tokens of a document to keep at most.

    Returns:
        (keys, values) of each fused layer, each B × heads × (1 + L) × d/heads; and a mask, B × (1 + L), false at padding.
    """
    device, lengths = net.cosine_scale.device, [min(len(states), longest) for states in documents]
    size = max(lengths, default=0)
    mask = torch.arange(-1, size, dtype=torch.int64, device=device) < torch.tensor(lengths, dtype=torch.int64, device=device)[:, None]
    # One pass from packed fp16 to padded fp32. Padding must be finite: its weight is 0, and 0 times infinity is NaN.
    taken = torch.empty(len(lengths), 1 + size, documents[0].shape[1], dtype=torch.float32, device=device)
    taken[:, 0] = 0
    for row, own, length in zip(taken, documents, lengths):
        row[1 : 1 + length] = own[:length]
        row[1 + length :] = 0
    parts = taken.view(len(lengths), 1 + size, len(net.layers), 2, net.heads, -1)
    padded = []
    for n, layer in enumerate(net.layers):
        assert isinstance(layer, FusedLayer)
        keys, values = (parts[:, :, n, kind].transpose(1, 2) for kind in (0, 1))
        if torch.is_grad_enabled():
            keys = keys.contiguous()  # a copy, so that the null key's gradient does not run through `taken`
        keys[:, :, 0] = layer.null_key
        padded.append((keys, values))
    return padded, mask


class EncodedInputs:
    """A query and N documents, all encoded by the bi-encoder.

    Args:
        query: encoded at Detail.STATES.
        documents: vectors of N documents, at Detail.TOKENS or more.
        states: of each document, Ld × 2·d·S.
    """

    def __init__(self, query: EncodedQuery, documents: Vectors, states: Sequence[Tensor]):
        assert query.start is not None and query.last is not None
        self.start, self.last, self.query, self.documents, self.states = query.start, query.last, query, documents, states

    @cached_property
    def attention(self) -> Tensor:
        """Subspace attention of each of the query's tokens over each document: N × Lq, 0 at special tokens."""
        own, tokens, documents = self.query.own, self.query.vectors.tokens, self.documents
        count = len(documents.pooled)
        A = self.start.new_zeros(count, self.start.shape[1])
        if len(tokens):
            places = torch.arange(count, dtype=torch.int64, device=self.start.device)
            pairs = torch.stack([torch.zeros_like(places), places], 1)
            found = subspace_attention(tokens, self.query.vectors.offsets, documents.tokens, documents.offsets, pairs, TAU)
            A[:, own] = found.view(count, len(tokens))
        return A


@dataclass(frozen=True, eq=False)
class DocumentBatch(WorkItem):
    """Some of a query's documents. They share one forward, whose first layer reads the query once for all of them."""

    inputs: EncodedInputs
    tokens: int  # of these documents, without special ones


class OneWayCrossEncoder:
    """Scores a query against documents that the bi-encoder has encoded.

    Args:
        encoder: the bi-encoder that the adapter belongs to.
        adapter: a safetensors file, as experiments/training/train_cross_encoder.py writes it. Its low-rank updates are merged on loading.
        name: what messages and results call it.

    Raises:
        UserError: there is no such file, or it does not fit the bi-encoder.
    """

    shares = False
    notes: tuple[str, ...] = ()

    def __init__(self, encoder: BiEncoder, adapter: Path, name: str):
        self.encoder, self.name = encoder, name
        self.limit = encoder.limit
        self.net = OneWay(encoder.model, encoder.state_layers)
        if not adapter.is_file():
            raise UserError(f"model {name!r}: no file {adapter}")
        try:
            with safe_open(adapter, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"model {name!r}: {adapter} is no safetensors file: {str(error).partition(chr(10))[0]}") from error
        if about.get("backbone") != encoder.weights:
            raise UserError(f"model {name!r}: {adapter} was trained on other weights than those of {encoder.name!r}; a checkpoint is named by its folder")
        try:
            merge(self.net, tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"model {name!r}: {adapter} holds no whole adapter ({str(error).partition(chr(10))[0]})") from error
        self.net.eval().to(encoder.device)
        self.fingerprint = hashlib.sha256(adapter.read_bytes() + encoder.key().encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """The bi-encoder's device."""
        return self.encoder.device

    @property
    def needs(self) -> Needs:
        """Keys and values of a document in the bi-encoder's upper layers."""
        return Needs(self.encoder, Detail.STATES)

    @property
    def runtime(self) -> str:
        """The bi-encoder's runtime."""
        return self.encoder.runtime

    @property
    def precision(self) -> str:
        """The bi-encoder's precision."""
        return self.encoder.precision

    def reading(self) -> str:
        """Always "": an adapter has no settings."""
        return ""

    def score(self, query: str, documents: Vectors, states: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Logits of N documents.

        Args:
            query: any string; it is cut to the model's limit.
            documents: the bi-encoder's vectors of N documents, at Detail.TOKENS or more.
            states: of each document, Ld × 2·d·S.

        Returns:
            logits (N, fp32, on the CPU), and the number of the query's tokens before truncation, special ones not counted.

        Raises:
            ModelError: the model gave a NaN or an infinite logit.
        """
        tokens = self.encoder.tokenize([query], "query", self.limit)
        (encoded,) = self.encoder.encode_queries(tokens, detail=Detail.STATES)
        work = self.work(Inputs(query, (), self.limit, encoded, documents, states))
        logits = torch.zeros(len(documents.pooled), dtype=torch.float32, device="cpu")
        logits[[place for batch in work for place in batch.positions]] = self.logits(work)
        return logits, tokens[0].full_length

    def work(self, inputs: Inputs) -> list[DocumentBatch]:
        """Groups the documents into batches, one for each forward."""
        assert inputs.encoded_query is not None and inputs.vectors is not None
        encoded, lengths = EncodedInputs(inputs.encoded_query, inputs.vectors, inputs.states), inputs.vectors.offsets.diff().tolist()
        found = []
        for batch in plan_batches([length + 1 for length in lengths], DOCUMENT_TOKEN_BUDGET):
            tokens = sum(lengths[place] for place in batch)
            found.append(DocumentBatch(batch.tolist(), tokens + len(batch), False, encoded, tokens))
        return found

    @exactly(tensors=True)
    def logits(self, work: Sequence[WorkItem]) -> Tensor:
        """One logit for each document, batch by batch (fp32, on the CPU).

        Raises:
            ModelError: the model gave a NaN or an infinite logit.
        """
        found = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        with torch.inference_mode():
            for batch in work:
                assert isinstance(batch, DocumentBatch)
                inputs, rows = batch.inputs, torch.tensor(batch.positions, dtype=torch.int64, device=self.device)
                padded, mask = padded_states([inputs.states[i] for i in batch.positions], self.net, self.limit)
                pooled, A = inputs.documents.pooled[rows], inputs.attention[rows]
                found.append(self.net(inputs.start, inputs.last, None, inputs.query.own[None], padded, mask, pooled, A).cpu())
        logits = torch.cat(found)
        if not bool(logits.isfinite().all()):
            raise ModelError(f"model {self.name!r} gave a NaN or infinite score")
        return logits

    def flops(self, work: Sequence[WorkItem]) -> int:
        """FLOPs of scoring encoded documents for an encoded query; a multiplication and an addition count as two.

        A fused layer has six d × d and two d × m maps, 2·Lq·(6d² + 2dm), attention within the query, 4·Lq²·d, and attention
        to the document, 4·Lq·Ld·d. Subspace attention takes 2·Lq·Ld·r.
        """
        config, total = self.encoder.config, 0
        d, m = int(config.hidden_size), int(config.intermediate_size)
        for batch in work:
            assert isinstance(batch, DocumentBatch)
            own = min(int(batch.inputs.query.vectors.lengths), self.limit)
            Lq, count, tokens = own + self.encoder.specials, len(batch.positions), batch.tokens
            layer = count * (2 * Lq * (6 * d * d + 2 * d * m) + 4 * Lq * Lq * d) + 4 * Lq * tokens * d
            total += len(self.net.layers) * layer + 2 * own * tokens * self.encoder.token_dimensions
        return total


def merge(net: OneWay, tensors: dict[str, Tensor]) -> None:
    """Loads an adapter's tensors into a network that was just made from its bi-encoder.

    Args:
        net: the network.
        tensors: NAME.A (r × in) and NAME.B (out × r) add B·A to the weight NAME. Any other tensor replaces the parameter of its name.

    Raises:
        KeyError, RuntimeError: a name is missing or unknown, or a shape does not fit.
    """
    weights = net.state_dict()
    updates = {name.removesuffix(".A") for name in tensors if name.endswith(".A")}
    plain = {name: value for name, value in tensors.items() if name.removesuffix(".A").removesuffix(".B") not in updates}
    wanted = {name for name, _ in net.named_parameters() if ".layers." not in f".{name}" or name.endswith((".gate", ".null_key"))} | {"calibration"}
    odd = plain.keys() ^ wanted | {name for name in plain.keys() & wanted if plain[name].shape != weights[name].shape}
    if odd:
        raise KeyError(f"tensors missing, not known or of another shape: {', '.join(sorted(odd))}")
    for name in updates:
        plain[f"{name}.weight"] = weights[f"{name}.weight"] + tensors[f"{name}.B"] @ tensors[f"{name}.A"]
    net.load_state_dict(weights | plain)


def load(source: Source, placement: Placement, loaded: Mapping[str, Encoder]) -> OneWayCrossEncoder:
    """Loads a one-way cross-encoder by registry id or by its adapter's file. If its bi-encoder is loaded already, that one is used.

    Raises:
        UserError: the model is not found, the adapter was trained on other weights, or an instruction is asked for.
    """
    name, backbone = source.name, backbone_of(source.name)
    assert backbone is not None
    if placement.overrides.instruction is not None:
        raise UserError(f"model {name!r} takes no instruction")
    encoder = next((one for one in loaded.values() if isinstance(one, BiEncoder) and one.name == backbone and _as_trained(one)), None)
    encoder = encoder or load_encoder(Source(backbone, "bi-encoder"), replace(placement, overrides=AS_IT_IS))
    return OneWayCrossEncoder(encoder, ADAPTERS / f"{name}.safetensors" if name in REGISTRY else Path(name), name)


def backbone_of(name: str) -> str | None:
    """The id of the bi-encoder that a one-way adapter belongs to; None if the name is not that of a one-way adapter."""
    info = REGISTRY.get(name)
    if info is not None:
        return info.source.removeprefix("adapter:") if info.source.startswith("adapter:") else None
    return DEFAULT_MODEL if name.endswith(".safetensors") else None


def _as_trained(encoder: BiEncoder) -> bool:
    """Whether an encoder of the backbone's name makes vectors as those that the adapter was trained on."""
    shipped = shipped_subspace(encoder.weights) if encoder.overrides == AS_IT_IS else None
    return shipped is not None and encoder.subspace is not None and torch.equal(encoder.subspace.cpu(), shipped)
