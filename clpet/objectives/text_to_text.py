"""text_to_text: the model reads an instruction and writes the answer; encoder-decoder and decoder-only backbones.

A decoder reads [prompt; answer] with the prompt padded on the left, so that training, generation and ranking
see the same positions; an encoder-decoder reads the prompt, padded on the right, and writes the answer.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import Decode, Evaluation
from clpet.data.batches import IGNORED, Batch, EncodedDataset, Ragged, pad_id, position_ids
from clpet.data.benchmark import Benchmark, Example
from clpet.data.template import Template, Tokenised
from clpet.errors import ConfigError, DataError
from clpet.metrics.text_scores import METRICS, chosen, mistaken, that_tell_apart
from clpet.models.backbone import Architecture, Backbone
from clpet.objectives.base import Choices, Encode, Objective, Predictions


class TextToText(Objective):
    """The loss is the cross-entropy of the answer's tokens, its end included, mean over all of a batch's."""

    name = "text_to_text"
    generates = True

    def __init__(self, benchmark: Benchmark, backbone: Backbone, *rest: Any) -> None:
        self.causal = backbone.architecture is Architecture.decoder
        super().__init__(benchmark, backbone, *rest)
        self.end = end_token(self.tokenizer)
        config: Any = self.adapters.model.config
        self.start = None if self.causal else config.decoder_start_token_id
        answers = encode_answers(self.tokenizer, benchmark.labels, benchmark.max_target)
        self.label_tokens = Ragged(answers.rows)

    @classmethod
    def check_benchmark(cls, benchmark: Benchmark, evaluation: Evaluation) -> None:
        for task in benchmark.tasks:
            if evaluation.decode is Decode.rank and not task.labels:
                raise ConfigError(
                    f"evaluation.decode=rank chooses among the labels of a task, and task {task.name} has none, only"
                    " answers in free words: take evaluation.decode=generate, or other benchmark.tasks"
                )
            mistake = mistaken(task.metric, task.labels) if evaluation.decode is Decode.generate else ""
            if mistake:
                better = [f"benchmark.metric={metric}" for metric in that_tell_apart(task.labels)]
                raise ConfigError(
                    f"task {task.name}: {mistake} under benchmark.metric={task.metric}: take "
                    f"{' or '.join([*better, 'evaluation.decode=rank'])}"
                )

    @classmethod
    def check(cls, backbone: Backbone, peft: str, evaluation: Evaluation) -> None:
        """peft puts its virtual tokens in anew at every pass, and drops the positions of padded prompts."""
        if backbone.architecture is Architecture.encoder:
            raise ConfigError(
                f"model {backbone.name} is an encoder and cannot write an answer: take a decoder or encoder-decoder"
                " (or say model.architecture=decoder, if it is one)"
            )
        if peft not in ("prompt", "prefix"):
            return
        if evaluation.decode is Decode.rank:
            raise ConfigError(f"evaluation.decode=rank does not go with peft={peft}: take decode=generate or peft=lora")
        if backbone.architecture is Architecture.decoder and peft == "prompt":
            raise ConfigError(
                "peft=prompt does not go with a decoder that writes answers: take peft=prefix or method=l2p"
            )

    def longest_wanted(self) -> int:
        answer = max(self.benchmark.max_target, self.evaluation.max_new_tokens or 0)
        return self.benchmark.max_length + (answer if self.causal else 0)

    @classmethod
    def encoder(cls, benchmark: Benchmark, backbone: Backbone, tokenizer: Any) -> Encode:
        causal = backbone.architecture is Architecture.decoder
        check_cut_labels(tokenizer, benchmark)
        template = Template(
            tokenizer, benchmark.template, benchmark.max_length, end=not causal, truncate=benchmark.truncate
        )

        def encode(examples: list[Example], labels: list[int], tasks: list[int]) -> EncodedDataset:
            answers = encode_answers(tokenizer, [str(example.target) for example in examples], benchmark.max_target)
            references = [example.references or (str(example.target),) for example in examples]
            sources = [example.text for example in examples]
            texts = template.encode(examples)
            return EncodedDataset(
                texts.rows, labels, tasks, pad_id(tokenizer), answers=answers.rows, references=references,
                sources=sources, left=causal, full_lengths=texts.lengths, full_answer_lengths=answers.lengths,
            )  # fmt: skip

        return encode

    # Learning

    def logits(self, batch: Batch) -> Tensor:
        """[answer tokens of the batch, vocabulary] fp32; the output layer does not see the prompt."""
        self.meter.count(batch, torch.is_grad_enabled())
        assert batch.targets is not None
        with self.autocast:
            return self.answer_logits(batch, batch.targets)[batch.targets != IGNORED].float()

    def targets(self, batch: Batch) -> Tensor:
        """[answer tokens of the batch]: their ids."""
        assert batch.targets is not None
        return batch.targets[batch.targets != IGNORED]

    def answer_logits(self, batch: Batch, targets: Tensor) -> Tensor:
        """[batch, answer length, vocabulary]: scores of each token of `targets`, given the prompt and those before."""
        model: Any = self.adapters.model
        written, read = targets.clamp(min=0), self.inputs(batch)
        if not self.causal:
            before = torch.cat([written.new_full((len(written), 1), self.start or 0), written[:, :-1]], 1)
            return model(decoder_input_ids=before, use_cache=False, **read).logits
        places = self.continued(read, written[:, :-1], targets[:, :-1] != IGNORED)
        return model(logits_to_keep=targets.shape[1], use_cache=False, **places).logits

    def continued(self, read: dict[str, Any], answer: Tensor, inside: Tensor) -> dict[str, Tensor]:
        """A decoder's inputs with the tokens of an answer behind them."""
        mask = torch.cat([read["attention_mask"], inside.long()], 1)
        places = {"attention_mask": mask, "position_ids": position_ids(mask)}
        if "input_ids" in read:
            return {"input_ids": torch.cat([read["input_ids"], answer], 1), **places}
        text = self.adapters.model.get_input_embeddings()(answer)  # type: ignore[operator]
        return {"inputs_embeds": torch.cat([read["inputs_embeds"], text.to(read["inputs_embeds"].dtype)], 1), **places}

    def masks(self, batch: Batch) -> list[Tensor]:
        """A decoder reads one text, prompt and answer; an encoder-decoder two."""
        assert batch.targets is not None
        written = (batch.targets != IGNORED).long()
        if self.causal:
            return [torch.cat([batch.attention_mask, written[:, 1:]], 1)]  # the end token predicts nothing
        return [batch.attention_mask, written]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The mask is always there: it also gives the positions of what follows."""
        read: dict[str, Any] = super().inputs(batch)
        if read["attention_mask"] is None:
            width = read.get("inputs_embeds", batch.input_ids).shape[1]
            read["attention_mask"] = batch.attention_mask.new_ones(len(batch), width)
        return read

    # Answering

    def predict(self, batch: Batch, choices: Choices) -> Predictions:
        """Greedy answers; with evaluation.decode=rank the likeliest label of each example's task.

        An instruction names the labels to choose from, so a task's own labels are its candidates.
        """
        self.meter.count(batch, torch.is_grad_enabled())
        if self.evaluation.decode is Decode.generate:
            return Predictions(texts=self.generate(batch))
        labels = self.benchmark.task_labels(int(batch.tasks[0]))
        best = self.rank(batch, labels).argmax(1).tolist()
        return Predictions(texts=[self.benchmark.labels[labels[choice]] for choice in best])

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Batches of one task each: a task has its own labels to choose from."""
        tasks = [rows[pool.tasks[rows] == task] for task in np.unique(pool.tasks[rows])]
        return [part for own in tasks for part in pool.by_length(own, self.batch_size(int(pool.tasks[own[0]])))]

    def batch_size(self, task: int) -> int:
        """Prompts in a batch; where labels are ranked each stands for as many rows."""
        labels = len(self.benchmark.tasks[task].labels) if self.evaluation.decode is Decode.rank else 1
        return max(1, self.eval_batch_size // max(1, labels))

    def generate(self, batch: Batch) -> list[str]:
        """Greedy decoding with a key-value cache, up to the end token."""
        from transformers import GenerationConfig

        most = self.evaluation.max_new_tokens or self.benchmark.max_target
        settings = GenerationConfig(
            max_new_tokens=most, do_sample=False, num_beams=1, eos_token_id=self.end,
            pad_token_id=pad_id(self.tokenizer), decoder_start_token_id=self.start,
            repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,  # whatever the model's own settings say
        )  # fmt: skip
        model: Any = self.adapters.model
        with self.autocast:
            read = self.inputs(batch)
            found = model.generate(generation_config=settings, **read)
        skip = read["input_ids"].shape[1] if "input_ids" in read else 0  # embeddings are not given back
        new = found[:, skip:] if self.causal else found[:, 1:]
        return [text.strip() for text in self.tokenizer.batch_decode(until(new, self.end), skip_special_tokens=True)]

    def rank(self, batch: Batch, labels: list[int]) -> Tensor:
        """[batch, labels] log-likelihood of each label and its end: one pass over the prompts, one over the labels."""
        count, device = len(labels), batch.input_ids.device
        ids, inside = self.label_tokens.padded(np.asarray(labels), 0)
        answers = torch.from_numpy(ids).to(device).repeat(len(batch), 1)  # [batch * labels, length]
        places = torch.from_numpy(inside).to(device).repeat(len(batch), 1)
        with self.autocast:
            logits = (self._rank_causal if self.causal else self._rank_pair)(batch, answers, places, count)
        logits = logits.float()
        scores = logits.gather(2, answers[..., None]).squeeze(2) - logits.logsumexp(-1)
        return (scores * places).sum(1).view(len(batch), count)

    def _rank_causal(self, batch: Batch, answers: Tensor, places: Tensor, count: int) -> Tensor:
        model: Any = self.adapters.model
        read = self.inputs(batch)
        mask = read["attention_mask"]
        prompt = model(position_ids=position_ids(mask), use_cache=True, logits_to_keep=1, **read)
        first = prompt.logits.repeat_interleave(count, 0)
        if answers.shape[1] == 1:
            return first
        prompt.past_key_values.batch_repeat_interleave(count)
        mask = torch.cat([mask.repeat_interleave(count, 0), places[:, :-1].long()], 1)
        rest = model(
            input_ids=answers[:, :-1],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -answers.shape[1] + 1 :],
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        return torch.cat([first, rest.logits], 1)

    def _rank_pair(self, batch: Batch, answers: Tensor, places: Tensor, count: int) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        model: Any = self.adapters.model
        read = self.inputs(batch)
        encoded = model.get_encoder()(**read).last_hidden_state
        states = BaseModelOutput(last_hidden_state=encoded.repeat_interleave(count, 0))
        before = torch.cat([answers.new_full((len(answers), 1), self.start or 0), answers[:, :-1]], 1)
        mask = read["attention_mask"].repeat_interleave(count, 0)
        return model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits

    # Judging

    def judge(self, batch: Batch, found: Predictions, choices: Choices) -> Tensor:
        """[batch]: the task's metric; a label that was chosen is right where it is a reference, and not else."""
        assert found.texts is not None
        metrics = [METRICS[self.benchmark.tasks[task].metric] for task in batch.tasks.tolist()]
        if self.evaluation.decode is Decode.rank:
            metrics = [chosen] * len(batch)
        rows = zip(metrics, found.texts, batch.references, batch.sources, strict=True)
        scores = [metric(text, references, source) for metric, text, references, source in rows]
        return torch.tensor(scores, dtype=torch.float64, device=batch.labels.device)

    def table(self, batch: Batch, found: Predictions, known: Predictions, choices: Choices) -> dict[str, Any]:
        """One view: an instruction says what is asked, there is no competition of labels between tasks."""
        scores, own = self.judge(batch, found, choices), None
        if known is not found:
            own = self.judge(batch, known, choices)
        return {
            "label": np.array([references[0] for references in batch.references], dtype=object),
            "prediction": np.array(found.texts, dtype=object),
            "score": scores,
            "own_score": scores if own is None else own,
        }

    def describe(self, pool: EncodedDataset, row: int) -> str:
        assert pool.answer is not None
        return f"answer   {self.tokenizer.decode(pool.answer[row])}"


def end_token(tokenizer: Any) -> int:
    """Id of the token that ends an answer. Raises DataError for a tokenizer without one."""
    found = next((id for id in (tokenizer.eos_token_id, tokenizer.sep_token_id) if id is not None), None)
    if found is None:
        raise DataError("the tokenizer has no end token, so a text_to_text answer could not end")
    return found


def encode_answers(tokenizer: Any, texts: list[str], most: int) -> Tokenised:
    """Answers, each with the end token, of at most `most` tokens.

    A byte-level vocabulary writes the space that separates answer and prompt into the answer's first token.
    """
    if not texts:
        return Tokenised([], [])
    spaced = len(tokenizer(" a", add_special_tokens=False)["input_ids"]) == 1
    lead = " " if spaced and len(tokenizer("a", add_special_tokens=False)["input_ids"]) == 1 else ""
    found = tokenizer([lead + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    end = end_token(tokenizer)
    return Tokenised([[*ids[: most - 1], end] for ids in found], [len(ids) + 1 for ids in found])


def check_cut_labels(tokenizer: Any, benchmark: Benchmark) -> None:
    """Raises DataError where two labels of a task become the same tokens."""
    for task in benchmark.tasks:
        whole = encode_answers(tokenizer, list(task.labels), sys.maxsize).rows
        seen: dict[tuple[int, ...], int] = {}
        for place, ids in enumerate(whole):
            first = seen.setdefault((*ids[:-1][: benchmark.max_target - 1],), place)
            if first == place:
                continue
            names = f"task {task.name}: the labels {task.labels[first]!r} and {task.labels[place]!r} are"
            if ids == whole[first]:
                raise DataError(f"{names} the same tokens to this model's tokenizer: give one of them another name")
            raise DataError(
                f"{names} the same in the first benchmark.max_target={benchmark.max_target} tokens, the end included: "
                f"the longest label of the task needs benchmark.max_target={max(map(len, whole))}"
            )


def until(ids: Tensor, end: int) -> list[list[int]]:
    """Each row up to its first `end`."""
    return [row[: row.index(end)] if end in row else row for row in ids.tolist()]
