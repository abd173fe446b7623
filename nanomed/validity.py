"""Ends a run whose answers are mostly invalid, before the rest is paid for."""

import sys
from dataclasses import dataclass

from nanomed import InputError
from nanomed.answer_cache import Answer
from nanomed.thoughts import without_thoughts

N_FIRST = 100  # answers after which a run ends if most of them are invalid
N_FEW = 10  # answers that suffice to end a run at its end if all of them are invalid


@dataclass
class Validity:
    """Counts a run's invalid answers, and ends the run if most are invalid."""

    expected: str  # the answer that was expected, for the line that ends the run
    max_tokens: str  # the option that limits an answer
    n_answers: int = 0
    n_invalid: int = 0
    n_thoughts: int = 0  # invalid answers that hold thoughts and nothing else
    example: str = ""
    n_failures: int = 0  # requests without an answer
    failure: str = ""  # the first one's reason

    def add(self, answer: Answer, is_valid: bool) -> None:
        """Count one answer. InputError if it is number N_FIRST and more than half of them are invalid."""
        self.n_answers += 1
        if answer.is_failure:
            self.n_failures += 1
            self.failure = self.failure or answer.finish_reason
        if not is_valid:
            self.n_invalid += 1
            self.n_thoughts += not without_thoughts(answer.text) and bool(answer.text or answer.thoughts)
            self.example = self.example or answer.text or answer.thoughts or answer.finish_reason
        if self.n_answers == N_FIRST and self.n_invalid > N_FIRST / 2:
            raise InputError(self.line())

    def end(self) -> None:
        """InputError if all answers of the run are invalid, a warning on stderr if most are."""
        self.report_failures()
        if self.n_invalid == self.n_answers >= N_FEW:
            raise InputError(self.line())
        if self.n_invalid > self.n_answers / 2 and self.n_answers > 1:
            print(f"warning: {self.line()}", file=sys.stderr)

    def report_failures(self) -> None:
        """Print how many requests got no answer, if any."""
        if self.n_failures:
            print(
                f"warning: {self.n_failures} of {self.n_answers} requests got no answer, the first: {self.failure}", file=sys.stderr
            )

    def line(self) -> str:
        """What is wrong and what to do."""
        example = " ".join(self.example.split())
        example = example[:120] + " ..." if len(example) > 120 else example
        if self.n_thoughts:
            remedy = f'the model thinks first: raise {self.max_tokens}, or switch thinking off with --body, for many servers \
{{"chat_template_kwargs": {{"enable_thinking": false}}}}'
        else:
            remedy = f"use another model or prompt, or a larger {self.max_tokens}"
        which = f"first {self.n_answers}" if self.n_answers == N_FIRST else f"{self.n_answers}"
        return f"{self.n_invalid} of the {which} answers are not {self.expected}, for example {example!r}; {remedy}"
