"""An objective of a user: answers are written from their last letter to their first."""

import dataclasses
from dataclasses import dataclass

from clpet.objectives.text_to_text import TextToText


@dataclass
class ReversedAnswers(TextToText):
    """Text to text with reversed targets; the first `keep` letters stay where they are."""

    keep: int = 0

    def encoder(self, benchmark, backbone, tokenizer):
        encode = super().encoder(benchmark, backbone, tokenizer)

        def reversed_answer(example):
            target = example.target[: self.keep] + example.target[self.keep :][::-1]
            return dataclasses.replace(example, target=target)

        return lambda examples, *rest: encode([reversed_answer(example) for example in examples], *rest)
