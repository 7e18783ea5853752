"""The tasks a model can be trained for: which columns a row needs, and which class of model answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loftq.config import one_of


@dataclass(frozen=True)
class Task:
    """One kind of training data.

    Attributes:
        name: as ``--task`` spells it.
        roles: what a row must provide. optional: what it may provide. instead: what will do in place of ``roles``.
        model: the ``AutoModelFor…`` class of transformers.
        metrics: what is measured where no metric is named.
        may_be_empty: texts that a row may leave empty. Of a pair, either may be, as in QQP.
        columns: role -> column names that are taken for it where no ``--map`` says otherwise, best first.
        together: role -> column of a pair of columns that is taken before any other name, where a row has both.
    """

    name: str
    roles: tuple[str, ...]
    model: str
    metrics: tuple[str, ...]
    optional: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    may_be_empty: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    together: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return self.model == "AutoModelForCausalLM"

    def candidates(self, role: str) -> tuple[str, ...]:
        """Column names that may stand for a role, best first."""
        if role in self.together and role in self.optional:
            return ()  # it means nothing without its partner
        return (role, *(name for name in self.columns.get(role, ()) if name != role))


_FIRST = ("sentence1", "question1", "premise", "question", "sentence")
_PAIR = {"prompt": ("input", "question", "instruction"), "completion": ("output", "answer", "response")}
_ALPACA = {"prompt": "instruction", "input": "input"}  # the input belongs to the instruction and is often empty
_SECOND = ("sentence2", "question2", "hypothesis", "sentence")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "causal",
            ("text",),
            "AutoModelForCausalLM",
            ("perplexity",),
            may_be_empty=("text",),
            columns={"text": ("content", "document")},
        ),
        Task(
            "completion",
            ("prompt", "completion"),
            "AutoModelForCausalLM",
            ("perplexity",),
            optional=("input",),
            may_be_empty=("input",),
            columns=_PAIR,
            together=_ALPACA,
        ),
        Task(
            "chat",
            ("messages",),
            "AutoModelForCausalLM",
            ("perplexity",),
            instead=("prompt", "completion"),
            optional=("input",),
            may_be_empty=("input",),
            columns={"messages": ("conversation", "conversations"), **_PAIR},
            together=_ALPACA,
        ),
        Task(
            "classification",
            ("text", "label"),
            "AutoModelForSequenceClassification",
            ("accuracy",),
            optional=("text_pair",),
            columns={"text": _FIRST, "text_pair": _SECOND},
        ),
        Task(
            "regression",
            ("text", "label"),
            "AutoModelForSequenceClassification",
            ("pearson", "spearman"),
            optional=("text_pair",),
            columns={"text": _FIRST, "text_pair": _SECOND, "label": ("score",)},
        ),
        Task(
            "qa",
            ("context", "question", "answers"),
            "AutoModelForQuestionAnswering",
            ("exact_match", "f1"),
            optional=("id",),
        ),
        Task(
            "summarization",
            ("text", "summary"),
            "AutoModelForSeq2SeqLM",
            ("rouge1", "rouge2", "rougeL"),
            columns={"text": ("document", "article", "dialogue"), "summary": ("highlights", "target")},
        ),
    )
}
"""Name -> task."""


def task(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigError: there is none.
    """
    return TASKS[one_of("task", name, TASKS)]
