"""Speed of predictions of new texts; run by scripts/bench.py.

python scripts/bench.py predict [method=... model=... benchmark=...]   the test texts as new texts, and their evaluation
"""

import time

from bench import Bench, medians

from clpet.evaluation.evaluator import Evaluator
from clpet.evaluation.text_prediction import answer_texts
from clpet.methods.base import Method
from clpet.training.progress import NoProgress
from clpet.wiring import Components, Session


def predict(overrides: list[str], rounds: int) -> None:
    """Test texts per second of the evaluator and of `answer_texts`, both with tokenising, after learning all tasks."""
    bench = Bench(["cache_dir=null", *overrides])
    session = Session.assemble(Components.build(bench.config), bench.benchmark, NoProgress())
    for index, _ in session.method.curriculum():
        session.learn(index)
    count, texts = len(session.benchmark), session.benchmark.texts("test")
    method: Method = session.method

    def evaluator() -> float:
        data = method.objective.encode()  # of all splits: not timed
        tests = [example for task in session.benchmark.tasks for example in task.test]
        start = time.perf_counter()
        method.objective.encode_split(tests, [0] * len(tests), [0] * len(tests))
        Evaluator(session.benchmark, data)(method, count, list(range(count)))
        return len(texts) / (time.perf_counter() - start)

    def predictions() -> float:
        start = time.perf_counter()
        answer_texts(method, session.benchmark, session.components.source, texts, count)
        return len(texts) / (time.perf_counter() - start)

    speeds = medians("test texts/s", {"evaluator": evaluator, "predictions": predictions}, rounds)
    print(f"predictions / evaluator: {speeds['predictions'] / speeds['evaluator']:.2f}")
