"""What data, methods, memories and records must know of an objective; they ask for this and never for its name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """The capabilities of an objective."""

    has_labels: bool = False  # predicts one of the benchmark's labels, with a head that has a row per label
    plain_text: bool = False  # reads plain text, which has neither labels nor answers
    generates_text: bool = False  # writes answers, which benchmark.metric scores
    lower_is_better: bool = False  # of its scores
    needs_output_layer: bool = False  # uses the backbone's output layer over the vocabulary
    frozen_backbone: bool = False  # needs the pretrained network as it was, so only adapters may be trained
    packs: bool = False  # examples of a decoder can share a row without padding (hardware.padding_free)
    has_logits: bool = True  # its loss is the cross-entropy of `Objective.logits` and `Objective.targets`

    @property
    def in_words(self) -> bool:
        """Whether examples are prompts with answers in words, which the model could also write."""
        return not (self.has_labels or self.plain_text)


LABELS = Traits(has_labels=True)
ANSWERS = Traits(packs=True, generates_text=True, needs_output_layer=True)
PLAIN_TEXT = Traits(plain_text=True, lower_is_better=True, needs_output_layer=True)
