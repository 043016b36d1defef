"""The ways of reading sound that `benchmarks.whisper_wer` compares: transcribing with them, and training them."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

import flexcore
from flexcore.sources import TensorSource
from flexcore.streams import FineStream, StreamBatch

from .ctranslate2_whisper import load
from .speech_data import RATE, Utterance, errors

Clip = tuple[Utterance, Any, Tensor]  # with its view and its [frames, C] encoder states
MOST_TOKENS = 80  # of a transcript


@dataclass
class Trained:
    """What came of training.

    Args:
        pooling: The trained pooling.
        fine: The trained fine projections' weights; None without.
        steps: Those after which it did best on the validation clips.
        history: Errors on them by step.
        losses: First and last ten steps' mean.
        seconds: Of all cores' work in training, validation left out.
    """

    pooling: nn.Module
    fine: dict[str, Tensor] | None
    steps: int = 0
    history: dict[int, float] = field(default_factory=dict)
    losses: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0


class Bench:
    """Models around the same encoder and decoder, which stay as they are.

    Args:
        pool: Encoder states per pooled one.
        regions: Regions that a row opens in each layer that reads.
        region_size: Encoder states per region.
        batch: Clips at once.
    """

    def __init__(self, pool: int, regions: int, region_size: int, batch: int):
        self.plain, extractor, self.tokenizer, self.weights = load()
        self.plain.requires_grad_(False)
        processor = SimpleNamespace(feature_extractor=extractor, tokenizer=self.tokenizer)
        self.adapter = flexcore.load_adapter(
            "whisper", self.plain, processor, pool=pool, region_size=region_size
        )
        self.pool, self.regions, self.region_size, self.batch = pool, regions, region_size, batch

    @property
    def states(self) -> int:
        """Encoder states of a window."""
        return self.adapter.layout.frames

    def hear(self, utterances: Sequence[Utterance], name: str) -> list[Clip]:
        """Run the encoder once over each recording; states are kept in half the bytes."""
        out = []
        for utterance in tqdm(utterances, desc=f"encoding {name}", disable=None):
            (view,) = self.adapter.views([(utterance.samples, RATE)])
            out.append((utterance, view, self.adapter.encode([view])[0].half()))
        return out

    def flex(self, selector: str = "top_k", seed: int = 0, fine: dict[str, Tensor] | None = None) -> Any:
        """A wrapped copy, with trained fine weights if given."""
        sizes = {"top_k": self.regions, "region_size": self.region_size}
        config = flexcore.FlexConfig(first_layer=0, selector=selector, seed=seed, **sizes)
        model = flexcore.wrap(copy.deepcopy(self.plain), config)
        if fine is not None:
            model.flex_fine.load_state_dict(fine)
        return model

    def average(self, states: Tensor) -> Tensor:
        """Plain pooling."""
        return states.unflatten(1, (-1, self.pool)).mean(dim=2)

    def inputs(self, clips: Sequence[Clip], pooling: Any, flex: bool) -> dict[str, Any]:
        """What a forward or generate takes; without pooling all states, with `flex` the fine ones beside them."""
        states = torch.stack([s for _, _, s in clips]).float()
        coarse = states if pooling is None else pooling(states)
        out: dict[str, Any] = {"encoder_outputs": BaseModelOutput(last_hidden_state=coarse)}
        if flex:
            cells = torch.arange(coarse.shape[1])
            out["flex_streams"] = StreamBatch(
                tuple(
                    (FineStream(view.grid, cells, None, TensorSource(s, view.grid)),)
                    for (_, view, _), s in zip(clips, states, strict=True)
                )
            )
        return out

    def batches(self, clips: Sequence[Clip]) -> Iterator[Sequence[Clip]]:
        """Of `batch` clips."""
        for start in range(0, len(clips), self.batch):
            yield clips[start : start + self.batch]

    @torch.no_grad()
    def transcribe(self, model: Any, clips: Sequence[Clip], pooling: Any) -> list[list[int]]:
        """Greedy transcripts as tokens, the end token left out."""
        out = []
        end = model.generation_config.eos_token_id
        for batch in self.batches(clips):
            given = self.inputs(batch, pooling, flexcore.is_wrapped(model))
            found = model.generate(**given, do_sample=False, max_new_tokens=MOST_TOKENS)
            out += [[t for t in row.tolist() if t < end] for row in found]
        return out

    def measure(self, sets: dict[str, list[Clip]], model: Any, pooling: Any) -> dict[str, Any]:
        """Wrong words and words per set, and the states that a row reads in a layer, on average."""
        started, out, reads = time.perf_counter(), {}, []
        for name, clips in sets.items():
            if flexcore.is_wrapped(model):
                with flexcore.trace(model) as trace:
                    texts = self.transcribe(model, clips, pooling)
                read = [r for r in trace.records if r.read_in is not None]
                lengths = {r.grid: fine_tokens(r.grid) for r in read}
                reads += [int(lengths[r.grid][r.regions].sum()) for r in read]
            else:
                texts = self.transcribe(model, clips, pooling)
            said = self.tokenizer.batch_decode(texts, skip_special_tokens=True)
            pairs = [errors(u.text, text) for (u, _, _), text in zip(clips, said, strict=True)]
            wrong, words = (sum(p[i] for p in pairs) for i in (0, 1))
            out[name] = {"wrong": wrong, "words": words, "examples": said[:2]}
        coarse = self.states if pooling is None else self.states // self.pool
        fine = sum(reads) / len(reads) if reads else 0.0
        spent = time.perf_counter() - started
        return {"sets": out, "coarse states": coarse, "fine states": fine, "seconds": spent}

    def labels(self, clips: Sequence[Clip]) -> list[Tensor]:
        """What the untouched model says to each clip, its own start and end tokens around it."""
        config = self.plain.generation_config
        texts = self.transcribe(self.plain, clips, None)
        return [torch.tensor([config.no_timestamps_token_id, *t, config.eos_token_id]) for t in texts]

    def train(
        self,
        name: str,
        clips: Sequence[Clip],
        labels: Sequence[Tensor],
        model: Any,
        pooling: nn.Module,
        *,
        seed: int,
        steps: int,
        every: int,
        lr: float,
        validate: Callable[[Any, nn.Module], float],
    ) -> Trained:
        """Fit the pooling, and the fine projections if the model has any; keep what validates best.

        Args:
            name: For the progress bar.
            clips: To train on.
            labels: What to say to them.
            model: The plain model, or a wrapped one.
            pooling: To train.
            seed: Of the order in which clips are drawn.
            steps: In all; the rate falls to nothing over them.
            every: Steps between validations.
            lr: The first step's rate.
            validate: From model and pooling to an error rate.
        """
        fine = getattr(model, "flex_fine", None)
        parameters = [*pooling.parameters(), *(fine.parameters() if fine is not None else [])]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        draw, losses, best = random.Random(seed), [], Trained(pooling, None)
        with tqdm(range(1, steps + 1), desc=f"training {name}", disable=None) as bar:
            for step in bar:
                started = time.process_time()
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - (step - 1) / steps)
                chosen = draw.sample(range(len(clips)), min(self.batch, len(clips)))
                loss = self.loss(model, pooling, [clips[i] for i in chosen], [labels[i] for i in chosen])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                best.seconds += time.process_time() - started
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
                if step % every == 0 or step == steps:
                    best.history[step] = validate(model, pooling)
                    if best.history[step] <= min(best.history.values()):  # of equals the later one
                        best.steps, best.pooling = step, copy.deepcopy(pooling)
                        best.fine = None if fine is None else copy.deepcopy(fine.state_dict())
        best.losses = (sum(losses[:10]) / len(losses[:10]), sum(losses[-10:]) / len(losses[-10:]))
        return best

    def loss(self, model: Any, pooling: Any, clips: Sequence[Clip], labels: Sequence[Tensor]) -> Tensor:
        """The decoder's own loss on a batch."""
        target = nn.utils.rnn.pad_sequence(list(labels), True, -100)
        # the model must not be asked for the token it is always given
        target[:, 0] = -100
        given = target.masked_fill(target == -100, model.config.pad_token_id).roll(1, dims=1)
        given[:, 0] = model.config.decoder_start_token_id
        given[:, 1] = model.generation_config.no_timestamps_token_id
        batch = self.inputs(clips, pooling, flexcore.is_wrapped(model))
        loss: Tensor = model(**batch, decoder_input_ids=given, labels=target).loss
        return loss


def fine_tokens(grid: flexcore.Grid) -> Tensor:
    """`[n_regions]` fine tokens of each region that hold sound."""
    tokens = grid.tokens(torch.arange(grid.n_regions))
    return ((tokens >= 0) & grid.fine_valid[tokens.clamp(min=0)]).sum(dim=1)


def rate(found: dict[str, Any], *names: str) -> float:
    """Word error rate of some of the sets that were measured, of all without names."""
    some = [found["sets"][name] for name in names or found["sets"]]
    return sum(s["wrong"] for s in some) / sum(s["words"] for s in some)
