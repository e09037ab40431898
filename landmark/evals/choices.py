"""Multiple-choice questions by likelihood: the answer whose continuation the model finds most likely."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..weights.files import read_json_lines
from .likelihood import LanguageModel


@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]  # continuations of the context, with their leading space
    answer: int


@dataclass(frozen=True)
class Choices:
    """Accuracy by the sum of log p, and by the sum per byte of the choice (Brown et al. 2020, sec. 2.4)."""

    accuracy: float
    accuracy_per_byte: float
    standard_error: float  # of the accuracy
    questions: int
    chance: float


def read_questions(path: str | Path) -> list[Question]:
    """JSONL with "context" (or "question"), "choices", "answer" (index or text). Raises ValueError naming the line."""
    questions = []
    for number, row in read_json_lines(Path(path)):
        try:
            choices = tuple(row["choices"])
            answer = row["answer"]
            if bad := [choice for choice in choices if not isinstance(choice, str) or not choice]:
                raise ValueError(f"the choice {bad[0]!r} is no text")
            index = answer if isinstance(answer, int) else choices.index(answer)
            if len(choices) < 2 or not 0 <= index < len(choices):
                raise ValueError(f"answer {answer!r} among {len(choices)} choices")
            context = row["context"] if "context" in row else row["question"]
            if not isinstance(context, str):
                raise ValueError(f"the context {context!r} is no text")
            questions.append(Question(context, choices, index))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; it needs context, choices (two or more), answer"
            ) from None
    if not questions:
        raise ValueError(f"{path} holds no questions; write one JSON object a line")
    return questions


def evaluate_choices(model: LanguageModel, questions: Sequence[Question], *, shots: int = 0, seed: int = 0) -> Choices:
    """`shots` solved questions, drawn from the others with a seed, stand before each one (Brown et al. 2020)."""
    if shots >= len(questions):
        raise ValueError(f"{shots} shots need more than {len(questions)} questions; give fewer shots")
    requests = []
    for i, question in enumerate(questions):
        drawn = random.Random(f"{seed} {i}").sample([q for j, q in enumerate(questions) if j != i], shots)
        solved = "".join(q.context + q.choices[q.answer] + "\n\n" for q in drawn)
        requests += [(solved + question.context, choice) for choice in question.choices]
    scores = iter(model.loglikelihood(requests))
    right = right_per_byte = 0
    for question in questions:
        logprobs = [next(scores).logprob for _ in question.choices]
        per_byte = [p / max(1, len(c.encode())) for p, c in zip(logprobs, question.choices, strict=True)]
        right += logprobs.index(max(logprobs)) == question.answer
        right_per_byte += per_byte.index(max(per_byte)) == question.answer
    n, chance = len(questions), sum(1 / len(q.choices) for q in questions) / len(questions)
    accuracy = right / n
    return Choices(accuracy, right_per_byte / n, (accuracy * (1 - accuracy) / n) ** 0.5, n, chance)
