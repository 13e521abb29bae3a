"""Speed of clpet compared with hand-written code on the same data; all contenders take turns in one process.

    python scripts/bench.py                 five rounds on python_stdlib with minilm
    python scripts/bench.py loop            the training loop only
    python scripts/bench.py rounds=7 train.epochs=2 benchmark=clinc150 data_dir=FOLDER
    python scripts/bench.py kif             what KIF adds to a training step, and its fusion of 1,152 units
    python scripts/bench.py slm             SLM's mixed branches against plain LoRA; its stage 1 against training steps
    python scripts/bench.py pretraining     packed windows against a hand-written loop
    python scripts/bench.py padding         padded batches against rows without padding (hardware.padding_free)
    python scripts/bench.py predict         answers to the test texts as new texts against their evaluation
    python scripts/bench.py step_log        training with and without the step log (train.log_every)
    python scripts/bench.py chunks          peak memory of a step with a large vocabulary, with and without chunks
    python scripts/bench.py memory          bytes that a step with LoRA in bf16 keeps for its backward pass
    python scripts/bench.py precision       losses with LoRA's products in fp32 and in bf16, over seeds
    python scripts/bench.py side_by_side    whole runs: one, two and four at once on this machine
    python scripts/bench.py generate benchmark=long_sequence tasks=[agnews] data_dir=FOLDER model=local \
        model.path=FOLDER model.architecture=decoder    answers in batches against one at a time
    OMP_NUM_THREADS=1 python scripts/bench.py clock=cpu ...     CPU seconds, on a machine that others use too

Prints medians over the rounds of
  loop     training examples per second: clpet's Trainer.fit against the shortest PyTorch + peft loop, once on the
           same batches and once on its own random batches;
  whole    seconds to learn the tasks one after the other and evaluate all of them after each: clpet against a script
           around the Hugging Face Trainer, with the Trainer's default evaluation batch of 8 and with clpet's.
Model, adapters, precision, attention, training batch size, epochs and test sets are the same for all.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from clpet.config.build import parse_config
from clpet.config.compose import conf_dir
from clpet.config.identity import register_resolvers
from clpet.data.batches import EncodedDataset
from clpet.evaluation.evaluator import Evaluator
from clpet.models.adapters import Adapters
from clpet.replay.batch_plan import BatchPlan
from clpet.training.progress import NoProgress
from clpet.training.step import StepHooks
from clpet.training.trainer import Trainer, quiet_libraries
from clpet.wiring import Components, Session


class Bench:
    """One configuration; every contender starts from a new model."""

    def __init__(self, overrides: list[str]) -> None:
        register_resolvers()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            self.cfg = compose("train", ["method=sequential", "tracking=off", "train.epochs=1", *overrides])
        self.config = parse_config(self.cfg)
        self.components = Components.build(self.config)
        self.benchmark = self.components.settle(self.components.source.load(self.config.data_dir))
        self.batch, self.epochs, self.lr = (
            self.config.train.global_batch_size,
            self.config.train.epochs_of(0),
            self.config.train.lr_of(0),
        )

    def method(self) -> Any:
        """clpet's sequential method, set up as in `clpet train`."""
        method = Session.assemble(Components.build(self.config), self.benchmark, NoProgress()).method
        method.objective.add_labels(range(len(self.benchmark.labels)))
        return method

    def by_hand(self) -> tuple["ByHand", Any]:
        """The same network as a plain module: backbone, peft adapter, mean pooling, linear head."""
        hardware, backbone = self.components.hardware, self.components.backbone
        model, tokenizer = backbone.load(hardware.torch_dtype, hardware.torch_device, 0)
        for module in model.modules():  # clpet has no dropout in a frozen backbone
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        adapters = Adapters(model, backbone, self.components.peft)
        adapters.add("default", 0)
        return ByHand(adapters.model, len(self.benchmark.labels)).to(hardware.torch_device), tokenizer

    # The training loop only

    def clpet_loop(self, batches: list[np.ndarray]) -> float:
        """Examples per second of Trainer.fit."""
        method = self.method()
        trainer = Trainer(self.config.train, self.components.hardware, method.objective, NoProgress(), 0)
        plan = BatchPlan(method.data.train, len(batches), lambda epoch: batches)
        start = time.perf_counter()
        trainer.fit(plan, method.named_parameters(), StepHooks(method.loss, step_loss=method.step_loss))
        return self.epochs * sum(map(len, batches)) / (time.perf_counter() - start)

    def hand_loop(self, batches: Iterator[list[int]] | list[np.ndarray], pool: EncodedDataset) -> float:
        """Examples per second of the shortest loop."""
        model, tokenizer = self.by_hand()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01)
        rows = [pool.tokens(row).tolist() for row in range(len(pool))]
        seen, device = 0, self.components.hardware.torch_device
        start = time.perf_counter()
        for _ in range(self.epochs):
            for indices in batches:
                batch = tokenizer.pad({"input_ids": [rows[row] for row in indices]}, return_tensors="pt")
                labels = torch.from_numpy(pool.labels[indices]).to(device)
                loss = model(**batch.to(device), labels=labels)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seen += len(indices)
        return seen / (time.perf_counter() - start)

    # Tasks one after the other, evaluated after each

    def clpet_whole(self) -> float:
        """Seconds of tokenising, training and evaluating with clpet."""
        method = self.method()
        start = time.perf_counter()
        objective = method.objective
        data = objective.encode()
        evaluator = Evaluator(self.benchmark, data)
        trainer = Trainer(self.config.train, self.components.hardware, objective, NoProgress(), 0)
        for index, task in enumerate(self.benchmark.tasks):
            trainer.begin_task(index)
            method.learn(task, index, trainer)
            method.after_task(task, index)
            evaluator(method, index + 1, list(range(len(self.benchmark))))
        return time.perf_counter() - start

    def trainer_whole(self, eval_batch: int) -> float:
        """Seconds of the same with the Hugging Face Trainer."""
        from datasets import Dataset
        from transformers import DataCollatorWithPadding, TrainingArguments
        from transformers import Trainer as HFTrainer

        model, tokenizer = self.by_hand()
        start = time.perf_counter()

        def encode(task: Any, split: str) -> Dataset:
            examples = task.split(split)
            out = tokenizer([e.text for e in examples], truncation=True, max_length=self.benchmark.max_length)
            out["labels"] = [self.benchmark.label_ids[e.target] for e in examples]
            return Dataset.from_dict(dict(out))

        trains = [encode(task, "train") for task in self.benchmark.tasks]
        tests = [encode(task, "test") for task in self.benchmark.tasks]
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=self.batch, per_device_eval_batch_size=eval_batch,
            num_train_epochs=self.epochs, learning_rate=self.lr, weight_decay=0.01, lr_scheduler_type="constant",
            report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
            use_cpu=self.components.hardware.torch_device.type == "cpu", label_names=["labels"],
        )  # fmt: skip
        for train in trains:
            trainer = HFTrainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=train)
            trainer.train()
            for test in tests:
                output = trainer.predict(test)
                assert output.predictions.argmax(1).shape == output.label_ids.shape
        return time.perf_counter() - start


class ByHand(nn.Module):
    """Encoder, mean pooling, linear head."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, labels)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        logits = self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def medians(name: str, contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Runs the contenders in turn, `rounds` times after one warm-up, and prints the medians."""
    measured: dict[str, list[float]] = {key: [] for key in contenders}
    for turn in range(rounds + 1):
        for key, run in contenders.items():
            value = run()
            if turn:  # the first turn warms up
                measured[key].append(value)
    for key, values in measured.items():
        print(
            f"{name}  {key:28} median {statistics.median(values):8.2f}   min {min(values):.2f}  max {max(values):.2f}"
        )
    return {key: statistics.median(values) for key, values in measured.items()}


def run_other(name: str, overrides: list[str], rounds: int) -> None:
    """Runs a benchmark of the other scripts by its function's name."""
    import bench_memory
    import bench_methods
    import bench_predict
    import bench_processes
    import bench_step_log
    import bench_text

    with quiet_libraries():
        for module in (bench_text, bench_memory, bench_methods, bench_predict, bench_processes, bench_step_log):
            if hasattr(module, name):
                getattr(module, name)(overrides, rounds)
                return
    raise SystemExit(f"bench.py: unknown benchmark {name}")


def compare_loops(bench: Bench, rounds: int) -> dict[str, float]:
    """Medians of the training loop, in examples per second, by contender."""
    pool = bench.method().data.train
    rows = np.arange(len(pool))
    bucketed = pool.shuffled(rows, bench.batch, np.random.default_rng(0))
    shuffled = np.random.default_rng(0).permutation(rows)
    random = [shuffled[i : i + bench.batch] for i in range(0, len(rows), bench.batch)]
    print(f"{len(rows)} train examples, batch {bench.batch}, {bench.epochs} epochs, {rounds} rounds, "
          f"{torch.get_num_threads()} threads, {bench.components.hardware.torch_dtype}")  # fmt: skip
    contenders = {
        "clpet": lambda: bench.clpet_loop(bucketed),
        "by hand, same batches": lambda: bench.hand_loop(bucketed, pool),
        "by hand, random batches": lambda: bench.hand_loop(random, pool),
    }
    return medians("loop  examples/s", contenders, rounds)


def compare_wholes(bench: Bench, rounds: int) -> dict[str, float]:
    """Medians of whole runs, in seconds, by contender."""
    eval_batch = bench.components.hardware.eval_batch_size
    contenders = {
        "clpet": bench.clpet_whole,
        "HF Trainer, test batch 8": lambda: bench.trainer_whole(8),
        f"HF Trainer, test batch {eval_batch}": lambda: bench.trainer_whole(eval_batch),
    }
    return medians("whole seconds   ", contenders, rounds)


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the arguments name, by default the comparison of loops and whole runs."""
    rounds = next((int(word.split("=")[1]) for word in arguments if word.startswith("rounds=")), 5)
    if "clock=cpu" in arguments:
        time.perf_counter = time.process_time
    overrides = [word for word in arguments if "=" in word and not word.startswith(("rounds=", "clock="))]
    names = [word for word in arguments if "=" not in word]
    if names and names[0] != "loop":
        run_other(names[0], overrides, rounds)
        return
    bench = Bench(overrides)
    with quiet_libraries():
        warnings.simplefilter("ignore")
        ours, *others = compare_loops(bench, rounds).items()
        for key, value in others:
            print(f"training loop: clpet / {key}: {ours[1] / value:.2f}")
        if names:
            return
        ours, *others = compare_wholes(bench, rounds).items()
    for key, value in others:
        print(f"end to end: {key} / clpet: {value / ours[1]:.2f} times the time")


if __name__ == "__main__":
    main(sys.argv[1:])
