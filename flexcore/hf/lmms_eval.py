"""The model `flexcore` of lmms-eval: any checkpoint with an adapter, on any of its tasks.

    python -m lmms_eval --model flexcore --tasks vstar_bench --batch_size 4 \
        --model_args pretrained=PATH,adapter=image,zoom=3,first_layer=8,fine_weights=FOLDER

lmms-eval finds it through the entry-point group `lmms_eval.models` and is the only one to import this module.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms

from ..config import FlexConfig
from .conversation import SYSTEM, Turn, prompt, resolve
from .likelihood import answer_tokens, likelihoods, with_answer

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

    from .inputs import FlexInputs

_NEW_TOKENS = 1024
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("flexcore", simple_class_path=f"{__name__}.{FlexcoreModel.__name__}")


class FlexcoreModel(lmms):
    """A wrapped model and its adapter, as lmms-eval asks for answers and likelihoods.

    Args:
        pretrained: A checkpoint that transformers loads; one that a wrapped model saved brings its fine weights.
        adapter: Name of the adapter.
        fine_weights: A folder that `save_adapter_weights` wrote.
        batch_size: Questions per forward pass.
        device: Default: the process's own with several processes, else the first GPU or the CPU.
        device_map: Spreads one model over devices instead.
        dtype: Of the weights, as transformers takes it.
        attn_implementation: The base attention, as transformers takes it.
        conversation: `v1`, LLaVA-1.5's; `template`, the chat template's; or `auto`, as in training and in
            `benchmarks.vqa`: `v1` unless the processor has a template that speaks otherwise, or one is given.
        system_prompt: A sentence, or a file that holds it. Default: LLaVA-1.5's in `v1`, else the template's own.
        chat_template: A file that holds one. Default: the processor's.
        max_batch_size: Ignored; lmms-eval always passes it.
        **options: Fields of `FlexConfig` go to `wrap`, all others to the adapter.

    Raises:
        ValueError: An option is out of range.
        TypeError: An option that neither knows.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str = "image",
        *,
        fine_weights: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        conversation: str = "auto",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        import torch
        from accelerate import Accelerator, InitProcessGroupKwargs

        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        # Ranks finish their shares at different times, and wait for each other only then.
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            self.device = self.accelerator.device
        else:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

        names = {field.name for field in fields(FlexConfig)}
        config = {name: value for name, value in options.items() if name in names}
        loading = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        loading = {name: value for name, value in loading.items() if value is not None}
        self.model = _load(pretrained, fine_weights, config, loading).eval()
        if device_map is None:
            self.model.to(self.device)
        own = {name: value for name, value in options.items() if name not in names}
        self.adapter = _adapter(adapter, self.model, pretrained, own)
        self.tokenizer = self.adapter.tokenizer
        self.tokenizer.padding_side = "left"
        self.system_prompt = self._resolve_system_prompt(system_prompt or "")
        if chat_template:
            self.adapter.processor.chat_template = self._resolve_system_prompt(chat_template)
            conversation = "template" if conversation == "auto" else conversation
        self.conversation = resolve(self.adapter, conversation)

    # ------------------------------------------------------------------ what lmms-eval asks for

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, cut before the first of a task's stop strings."""
        answers: list[str] = [""] * len(requests)
        # Requests of one batch share their settings, long prompts first: what doesn't fit shows at once.
        kinds = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (kinds[i], -len(requests[i].args[0])))
        with self._bar(len(requests)) as bar:
            for _, same in itertools.groupby(order, key=lambda i: kinds[i]):
                for indices in _chunks(list(same), self.batch_size):
                    some = [requests[i] for i in indices]
                    for i, answer in zip(indices, self._generate(some), strict=True):
                        answers[i] = answer
                    bar.update(len(indices))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """How likely each continuation is: its mean negative log-likelihood, and whether it is the greedy answer.

        lmms-eval takes the option with the lowest value, as its own models return their loss here.
        """
        from lmms_eval.api.instance import GenerationResult

        scores: list[Any] = [None] * len(requests)
        # Options of one question side by side: its pictures are encoded once.
        order = sorted(range(len(requests)), key=lambda i: (_question(requests[i]), i))
        prompts: dict[Any, tuple[str, FlexInputs]] = {}
        with self._bar(len(requests)) as bar:
            for indices in _chunks(order, self.batch_size):
                wanted = {_question(requests[i]): requests[i] for i in indices}
                prompts = {key: value for key, value in prompts.items() if key in wanted}
                for key, request in wanted.items():
                    if key not in prompts:
                        ((text, media),) = self._prompts([request])
                        prompts[key] = text, self.adapter(text=[text], **{self.adapter.keyword: [media]})
                rows = [(*prompts[_question(requests[i])], self._target(requests[i])) for i in indices]
                for i, score in zip(indices, self._score(rows), strict=True):
                    scores[i] = GenerationResult(text=_Scored(score))
                bar.update(len(indices))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: a task of several rounds makes up its next question from the last answer."""
        raise NotImplementedError("the model flexcore answers single questions; choose tasks of one round")

    def clean(self) -> None:
        """Let go of the model; lmms-eval calls this before it scores."""
        del self.adapter  # it holds the model too
        super().clean()

    # ------------------------------------------------------------------ how

    def _prompts(self, requests: Sequence[Instance]) -> list[tuple[str, list[Any]]]:
        """Each request's prompt in the model's chat format, and its media."""
        out = []
        for request in requests:
            context, _, visuals, index, task, split = request.args
            media = list(visuals(self.task_dict[task][split][index]) or [])
            out.append((self._prompt(context, len(media)), media))
        return out

    def _prompt(self, context: str, media: int) -> str:
        token = self.adapter.placeholder
        # Some tasks say where their pictures go; the others mean: before the question.
        placed = media > 0 and context.count(token) == media
        if self.conversation == "v1":
            text = prompt(self.adapter, Turn(context, "", 0 if placed else media), "v1")
            return self.system_prompt + text.removeprefix(SYSTEM) if self.system_prompt else text
        if not placed and not self.system_prompt:
            return prompt(self.adapter, Turn(context, "", media), "template")
        content: list[dict[str, str]] = []
        for i, text in enumerate(context.split(token) if placed else [""] * media + [context]):
            content += [{"type": self.adapter.medium}] if i else []
            # Templates set pictures off on their own.
            content += [{"type": "text", "text": text.strip("\n")}] if text.strip() else []
        messages = [{"role": "user", "content": content}]
        if self.system_prompt:
            system = [{"type": "text", "text": self.system_prompt}]
            messages.insert(0, {"role": "system", "content": system})
        return str(self.adapter.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to one batch of requests with the same settings."""
        import torch

        until, settings = self._settings(requests[0].args[1])
        texts, media = zip(*self._prompts(requests), strict=True)
        inputs = self._move(self.adapter(text=list(texts), **{self.adapter.keyword: list(media)}))
        if until:
            settings |= {"stop_strings": until, "tokenizer": self.tokenizer}
        with torch.inference_mode():
            out = self.model.generate(**inputs, **settings)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers = []
        for request, answer in zip(
            requests, self.adapter.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            for stop in until:
                answer = answer.split(stop)[0]
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answer)
        return answers

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Stop strings, and keyword arguments for `generate`."""
        from transformers import GenerationConfig

        settings = {name: value for name, value in given.items() if value is not None}
        until = settings.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"generation_kwargs: until must be a string or a list of strings, got {until!r}")
        if "max_gen_toks" in settings:
            settings.setdefault("max_new_tokens", settings["max_gen_toks"])
        # Tasks carry settings of other models along, such as how LLaVA's own code crops.
        known = vars(GenerationConfig())
        settings = {name: value for name, value in settings.items() if name in known}
        settings |= {"num_return_sequences": 1, "return_dict_in_generate": False}
        settings.setdefault("max_new_tokens", _NEW_TOKENS)
        temperature = settings.get("temperature")
        sample = settings.get("do_sample", bool(temperature)) and temperature != 0
        settings["do_sample"] = bool(sample)
        if not sample:
            # None undoes what the checkpoint's generation config says about sampling.
            settings |= dict.fromkeys(_SAMPLING)
        pad = self.tokenizer.pad_token_id
        settings["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        return [stop for stop in until if stop], settings

    def _target(self, request: Instance) -> str:
        """The continuation that a request asks about."""
        _, target, _, index, task, split = request.args
        return str(target if isinstance(target, str) else target(self.task_dict[task][split][index]))

    def _score(self, rows: Sequence[tuple[str, FlexInputs, str]]) -> list[tuple[float, bool]]:
        """Loss and greediness of a batch of (prompt, its inputs, continuation)."""
        from .collation import collate

        features, answers = [], []
        for asked, inputs, target in rows:
            answer = answer_tokens(self.tokenizer, asked, target)
            feature, start = with_answer(inputs, answer)
            features.append(feature)
            answers.append((start, answer))
        return likelihoods(self.model, self._move(collate(features, tokenizer=self.adapter)), answers)

    def _move(self, inputs: FlexInputs) -> FlexInputs:
        return inputs.to(self.model.device, self.model.dtype)

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc="flexcore", unit="request", disable=self.rank != 0)


class _Scored(tuple[float, bool]):
    """A request's loss and whether it is the greedy answer, in the one form that lmms-eval hands on unchanged.

    Its evaluator turns any other pair into a string. Its response cache would make a plain pair of it, to be turned
    into a string on the next run; the cache passes over texts that strip to nothing.
    """

    def strip(self) -> str:
        return ""


def _question(request: Instance) -> tuple[Any, ...]:
    """What requests have in common that ask about the same prompt."""
    context, _, _, index, task, split = request.args
    return task, split, index, context


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _load(pretrained: str, fine_weights: str | None, options: dict[str, Any], loading: dict[str, Any]) -> Any:
    """The wrapped model; `options` change what its saved config, or the default one, says."""
    from .checkpoint import load_adapter_weights, read_adapter_config
    from .pretrained import from_pretrained
    from .saving import Checkpoint

    if fine_weights is not None:
        config, _ = read_adapter_config(fine_weights)
    else:
        config, _ = Checkpoint(pretrained, {}).config() or (FlexConfig(), None)
    model = from_pretrained(pretrained, config=config.replace(**options), **loading)
    if fine_weights is not None:
        load_adapter_weights(model, fine_weights)
    return model


def _adapter(name: str, model: Any, pretrained: str, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    from ..plugins import load_adapter

    return load_adapter(name, model, AutoProcessor.from_pretrained(pretrained), **options)
