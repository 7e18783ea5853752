"""Measuring a model on the examples of a task: its metrics, and what it predicted for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loftq.config import one_of
from loftq.data.collate import Collator, padding_id, writing_ids
from loftq.data.examples import IGNORED, Example, Examples
from loftq.data.tasks import task
from loftq.errors import ConfigError, SourceError
from loftq.evaluate import gsm8k
from loftq.evaluate.generation import generate_texts
from loftq.evaluate.head import chunks, losses, parts_of
from loftq.evaluate.metrics import METRICS, score_labels, share_error
from loftq.evaluate.models import eval_mode
from loftq.evaluate.perplexity import mean_and_error, perplexity_of
from loftq.evaluate.predictions import Prediction
from loftq.evaluate.rouge import ROUGE, conditions, mean_scores, pair_scores
from loftq.evaluate.squad import best_spans, score_answers
from loftq.evaluate.squad import f1 as squad_f1

Advance = Callable[[str, int], None]
GENERATED = ("gsm8k", "gsm8k_published", "exact_match", *ROUGE)
"""Metrics of the texts that a causal language model writes."""
SMALLER_IS_BETTER = ("perplexity", "loss")


def metrics_of(name: str) -> tuple[str, ...]:
    """The metrics that a task knows, its usual ones first."""
    chosen = task(name)
    if chosen.is_causal:
        more: tuple[str, ...] = ("loss", *(GENERATED if name != "causal" else ()))
    elif name in ("classification", "regression"):
        kind = "labels" if name == "classification" else "values"
        more = tuple(n for n, m in METRICS.items() if m.expects == kind)
    else:
        more = ("exact_match", "f1") if name == "qa" else tuple(ROUGE)
    return (*chosen.metrics, *(m for m in more if m not in chosen.metrics))


def check_metrics(name: str, metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics, if the task knows them all.

    Raises:
        ConfigError: it does not.
    """
    if not metrics:
        raise ConfigError(f"no metric is named, expected some of {', '.join(metrics_of(name))}")
    return tuple(one_of("metric", m, metrics_of(name)) for m in metrics)


def writes_texts(name: str, metrics: Sequence[str]) -> bool:
    """Whether some of the metrics of a task are of texts that the model writes."""
    return name == "summarization" or bool(set(metrics) & set(GENERATED))


def makes_predictions(name: str, metrics: Sequence[str]) -> bool:
    """Whether some of them are of predictions for a row, rather than of a text's likelihood."""
    return not task(name).is_causal or writes_texts(name, metrics)


def check_classes(metrics: Sequence[str], labels: Sequence[str] | None) -> None:
    """A :class:`ConfigError` for a metric of two classes where there are more, whatever a model predicts.

    Args:
        labels: the classes; ``None`` for another task, or where they are not known yet.
    """
    if "f1" in metrics and labels is not None and len(labels) > 2:
        raise ConfigError(
            f"the metric f1 is that of the second of two classes, but there are {len(labels)} ({', '.join(labels[:5])}"
            f"{', …' if len(labels) > 5 else ''}); use f1_macro"
        )


@dataclass(frozen=True)
class Measurement:
    """``metrics``: name -> value, with standard errors ``…_se`` where they are known; accuracy and the like in percent.

    ``rouge``: what ROUGE was taken with, see :func:`loftq.evaluate.rouge.conditions`; ``None`` where it was not taken.
    """

    metrics: dict[str, float | None]
    predictions: list[Prediction]
    examples: int = 0
    rouge: dict[str, Any] | None = None

    @property
    def known(self) -> dict[str, float]:
        """Without what is undefined, as the correlation of a constant is."""
        return {name: value for name, value in self.metrics.items() if value is not None}


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    metrics: Sequence[str],
    *,
    batch_size: int = 8,
    labels: Sequence[str] | None = None,
    max_new_tokens: int = 256,
    num_beams: int = 1,
    rouge_stem: bool = True,
    advance: Advance = lambda what, count: None,
) -> Measurement:
    """Measure a model.

    Args:
        model: of the task's class; set to eval mode for the duration.
        examples: of :func:`loftq.data.prepare.prepare`, not packed. metrics: of :func:`metrics_of`.
        batch_size: examples at once. labels: the classes in the order of their numbers.
        max_new_tokens, num_beams: of texts that a metric needs. rouge_stem: ROUGE compares Porter's stems of words.
        advance: called with what is done and how many examples of it.

    Raises:
        ConfigError: a metric that the task does not know. SourceError: a reference that a metric has no use for.
    """
    metrics = check_metrics(examples.task, metrics)
    if examples.task == "summarization":
        writing_ids(model, tokenizer)
    with eval_mode(model):
        collator = Collator(examples.task, padding_id(model, tokenizer))
        run = _Run(
            model,
            tokenizer,
            examples,
            metrics,
            collator,
            batch_size,
            labels,
            max_new_tokens,
            num_beams,
            rouge_stem,
            advance,
        )
        found = {
            "classification": run.labels_or_values,
            "regression": run.labels_or_values,
            "qa": run.answers,
            "summarization": run.summaries,
        }.get(examples.task, run.language)()
    rouge = conditions(rouge_stem) if set(found.metrics) & set(ROUGE) else None
    order = [m for name in metrics for m in (name, f"{name}_se") if m in found.metrics]
    rest = [m for m in found.metrics if m not in order]
    return Measurement({m: found.metrics[m] for m in (*order, *rest)}, found.predictions, examples.rows, rouge)


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    tokenizer: Any
    examples: Examples
    metrics: Sequence[str]
    collator: Collator
    batch_size: int
    names: Sequence[str] | None
    max_new_tokens: int
    num_beams: int
    rouge_stem: bool
    advance: Advance

    def batches(self) -> list[list[Example]]:
        """Examples of similar length together, the longest first."""
        ordered = sorted(self.examples, key=lambda e: -len(e.input_ids))
        return [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]

    def inputs(self, batch: list[Example]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        collated = self.collator(batch)
        drop = ("labels", "start_positions", "end_positions")
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collated.items() if k not in drop}

    @cached_property
    def half(self) -> torch.dtype | None:
        """The dtype of half-precision weights, if there are any."""
        found = {p.dtype for p in self.model.parameters()} & {torch.bfloat16, torch.float16}
        return next(iter(found), None)

    def output(self, batch: list[Example]) -> Any:
        """The model's; a float32 head on a half-precision body needs the autocast that it is trained under."""
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, dtype=self.half or torch.bfloat16, enabled=self.half is not None):
            return self.model(**self.inputs(batch))

    def labels_or_values(self) -> Measurement:
        outputs: dict[int, Any] = {}
        for batch in self.batches():
            logits = self.output(batch).logits.float().cpu()
            for example, row in zip(batch, logits, strict=True):
                outputs[id(example)] = int(row.argmax()) if self.examples.task == "classification" else float(row[0])
            self.advance("examples", len(batch))
        found = [outputs[id(e)] for e in self.examples]
        wanted = [e.labels for e in self.examples]
        names = self.names
        rows = [
            Prediction(
                e.where,
                e.about.get("input", ""),
                names[p] if names is not None else p,
                names[e.labels] if names is not None else e.labels,
                float(p == e.labels) if names is not None else None,
            )
            for e, p in zip(self.examples, found, strict=True)
        ]
        return Measurement(score_labels(self.metrics, found, wanted), rows)

    def answers(self) -> Measurement:
        width = max(len(e.input_ids) for e in self.examples)
        count = len(self.examples)
        starts, ends = np.full((count, width), -np.inf), np.full((count, width), -np.inf)
        offsets = np.full((count, width, 2), -1)
        rows = {id(e): i for i, e in enumerate(self.examples)}
        for batch in self.batches():
            output = self.output(batch)
            for j, e in enumerate(batch):
                n, i = len(e.input_ids), rows[id(e)]
                starts[i, :n] = output.start_logits[j, :n].float().cpu().numpy()
                ends[i, :n] = output.end_logits[j, :n].float().cpu().numpy()
                offsets[i, :n] = [(-1, -1) if o is None else o for o in e.about["offsets"]]
            self.advance("examples", len(batch))
        # one window of each question; by its row, since ids may be missing or occur twice
        questions = {e.about["number"]: e for e in self.examples}
        index = {number: i for i, number in enumerate(questions)}
        texts = best_spans(
            starts,
            ends,
            offsets,
            [index[e.about["number"]] for e in self.examples],
            [e.about["context"] for e in questions.values()],
        )
        gold = [e.about["answers"] for e in questions.values()]
        predictions = [
            Prediction(e.about["id"], e.about["question"], text, e.about["answers"], squad_f1(text, e.about["answers"]))
            for e, text in zip(questions.values(), texts, strict=True)
        ]
        return Measurement(dict(score_answers(texts, gold)), predictions)

    def summaries(self) -> Measurement:
        texts = self.generated([e.input_ids.tolist() for e in self.examples])
        rouge = pair_scores(texts, self.references, stem=self.rouge_stem)
        return Measurement(dict(mean_scores(rouge)), self.written(texts, [s / 100 for s in rouge["rougeL"]]))

    @property
    def references(self) -> list[str]:
        return [e.about["reference"] for e in self.examples]

    def generated(self, prompts: list[list[int]]) -> list[str]:
        return generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            num_beams=self.num_beams,
            chat=self.examples.task == "chat",
            advance=lambda what, count: self.advance("texts", count),
        )

    def written(self, texts: list[str], scores: list[float]) -> list[Prediction]:
        """Generated texts beside their references, each with its score from 0 to 1."""
        return [
            Prediction(e.where, _prompt_text(e.about["prompt"]), text, e.about["reference"], score)
            for e, text, score in zip(self.examples, texts, scores, strict=True)
        ]

    def language(self) -> Measurement:
        if set(self.metrics) & set(_EXTRACT):
            _check_numbers(self.examples)
        found: dict[str, float | None] = {}
        rows: list[Prediction] = []
        if set(self.metrics) & {"perplexity", "loss"}:
            found |= self.perplexity()
        generated = [m for m in self.metrics if m in GENERATED]
        if generated:
            texts, wanted = self.generated([_prompt_ids(e) for e in self.examples]), self.references
            scores: dict[str, list[float]] = {}
            if set(generated) & set(ROUGE):
                rouge = pair_scores(texts, wanted, stem=self.rouge_stem)
                means = mean_scores(rouge)
            for name in generated:
                if name in ROUGE:
                    found |= {m: means[m] for m in (name, f"{name}_se")}
                    scores[name] = [s / 100 for s in rouge[name]]
                elif name == "exact_match":
                    scores[name] = [float(t.strip() == w.strip()) for t, w in zip(texts, wanted, strict=True)]
                    share = float(np.mean(scores[name]))
                    found |= {name: 100 * share, f"{name}_se": 100 * share_error(share, len(scores[name]))}
                else:
                    extract = _EXTRACT[name]
                    scores[name] = [float(gsm8k.is_correct(t, w, extract)) for t, w in zip(texts, wanted, strict=True)]
                    whole = gsm8k.accuracy(texts, wanted, extract=extract)
                    found |= {name: whole["accuracy"], f"{name}_se": whole["accuracy_se"]}
            rows = self.written(texts, scores[generated[0]])
        return Measurement(found, rows)

    def perplexity(self) -> dict[str, float | None]:
        """exp of the mean loss over the predicted tokens of all examples, ± its standard error."""
        nll: list[Tensor] = []
        parts = None
        device = next(self.model.parameters()).device
        for batch in self.batches():
            collated = self.collator(batch)
            ids, wanted = collated["input_ids"].to(device), collated["labels"][:, 1:].to(device)
            parts = parts or parts_of(self.model, ids[0])
            # padding stands behind all that is scored, where a causal model cannot see it
            mask = wanted != IGNORED
            hidden, targets = parts.body(ids)[:, :-1][mask], wanted[mask]
            nll += [losses(parts.head.logits(hidden[c]), targets[c]) for c in chunks(targets.numel())]
            self.advance("examples", len(batch))
        mean, error = mean_and_error(torch.cat(nll))
        value, value_error = perplexity_of(mean, error)
        return {"perplexity": value, "perplexity_se": value_error, "loss": mean, "loss_se": error}


_EXTRACT = {"gsm8k": gsm8k.answer_number, "gsm8k_published": gsm8k.published_number}


def _check_numbers(examples: Examples) -> None:
    """A reference without a number is said by its place, before hours of writing answers."""
    for example in examples:
        try:
            gsm8k.reference_number(example.about["reference"])
        except SourceError as error:
            raise SourceError(f"{example.where}: {error}; repair or remove the row") from None


def _prompt_ids(example: Example) -> list[int]:
    """All that stands before the reference answer."""
    return example.input_ids[: example.about["prompt_tokens"]].tolist()


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
