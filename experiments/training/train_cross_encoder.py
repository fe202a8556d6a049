"""python experiments/training/train_cross_encoder.py --labelled scifact \\
    --labelled rerank_lab/data/numpydoc --text text/debian --out FILE

Trains a one-way cross-encoder (rerank_lab/models/one_way.py) on
all-MiniLM-L6-v2: low-rank updates, gates and a head. Learns from lists: judged
queries of each --labelled collection's train split (one relevant document, the
others from its candidates), and titles and sentences of every collection's and
--text folder's documents, under the scores of a teacher (KL divergence).

Some judged queries are held out for the development score, together with those
of every --watch collection, of which nothing else is seen. Each writes a BEIR
folder into --work, so that rerank_lab.eval can choose weights on it. The same
command goes on where it was stopped. experiments/training/cross_encoder holds log and
learning curve of the adapter that ships.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax
from tqdm import tqdm

from rerank_kernels import project_normalize, subspace_attention
from rerank_lab.cache.vectors import VectorCache, ensure
from rerank_lab.cli import path_of
from rerank_lab.datasets.runs import Ranked, order
from rerank_lab.environment import describe
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically
from rerank_lab.measures.quality import measure_run
from rerank_lab.models.base import Detail
from rerank_lab.models.bi_encoder import BiEncoder, load
from rerank_lab.models.one_way import TAU, OneWay, padded_states
from rerank_lab.models.registry import DEFAULT_MODEL, Placement, Source
from rerank_lab.reranker import Reranker
from training_lists import Example, examples, labelled, pseudo_queries, read_corpus, split, write_split

QUERY_TOKENS = 64
BATCHES_SORTED = 16  # this many batches are drawn at once and sorted by the query's length, to save padding
DEV_QUERIES, DEV_TOP_K = 100, 50


class LowRank(nn.Module):
    """A frozen linear map W plus a trained low-rank update: y = (W + B·A) x."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.base.weight, self.base.bias) + linear(linear(x, self.A), self.B)


def adaptable(encoder: BiEncoder, rank: int) -> OneWay:
    """The one-way network. Only low-rank updates of its layers' maps, its gates and its head are trained; everything else is frozen."""
    net = OneWay(encoder.model, encoder.state_layers)
    for layer in net.layers:
        layer.requires_grad_(False)
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.Linear):
                setattr(layer, name, LowRank(module, rank))
        layer.gate.requires_grad_(True), layer.null_key.requires_grad_(True)
    return net


class Trainer:
    """Trains the network.

    Args:
        options: of the command line.
        encoder: the frozen backbone.

    Attributes:
        net: the network; `trained` has its trained parameters, `average` their moving average.
        cache: the documents' vectors.
        judged: training examples with judgements.
        text: name of a collection → examples that only the teacher scores.
        dev: name of a collection → held-out examples.
    """

    def __init__(self, options: argparse.Namespace, encoder: BiEncoder):
        self.options, self.encoder = options, encoder
        self.cache = VectorCache(encoder.key(), options.work / "cache", disk_bytes=1 << 60, about=encoder.about())
        self.net = adaptable(encoder, options.rank)
        self.trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        rates = {"gate": 5e-3, "null_key": 5e-3, "cosine_scale": 3e-2, "token_scale": 3e-2, "A": options.rate, "B": options.rate}
        groups = [{"params": [p], "full": rates.get(n.rpartition(".")[2], 1e-3), "weight_decay": 0.01 if p.ndim > 1 else 0.0} for n, p in self.trained.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.random, self.step = random.Random(options.seed), 0
        self.judged: list[Example] = []
        self.text: dict[str, list[Example]] = {}
        self.dev: dict[str, list[Example]] = {}

    def scores(self, lists: list[tuple[str, list[str]]], longest: int) -> list[Tensor]:
        """Logits, with gradients, of each list's documents. The network reads at most `longest` tokens of a document."""
        device, encoder = self.encoder.device, self.encoder
        encodings = encoder.tokenize([query for query, _ in lists], "query", QUERY_TOKENS)
        width = max(len(e) for e in encodings)
        ids = torch.tensor([[*e.ids, *[0] * (width - len(e))] for e in encodings], device=device)
        mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in encodings], device=device).bool()
        own = torch.tensor([[*~e.special, *[False] * (width - len(e))] for e in encodings], device=device).bool()
        texts = [text for _, documents in lists for text in documents]
        of = torch.tensor([n for n, (_, documents) in enumerate(lists) for _ in documents], device=device)
        keys = ensure(encoder, self.cache, texts, max_tokens=encoder.limit, detail=Detail.STATES)
        documents = self.cache.gather(keys, Detail.TOKENS).to(device)
        with torch.no_grad():
            states = encoder.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
            tokens = project_normalize(states[-1][own].contiguous(), encoder.subspace, torch.float16)
            ends = torch.cat([own.new_zeros(1, dtype=torch.int64), own.sum(1).cumsum(0)])
            pairs = torch.stack([of, torch.arange(len(of), device=device)], 1)
            A = torch.zeros(len(of), width, device=device)
            A[own[of]] = subspace_attention(tokens, ends, documents.tokens, documents.offsets, pairs, TAU)
        read, present = padded_states(self.cache.states(keys), self.net, longest)
        first = encoder.state_layers.start
        logits: Tensor = self.net(states[first][of], states[-1][of], mask[of], own[of], read, present, documents.pooled, A)
        return list(torch.split(logits, [len(documents) for _, documents in lists]))

    def draw(self) -> tuple[str, list[str], Tensor]:
        """Draws a training list: query, documents, and the target distribution over them."""
        o, judged = self.options, self.random.random() < self.options.judged
        if judged and self.judged:
            example = self.random.choice(self.judged)
            positive = self.random.choice(example.relevant)
            others = [n for n in range(example.found) if n not in example.relevant]
            near, far = [n for n in others if n < 30], [n for n in others if n >= 30]
            places = [positive, *self.random.sample(near, min(10, len(near))), *self.random.sample(far, min(5, len(far)))]
            wanted = torch.softmax(torch.from_numpy(example.teacher[places]).float() / o.temperature, 0) * o.smoothing
            wanted[0] += 1 - o.smoothing
        else:
            names = list(self.text)
            example = self.random.choice(self.text[self.random.choices(names, [len(self.text[n]) ** 0.5 for n in names])[0]])
            ranked = np.argsort(-example.teacher, kind="stable").tolist()
            middle, rest = ranked[6:40], ranked[40:]
            places = [*ranked[:6], *self.random.sample(middle, min(5, len(middle))), *self.random.sample(rest, min(5, len(rest)))]
            wanted = torch.softmax(torch.from_numpy(example.teacher[places]).float() / o.temperature, 0)
        return example.query, [example.documents[n] for n in places], wanted

    def train(self) -> Iterable[float]:
        """Trains until the last step. Yields the loss of each step."""
        batches: list[list[tuple[str, list[str], Tensor]]] = []
        while self.step < self.options.steps:
            block, position = divmod(self.step, BATCHES_SORTED)
            if not batches or not position:  # the draw depends only on the block's number, so that a resumed run draws the same
                self.random = random.Random(f"{self.options.seed}/{block}")
                drawn = sorted((self.draw() for _ in range(BATCHES_SORTED * self.options.lists)), key=lambda d: len(d[0]))
                batches = [drawn[i : i + self.options.lists] for i in range(0, len(drawn), self.options.lists)]
                self.random.shuffle(batches)
            batch = batches[position]
            scale = min((self.step + 1) / 30, (self.options.steps - self.step) / max(1, self.options.steps - 30))
            for group in self.optimizer.param_groups:
                group["lr"] = group["full"] * scale
            logits = self.scores([(query, documents) for query, documents, _ in batch], self.options.document_tokens)
            parts = [(w * (w.clamp_min(1e-9).log() - log_softmax(s, 0))).sum() for s, (_, _, w) in zip(logits, batch)]
            loss = torch.stack(parts).mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.trained.values(), 2.0)
            self.optimizer.step()
            self.step += 1
            with torch.no_grad():
                for name, p in self.trained.items():
                    self.average[name].lerp_(p, 0.01 if self.step > 50 else 0.2)
            yield float(loss.detach())

    def development(self) -> dict[str, float]:
        """nDCG@10 of the averaged network for each development collection, over its first queries and their nearest documents."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self._load(self.average)
        found = {}
        with torch.no_grad():
            for name, held in self.dev.items():
                run, qrels = {}, {}
                for n, example in enumerate(held[:DEV_QUERIES]):
                    shown = example.documents[: min(DEV_TOP_K, example.found)]
                    logits = torch.cat([self.scores([(example.query, shown[i : i + 25])], self.encoder.limit)[0] for i in range(0, len(shown), 25)])
                    places = order(logits.numpy())
                    run[f"q{n}"] = Ranked([f"d{i}" for i in places], logits.numpy()[places])
                    qrels[f"q{n}"] = {f"d{i}": 1 for i in example.relevant}
                found[name] = round(float(measure_run(run, qrels, ["nDCG@10"])["nDCG@10"].mean()), 4)
        self._load(kept)
        return found

    def calibrate(self, count: int = 100) -> tuple[float, float]:
        """Slope and intercept with which the sigmoid of a logit is a probability of relevance, fitted over judged queries' candidates."""
        import statsmodels.api as sm

        if not self.judged:
            return 1.0, 0.0
        logits, labels = [], []
        with torch.no_grad():
            for example in random.Random(0).sample(self.judged, min(count, len(self.judged))):
                for start in range(0, example.found, 25):
                    logits += self.scores([(example.query, example.documents[start : min(start + 25, example.found)])], self.encoder.limit)[0].tolist()
                labels += [int(n in example.relevant) for n in range(example.found)]
        intercept, slope = sm.Logit(np.array(labels), sm.add_constant(np.array(logits))).fit_regularized(alpha=1e-3, disp=0).params
        return float(slope), float(intercept)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step, "trained": {n: p.detach() for n, p in self.trained.items()}, "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self._load(state["trained"])
        self.average.update(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self) -> dict[str, Tensor]:
        """The averaged network in fp16, in the form that rerank_lab.models.one_way.merge reads."""
        return {name: value.half().contiguous() for name, value in self.average.items()} | {"calibration": self.net.calibration.half()}

    def _load(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(value)


def load_data(trainer: Trainer, options: argparse.Namespace) -> dict[str, str]:
    """Fills the trainer's examples and writes the development splits. Returns the hash of each collection."""
    encoder = Reranker(DEFAULT_MODEL, "fast", cache_dir=options.work / "cache", cache_bytes=1 << 60, device=options.device)
    teacher = "bm25" if options.teacher == "bm25" else encoder.using(options.teacher)
    hashes = {}
    options.labelled, options.text, options.watch = ([p.resolve() for p in paths] for paths in (options.labelled, options.text, options.watch))
    folders = list(dict.fromkeys([*options.labelled, *options.text, *options.watch]))
    if len({f.name for f in folders}) < len(folders):
        raise UserError(f"two of the folders have one name, by which work folder and log know them: {', '.join(map(str, folders))}")
    for folder in folders:
        corpus, name = read_corpus(folder), folder.name
        texts = {identifier: text for identifier, (_, text) in corpus.items()}
        hashes[name] = hashlib.sha256(json.dumps(list(texts.items())).encode()).hexdigest()[:16]
        with tqdm(total=len(texts), desc=f"{name}: encode", unit="doc", disable=None) as bar:
            ensure(
                trainer.encoder,
                trainer.cache,
                list(texts.values()),
                max_tokens=trainer.encoder.limit,
                detail=Detail.STATES,
                progress=lambda n, _: bar.update(n),
            )
        encoder.engine.refresh()

        def pools(queries: list[tuple[str, list[str], str | None]], texts: dict[str, str] = texts) -> list[Example]:
            return examples(texts, queries, teacher, encoder, options.work, lambda items, title: tqdm(items, desc=title, disable=None))

        if folder in options.labelled or folder in options.watch:
            dataset = labelled(folder)
            learnt, held = split(dataset, options.held_out if folder in options.labelled else len(dataset.qrels), options.seed)
            judged = {q: [d for d, grade in dataset.qrels[q].items() if grade > 0] for q in dataset.qrels}
            trainer.judged += pools([(dataset.queries[q], judged[q], None) for q in learnt])
            if held:
                trainer.dev[name] = pools([(dataset.queries[q], judged[q], None) for q in held])
                write_split(options.work / f"dev-{name}", folder, held, dataset)
            hashes[f"{name} train"] = dataset.hash[:16]
        if folder in options.labelled or folder in options.text:
            trainer.text[name] = pools([(q, [], source) for q, source in pseudo_queries(corpus, options.pseudo, options.seed)])
    return hashes


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draws loss and development scores over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [r["step"] for r in records if "loss" in r]
    left.plot(steps, [r["loss"] for r in records if "loss" in r], color="0.2")
    left.set(xlabel="step", ylabel="KL divergence, mean of 50 steps", title="training lists")
    scored = [r for r in records if "dev" in r]
    for name, marker in zip(scored[0]["dev"] if scored else [], "osD^vPX"):
        right.plot([r["step"] for r in scored], [r["dev"][name] for r in scored], marker=marker, markersize=4, label=name)
    right.set(xlabel="step", ylabel=f"nDCG@10, nearest {DEV_TOP_K}", title=f"held-out queries, {DEV_QUERIES} each")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python experiments/training/train_cross_encoder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--labelled", type=path_of, action="append", default=[], metavar="DIR", help="BEIR folder with a train split; may be repeated")
    p.add_argument("--text", type=path_of, action="append", default=[], metavar="DIR", help="BEIR folder of which the corpus alone is read; may be repeated")
    p.add_argument("--watch", type=path_of, action="append", default=[], metavar="DIR", help="as --labelled, for the development score alone")
    p.add_argument(
        "--teacher", default="best:tau=0.1:length=0:lexical=1.25:gamma=0.5", metavar="METHOD", help="a method with settings, or bm25 (default: %(default)s)"
    )
    p.add_argument("--held-out", type=int, default=200, metavar="N", help="judged queries of each collection kept for development (default: 200)")
    p.add_argument("--pseudo", type=int, default=4000, metavar="N", help="queries made from each corpus, at most one a document (default: 4000)")
    p.add_argument("--judged", type=float, default=0.5, metavar="SHARE", help="of lists with a judged query (default: 0.5)")
    p.add_argument("--smoothing", type=float, default=0.3, metavar="SHARE", help="of the teacher in lists with a judged query (default: 0.3)")
    p.add_argument("--temperature", type=float, default=0.5, metavar="T", help="of the teacher's softmax (default: 0.5)")
    p.add_argument("--steps", type=int, default=1000, metavar="N")
    p.add_argument("--lists", type=int, default=8, metavar="N", help="lists of 16 documents a step (default: 8)")
    p.add_argument("--rank", type=int, default=16, metavar="R", help="of the low-rank updates (default: 16)")
    p.add_argument("--rate", type=float, default=4e-4, metavar="LR", help="learning rate of the low-rank updates (default: 4e-4)")
    p.add_argument("--document-tokens", type=int, default=192, metavar="N", help="a document's tokens read in training (default: 192)")
    p.add_argument("--every", type=int, default=250, metavar="N", help="steps between development scores and checkpoints (default: 250)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    p.add_argument("--work", type=path_of, default=Path("results/train-cross-encoder"), metavar="DIR", help="vectors, pools, checkpoint, log, plot")
    p.add_argument("--out", type=path_of, required=True, metavar="FILE.safetensors", help="the adapter")
    return p


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    base = load(Source(DEFAULT_MODEL, "bi-encoder"), Placement(options.device))
    trainer = Trainer(options, base)
    hashes = load_data(trainer, options)
    left_out = {"work", "out", "threads", "every", "device"}
    config = {k: [p.resolve().name for p in v] if isinstance(v, list) else v for k, v in sorted(vars(options).items()) if k not in left_out}
    config |= {"data": hashes, "backbone": base.weights}
    checkpoint, log = options.work / "checkpoint.pt", options.work / "log.jsonl"
    records: list[dict[str, Any]] = [{"config": config, "environment": vars(describe(base.device))}]
    if checkpoint.is_file() and log.is_file():
        records = [json.loads(line) for line in log.read_text().splitlines()]
        differing = [k for k in config if records[0]["config"].get(k) != config[k]]
        if differing:
            raise UserError(f"{options.work} holds a run that differs in {', '.join(differing)}: name another --work")
        trainer.resume(torch.load(checkpoint, weights_only=True))
        records = [r for r in records if r.get("step", 0) <= trainer.step]
    else:
        records.append({"step": 0, "dev": trainer.development()})
    sizes = {name: len(lists) for name, lists in trainer.text.items()}
    print(f"{len(trainer.judged)} judged queries, made ones {sizes}, held out { ({n: len(d) for n, d in trainer.dev.items()}) }", file=sys.stderr)
    start, losses = time.perf_counter(), list[float]()
    with tqdm(total=options.steps, initial=trainer.step, desc="train", disable=None) as bar:
        for loss in trainer.train():
            losses.append(loss)
            bar.update()
            if trainer.step % 50 == 0:
                records.append({"step": trainer.step, "loss": round(float(np.mean(losses)), 4), "seconds": round(time.perf_counter() - start)})
                losses.clear()
            if trainer.step % options.every == 0 or trainer.step == options.steps:
                records.append({"step": trainer.step, "dev": trainer.development()})
                bar.set_postfix(records[-1]["dev"])
                write_atomically(log, "".join(json.dumps(r) + "\n" for r in records))
                plot(records, options.work / "learning-curve.png")
                temporary = checkpoint.with_suffix(".tmp")
                torch.save(trainer.state(), temporary)
                temporary.replace(checkpoint)
    trainer._load(trainer.average)
    trainer.net.calibration.copy_(torch.tensor(trainer.calibrate()))
    about = {"backbone": base.weights, "config": json.dumps(config), "dev": json.dumps(records[-1]["dev"])}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, save(trainer.export(), about))
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, development nDCG@10 {records[-1]['dev']}")


def main() -> int:
    options = parser().parse_args()
    if not options.labelled and not options.text:
        parser().error("nothing to learn from: give --labelled or --text")
    if min(options.every, options.steps, options.lists, options.rank) < 1:
        parser().error("--every, --steps, --lists and --rank must be at least 1")
    try:
        run(options)
    except UserError as error:
        print(f"train_cross_encoder: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntrain_cross_encoder: interrupted; the same command goes on from what {options.work} holds", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
