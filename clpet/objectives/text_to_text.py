"""text_to_text: the model reads an instruction and generates the answer; encoder-decoder and decoder-only backbones.

The input of a decoder is [prompt; answer] with the prompt padded on the left, so that training, generation and ranking
use the same positions. An encoder-decoder encodes the prompt, padded on the right, and decodes the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import Decode, EvaluationOptions
from clpet.data.batches import IGNORED, AnswerBatch, Batch, ChatBatch, EncodedDataset, Ragged, pad_id, position_ids
from clpet.data.benchmark import Benchmark, Example
from clpet.data.chat_encoding import ChatEncoder
from clpet.data.template import Template
from clpet.data.traits import ANSWERS, Traits
from clpet.errors import ConfigError
from clpet.metrics.text_scores import METRICS, chosen, mistaken, that_tell_apart
from clpet.models.backbone import Architecture, Backbone
from clpet.models.flops import Pass
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import Tokenizer, config_of, network_of
from clpet.objectives.answer_encoding import (
    chat_encoder,
    check_cut_labels,
    encode_answers,
    end_token,
    generation_ends,
    until,
)
from clpet.objectives.base import AnswerSpace, Columns, Encode, Objective, Predictions
from clpet.objectives.document_attention import check_separation, check_window
from clpet.objectives.generation import continuous_answers, greedy, padded_answers, without_padding
from clpet.objectives.output_layer import selecting
from clpet.objectives.padding_free import packed_logits, packed_work
from clpet.runtime.hardware import Generation
from clpet.runtime.sharding.network import gathered


@dataclass
class TextToText(Objective):
    """The loss is the cross-entropy of the answer tokens and the end token, mean over all tokens of a batch."""

    traits: ClassVar[Traits] = ANSWERS
    evaluation_options: ClassVar[tuple[str, ...]] = ("decode", "max_new_tokens", "keep_text")

    def finish_setup(self) -> None:
        chat = chat_encoder(self.benchmark, self.backbone, self.tokenizer)
        self.ends = chat.template.ends if chat else [end_token(self.tokenizer)]
        if chat:
            further = [] if self.backbone.random_weights else generation_ends(self.adapters.model)
            self.ends = list(dict.fromkeys([*self.ends, *further]))
            self.tokenizer.chat_template = chat.template.text  # of an exported model
        self.start = None if self.causal else config_of(self.adapters.model).decoder_start_token_id
        encode = chat.answers if chat else partial(encode_answers, self.tokenizer)
        if self.padding_free:
            model, longest = self.adapters.model, self.benchmark.max_length + self.benchmark.max_target
            check_window(model, self.backbone.name, "hardware.padding_free", longest)
            with self.autocast:
                check_separation(model, self.backbone.name, self.dtype)
        self.label_tokens = Ragged(encode(self.benchmark.labels, self.benchmark.max_target).rows)

    def check_benchmark(self, benchmark: Benchmark, evaluation: EvaluationOptions) -> None:
        for task in benchmark.tasks:
            if evaluation.decode is Decode.rank and not task.labels:
                raise ConfigError(
                    f"evaluation.decode=rank chooses among the labels of a task, but task {task.name} has free-text"
                    " answers: set evaluation.decode=generate, or choose other benchmark.tasks"
                )
            problem = mistaken(task.metric, task.labels) if evaluation.decode is Decode.generate else ""
            if problem:
                better = [f"benchmark.metric={metric}" for metric in that_tell_apart(task.labels)]
                raise ConfigError(
                    f"task {task.name}: {problem} under benchmark.metric={task.metric}: set "
                    f"{' or '.join([*better, 'evaluation.decode=rank'])}"
                )

    def check(self, backbone: Backbone, peft: FullFineTuning, evaluation: EvaluationOptions) -> None:
        """Also rejects prompt and prefix tuning where peft inserts its virtual tokens or positions wrongly.

        peft inserts the virtual tokens in every pass, also while ranking, and ignores position ids of padded prompts.
        """
        super().check(backbone, peft, evaluation)
        if backbone.architecture is Architecture.encoder:
            raise ConfigError(
                f"model {backbone.name} is an encoder and cannot write an answer: use a decoder or encoder-decoder"
                " (or set model.architecture=decoder if it is one)"
            )
        if not (peft.traits.prepends or peft.traits.prefixes):
            return
        if evaluation.decode is Decode.rank:
            raise ConfigError(
                f"evaluation.decode=rank does not support peft={peft.name}: set evaluation.decode=generate or peft=lora"
            )
        if backbone.architecture is Architecture.decoder and peft.traits.prepends:
            raise ConfigError(
                f"peft={peft.name} does not support a decoder that writes answers: set peft=prefix or method=l2p"
            )

    def max_input_length(self, benchmark: Benchmark) -> int:
        answer = max(benchmark.max_target, self.evaluation.max_new_tokens or 0)
        return benchmark.max_length + (answer if self.causal else 0)

    def encoder(self, benchmark: Benchmark, backbone: Backbone, tokenizer: Tokenizer) -> Encode:
        causal = backbone.architecture is Architecture.decoder
        if chat := chat_encoder(benchmark, backbone, tokenizer):
            return self._chat_encode(chat, benchmark, tokenizer)
        check_cut_labels(partial(encode_answers, tokenizer), benchmark)
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

    def _chat_encode(self, chat: ChatEncoder, benchmark: Benchmark, tokenizer: Tokenizer) -> Encode:
        check_cut_labels(chat.answers, benchmark)

        def encode(examples: list[Example], labels: list[int], tasks: list[int]) -> EncodedDataset:
            prompts, answers, trained, references = chat.encode(examples)
            sources = [example.text for example in examples]
            return EncodedDataset(
                prompts.rows, labels, tasks, pad_id(tokenizer), answers=answers.rows, references=references,
                sources=sources, left=True, full_lengths=prompts.lengths, full_answer_lengths=answers.lengths,
                trained=trained,
            )  # fmt: skip

        return encode

    # Training

    def logits(self, batch: Batch) -> Tensor:
        """[answer tokens of the batch, vocabulary] fp32; the output layer is not applied to the prompt."""
        assert isinstance(batch, AnswerBatch)
        with self.autocast:
            if self.padding_free and batch.pool is not None:
                logits = packed_logits(self.adapters.model, batch.pool, batch.rows, self.dtype)
            elif isinstance(batch, ChatBatch):
                logits = self.conversation_logits(batch)
            else:
                logits = self.answer_logits(batch, batch.targets).flatten(0, 1)[batch.target_indices()].float()
        self.count(batch)
        return logits

    def conversation_logits(self, batch: ChatBatch) -> Tensor:
        """The same for all answers in a conversation, each example's in their order.

        A hook selects the positions in front of the output layer: logits of a whole prompt would need much memory.
        """
        targets, model = batch.next_tokens(), network_of(self.adapters.model)
        columns = torch.nonzero((targets != IGNORED).any(0)).flatten()
        trained = targets[:, columns] != IGNORED
        answer, mask = batch.targets.clamp(min=0), batch.targets != IGNORED
        inputs = self.append_answer(self.inputs(batch), answer[:, :-1], mask[:, :-1])
        vectors = inputs["attention_mask"].shape[1] - targets.shape[1]  # a method's prompt in front of the text
        with selecting(model, lambda hidden: hidden[trained]):
            return model(logits_to_keep=columns + vectors, use_cache=False, **inputs).logits.float()

    def targets(self, batch: Batch) -> Tensor:
        """[answer tokens of the batch]: their ids."""
        assert isinstance(batch, AnswerBatch)
        if isinstance(batch, ChatBatch):
            return batch.next_tokens()[batch.next_tokens() != IGNORED]
        return batch.targets.flatten()[batch.target_indices()]

    def answer_logits(self, batch: Batch, targets: Tensor) -> Tensor:
        """[batch, answer length, vocabulary]: scores for `targets`, each given the prompt and the answer before it."""
        model = network_of(self.adapters.model)
        answer, inputs = targets.clamp(min=0), self.inputs(batch)
        if not self.causal:
            shifted = torch.cat([answer.new_full((len(answer), 1), self.start or 0), answer[:, :-1]], 1)
            return model(decoder_input_ids=shifted, use_cache=False, **inputs).logits
        # The last token is not an input: it has nothing to predict.
        inputs = self.append_answer(inputs, answer[:, :-1], targets[:, :-1] != IGNORED)
        return model(logits_to_keep=targets.shape[1], use_cache=False, **inputs).logits

    def append_answer(self, inputs: Mapping[str, Tensor], answer: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The inputs of a decoder, followed by the tokens of an answer and their mask."""
        mask = torch.cat([inputs["attention_mask"], mask.long()], 1)
        positions = {"attention_mask": mask, "position_ids": position_ids(mask)}
        if "input_ids" in inputs:
            return {"input_ids": torch.cat([inputs["input_ids"], answer], 1), **positions}
        prompt = inputs["inputs_embeds"]
        text = network_of(self.adapters.model).get_input_embeddings()(answer)
        return {"inputs_embeds": torch.cat([prompt, text.to(prompt.dtype)], 1), **positions}

    def work(self, batch: Batch) -> Pass:
        """A decoder reads prompt and answer, without its end; an encoder-decoder reads the answer in its decoder."""
        assert isinstance(batch, AnswerBatch)
        if self.padding_free and batch.pool is not None:
            return packed_work(self.adapters.model, batch.pool, batch.rows)
        source, answer = batch.input_ids.shape[1], batch.targets.shape[1]
        outputs = len(batch) * answer
        if isinstance(batch, ChatBatch):
            outputs = int((batch.next_tokens() != IGNORED).sum())
        return Pass(len(batch), source + answer - 1 if self.causal else source, 0 if self.causal else answer, outputs)

    def masks(self, batch: Batch) -> list[Tensor]:
        """A decoder reads one text, prompt and answer; an encoder-decoder two texts."""
        assert isinstance(batch, AnswerBatch)
        answer_mask = (batch.targets != IGNORED).long()
        if self.causal:
            return [torch.cat([batch.attention_mask, answer_mask[:, 1:]], 1)]  # the end token is not an input
        return [batch.attention_mask, answer_mask]

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Always with a mask, since it also determines the positions of the answer."""
        inputs = {name: values for name, values in super().inputs(batch).items() if values is not None}
        if "attention_mask" not in inputs:
            width = inputs.get("inputs_embeds", batch.input_ids).shape[1]
            inputs["attention_mask"] = batch.attention_mask.new_ones(len(batch), width)
        return inputs

    # Prediction

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Greedy answers; with evaluation.decode=rank the most likely label of each example's task.

        Only the labels of the task are candidates, because the instruction of an example lists them.
        """
        with gathered(self.adapters.model):  # the encoder is called by itself
            if self.evaluation.decode is Decode.generate:
                texts = self.generate(batch)
            else:
                labels = self.benchmark.task_labels(int(batch.tasks[0]))
                best = self.rank(batch, labels).argmax(1).tolist()
                texts = [self.benchmark.labels[labels[choice]] for choice in best]
        self.count(batch)
        return Predictions(texts=texts)

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Batches with examples of one task each, because the candidate labels depend on the task."""
        tasks = [rows[pool.tasks[rows] == task] for task in np.unique(pool.tasks[rows])]
        sizes = [self.batch_size(int(pool.tasks[rows[0]])) for rows in tasks]
        return [batch for rows, size in zip(tasks, sizes, strict=True) for batch in pool.by_length(rows, size)]

    def batch_size(self, task: int) -> int:
        """Number of prompts in a batch; for ranking, each prompt is repeated for every label."""
        labels = len(self.benchmark.tasks[task].labels) if self.evaluation.decode is Decode.rank else 1
        return max(1, self.eval_batch_size // max(1, labels))

    def generate(self, batch: Batch) -> list[str]:
        """Greedy decoding with a key-value cache, up to an end token."""
        new_tokens = self.evaluation.max_new_tokens or self.benchmark.max_target
        settings = greedy(new_tokens, self.ends, pad_id(self.tokenizer), self.start)
        if self.generation is Generation.continuous:
            answers = continuous_answers(self.adapters.model, without_padding(batch), settings)
        else:
            with self.autocast:
                network, inputs = network_of(self.adapters.model), self.inputs(batch)
                answers = padded_answers(network, inputs, settings, self.causal)
        texts = self.tokenizer.batch_decode(until(answers, self.ends), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def rank(self, batch: Batch, labels: list[int]) -> Tensor:
        """[batch, labels]: log-likelihood of each label and its end token; one pass over the prompts."""
        count, device = len(labels), batch.input_ids.device
        ids, label_mask = self.label_tokens.padded(np.asarray(labels), 0)
        answers = torch.from_numpy(ids).to(device).repeat(len(batch), 1)  # [batch * labels, length]
        mask = torch.from_numpy(label_mask).to(device).repeat(len(batch), 1)
        with self.autocast:
            logits = (self._rank_causal if self.causal else self._rank_pair)(batch, answers, mask, count)
        logits = logits.float()
        scores = logits.gather(2, answers[..., None]).squeeze(2) - logits.logsumexp(-1)
        return (scores * mask).sum(1).view(len(batch), count)

    def _rank_causal(self, batch: Batch, answers: Tensor, answer_mask: Tensor, count: int) -> Tensor:
        """[batch * labels, length, vocabulary]: logits of a decoder, with the prompts' key-value cache repeated."""
        model = network_of(self.adapters.model)
        inputs = self.inputs(batch)
        mask = inputs["attention_mask"]
        prompt = model(position_ids=position_ids(mask), use_cache=True, logits_to_keep=1, **inputs)
        first_token = prompt.logits.repeat_interleave(count, 0)
        if answers.shape[1] == 1:
            return first_token
        prompt.past_key_values.batch_repeat_interleave(count)
        mask = torch.cat([mask.repeat_interleave(count, 0), answer_mask[:, :-1].long()], 1)
        rest = model(
            input_ids=answers[:, :-1],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -answers.shape[1] + 1 :],
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        return torch.cat([first_token, rest.logits], 1)

    def _rank_pair(self, batch: Batch, answers: Tensor, answer_mask: Tensor, count: int) -> Tensor:
        """[batch * labels, length, vocabulary]: logits of an encoder-decoder, with the encoded prompts repeated."""
        from transformers.modeling_outputs import BaseModelOutput

        model = network_of(self.adapters.model)
        inputs = self.inputs(batch)
        encoded = model.get_encoder()(**inputs).last_hidden_state
        states = BaseModelOutput(last_hidden_state=encoded.repeat_interleave(count, 0))
        shifted = torch.cat([answers.new_full((len(answers), 1), self.start or 0), answers[:, :-1]], 1)
        mask = inputs["attention_mask"].repeat_interleave(count, 0)
        return model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits

    # Scores

    def score(
        self, batch: Batch, predictions: Predictions, choices: AnswerSpace, task_aware: Predictions | None = None
    ) -> Columns:
        """Both views are equal unless the method uses task ids: labels of different tasks do not compete."""
        scores = self.text_scores(batch, predictions)
        task_aware = task_aware or predictions
        return {
            "label": np.array([references[0] for references in batch.references], dtype=object),
            "prediction": np.array(predictions.texts, dtype=object),
            "score": scores,
            "own_score": scores if task_aware is predictions else self.text_scores(batch, task_aware),
        }

    def text_scores(self, batch: Batch, predictions: Predictions) -> Tensor:
        """[batch]: the task's metric; with evaluation.decode=rank 1 if the chosen label is a reference, else 0."""
        assert predictions.texts is not None
        metrics = [METRICS[self.benchmark.tasks[task].metric] for task in batch.tasks.tolist()]
        if self.evaluation.decode is Decode.rank:
            metrics = [chosen] * len(batch)
        rows = zip(metrics, predictions.texts, batch.references, batch.sources, strict=True)
        scores = [metric(text, references, source) for metric, text, references, source in rows]
        return torch.tensor(scores, dtype=torch.float64, device=batch.labels.device)

    def describe(self, pool: EncodedDataset, row: int) -> str:
        assert pool.answer is not None
        return f"answer   {self.tokenizer.decode(pool.answer[row])}"
