"""Examples become batches: text, labels on the answers alone, and media whose fine side is made in the main process.

A dataset's workers read pictures, make their coarse views and tokens, and no more. The fine features take the model,
which only the main process has in its current state, so a worker's streams are *deferred*: `media_in_forward` makes
them when the batch reaches the model.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import FlexcoreError
from ..sources import FineSource
from ..streams import FineStream, StreamBatch
from .conversation import resolve, written
from .processing import Adapter, View
from .training_data import Example, Problem
from .training_groups import media_parameters

TOO_LONG = ("skip", "truncate")
IGNORED = -100


class DeferredSource(FineSource):
    """A medium's place in a batch until `media_in_forward` makes its fine side.

    Args:
        view: What the adapter made of the medium.
        width: Of the features to come.
    """

    def __init__(self, view: View, width: int):
        self.view = view
        self.grid = view.grid
        self.width = width
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def features(self, regions: Tensor) -> Tensor:
        """There are none yet.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "flex_streams must be made before the model reads them: call media_in_forward(model, adapter) once, on "
            "the model that the Trainer gets"
        )


def deferring(adapter: Adapter) -> Adapter:
    """The same adapter, for worker processes: its streams wait for `media_in_forward`."""
    twin: Any = copy.copy(adapter)
    twin._streams = functools.partial(_deferred, adapter.model.config.get_text_config().hidden_size)
    return twin


def _deferred(width: int, views: Sequence[Any]) -> list[FineStream]:
    return [FineStream(view.grid, None, None, DeferredSource(view, width)) for view in views]


def media_in_forward(model: Any, adapter: Adapter, needed: bool = False) -> list[Any]:
    """Make deferred media when a batch reaches the model, and let every step reach all that media train.

    A vision tower may have layers that nothing uses, and a process' batch no media at all. The others would wait for
    those gradients, so in several processes a zero that depends on them is added to the loss. So it is where media
    reach all that trains and a batch has none: a step without gradients, not an error in the middle of a run.

    Args:
        model: What the Trainer gets: wrapped, with peft around it or not.
        adapter: What makes the fine side, with the model as it is now.
        needed: Refuse to train on a process' batch without media. DeepSpeed joins the processes' gradients in the
            order in which each has them ready: without media another one, and it would add up what doesn't belong
            together.

    Returns:
        Hooks; call `remove()` on each to undo it.
    """
    trained = media_parameters(model)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        streams = kwargs.get("flex_streams")
        if isinstance(streams, StreamBatch):
            kwargs = {**kwargs, "flex_streams": _made(adapter, streams)}
        if needed and torch.is_grad_enabled() and not (streams is not None and streams.n_media):
            raise ValueError(
                f"every process' batch must hold a medium to train with DeepSpeed, this one of "
                f"{len(kwargs['labels'])} holds none; make batches larger, or leave examples without media out"
            )
        return args, kwargs

    def after(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        distributed = torch.distributed
        together = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        loss = getattr(out, "loss", None)
        # under ZeRO-3 a parameter that lies elsewhere is empty here, and its owner reduces it
        here = [p for p in trained if p.requires_grad and p.numel()] if together else []
        if loss is None or not torch.is_grad_enabled():
            return out
        if not loss.requires_grad:
            here = [p for p in module.parameters() if p.requires_grad and p.numel()]
        if here:
            out.loss = loss + torch.stack([(p.sum() * 0.0).to(loss) for p in here]).sum()
        return out

    return [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]


def _made(adapter: Any, batch: StreamBatch) -> StreamBatch:
    waiting = [s for sample in batch.samples for s in sample if isinstance(s.source, DeferredSource)]
    if not waiting:
        return batch
    new = iter(adapter._streams([s.source.view for s in waiting]))  # type: ignore[attr-defined]

    def made(stream: FineStream) -> FineStream:
        if not isinstance(stream.source, DeferredSource):
            return stream
        assert stream.coarse_positions is not None
        return next(new).at(stream.coarse_positions)

    return StreamBatch(tuple(tuple(made(stream) for stream in sample) for sample in batch.samples))


def stops(model: Any, tokenizer: Any) -> list[str]:
    """The tokens at which generation stops, as text; the tokenizer's own first."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    tokens = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None)]
    return list(dict.fromkeys(str(token) for token in tokens if token))


def answer_labels(tokenizer: Any, text: str, spans: Iterable[tuple[int, int]], input_ids: Tensor) -> Tensor:
    """Labels on the answers of a conversation, and nowhere else.

    An answer's tokens are those that its text adds to what comes before it. Where the tokenizer joins the answer's
    first letters with the prompt's last, the joint token belongs to the answer.

    Args:
        tokenizer: What made `input_ids`.
        text: The conversation, a placeholder for each medium.
        spans: The answers' `(start, end)` in characters, all of them behind the media.
        input_ids: `[T]`, with the media's coarse tokens.

    Returns:
        `[T]`, -100 outside the answers.

    Raises:
        ValueError: `input_ids` doesn't end as the text does.
    """
    spans = list(spans)
    whole = tokenizer(text)["input_ids"]

    def upto(end: int) -> int:
        part = whole if end == len(text) else tokenizer(text[:end])["input_ids"]
        same = (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b)
        return next(same, min(len(part), len(whole)))

    places = [(upto(start), upto(end)) for start, end in spans]
    labels = torch.full_like(input_ids, IGNORED)
    shift, first = len(input_ids) - len(whole), places[0][0]
    if shift < 0 or input_ids[first + shift :].tolist() != whole[first:]:
        raise ValueError(
            "the processor's tokens must end as the tokenizer's do from the first answer on; media must come before it"
        )
    for start, end in places:
        labels[start + shift : end + shift] = input_ids[start + shift : end + shift]
    return labels


class TrainingSamples(Dataset[dict[str, Any]]):
    """Examples as a Trainer's dataset, for `FlexCollator` and `media_in_forward`.

    An example that turns out to be unusable only now (a picture that opens and doesn't decode, a sequence that is too
    long with its coarse tokens) is reported once, and the next usable one takes its place: which one that is depends
    on nothing but the files, so a run that is resumed trains on the same.

    Args:
        examples: What `read_examples` found.
        adapter: For the model that is trained.
        conversation: `auto`, `v1` or `template`.
        max_length: Tokens that a sequence may have, coarse ones included; None is any number.
        too_long: `skip` a longer sequence, or `truncate` it, as LLaVA does, if its media and a label are kept.
        report: Told about unusable examples, in whatever process finds them. Default: standard error.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        adapter: Adapter,
        *,
        conversation: str = "auto",
        max_length: int | None = None,
        too_long: str = "skip",
        report: Callable[[Problem], None] | None = None,
    ):
        if not examples:
            raise ValueError("examples must hold at least one, got none")
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
        self.examples = list(examples)
        self.adapter = deferring(adapter)
        processor = adapter.processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.stops = stops(adapter.model, self.tokenizer)
        self.conversation = resolve(adapter, conversation)
        self.max_length = max_length
        self.too_long = too_long
        self.report = report or _to_stderr
        # in shared memory, as any worker may find out
        self._lost = torch.zeros(len(self.examples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lost(self) -> int:
        """Examples that turned out to be unusable so far, in all processes that share this dataset."""
        return int(self._lost.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample of batch size 1 with `labels`.

        Raises:
            ValueError: No example can be used.
        """
        for ahead in range(len(self.examples)):
            i = (index + ahead) % len(self.examples)
            if self._lost[i]:
                continue
            try:
                return self.make(self.examples[i])
            except (ValueError, OSError, FlexcoreError) as error:
                self._lost[i] = True
                self.report(Problem(self.examples[i].where, str(error)))
        raise ValueError(f"none of {len(self.examples)} examples can be used")

    def make(self, example: Example) -> dict[str, Any]:
        """An example's tokens, labels and coarse views.

        Raises:
            ValueError: It can't be used; so do OSError and FlexcoreError.
        """
        text, spans = written(self.adapter, example.turns, self.conversation, self.stops)
        media = {self.adapter.keyword: [list(example.media)]} if example.media else {}
        made = dict(self.adapter(text=[text], **media))
        ids = made["input_ids"]
        made["labels"] = answer_labels(self.tokenizer, text, spans, ids[0])[None]
        if self.max_length is not None and ids.shape[1] > self.max_length:
            made = self._shorter(made, self.max_length)
        return made

    def check(self, example: Example) -> None:
        """Raise ValueError if an example is too long whatever its media: cheap, so that it can be asked of all."""
        if self.max_length is None or self.too_long == "truncate":
            return
        # a token is at least a byte
        if sum(len(f"{turn.question}{turn.answer}".encode()) for turn in example.turns) <= self.max_length:
            return
        text, _ = written(self.adapter, example.turns, self.conversation, self.stops)
        self._refuse(len(self.tokenizer(text)["input_ids"]), "text alone")

    def _refuse(self, length: int, what: str) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{length:,} tokens ({what}), max_length is {self.max_length:,}")

    def _shorter(self, made: Mapping[str, Any], length: int) -> dict[str, Any]:
        shape = made["input_ids"].shape
        if self.too_long == "skip":
            self._refuse(shape[1], "with its coarse tokens")
        cells = [int(s.coarse_positions.max()) for s in made["flex_streams"].samples[0]]
        if max(cells, default=0) >= length or not bool((made["labels"][:, 1:length] != IGNORED).any()):
            raise ValueError(
                f"{shape[1]:,} tokens, and the first {length:,} (max_length) hold not all of its media, or nothing of "
                "an answer"
            )
        return {
            name: value[:, :length] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in made.items()
        }


def _to_stderr(problem: Problem) -> None:
    tqdm.write(f"left out: {problem}", file=sys.stderr)
