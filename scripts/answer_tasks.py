"""Writes small tasks with answers in words, for docs/results.md: python scripts/answer_tasks.py FOLDER.

FOLDER/tasks has three tasks. In FOLDER/copy the answer is a random word that the prompt names first.
"""

import json
import random
import sys
from pathlib import Path

# task: (question, answer -> what it is the answer for)
TASKS = {
    "kind": ("What is it? It is", {
        "animal": "dog cat bird frog cow duck", "food": "cake apple soup bread cookie egg",
        "toy": "doll ball kite puzzle drum truck", "person": "girl boy mom king nurse baby"}),
    "color": ("What color is it? It is", {
        "red": "rose cherry heart strawberry tomato brick", "green": "grass leaf frog pea pickle bush",
        "blue": "sky sea lake river whale berry", "yellow": "sun banana lemon duck corn bee"}),
    "feeling": ("How does he feel? He is", {
        "happy": "gift party game hug song prize", "sad": "loss goodbye tear mess mistake rain",
        "scared": "monster storm ghost wolf snake shadow", "angry": "fight thief lie bully argument insult"}),
}  # fmt: skip
FRAMES = {
    "train": ["Tim saw the {}.", "One day, there was a {} in the park.", "Look at the {}!"],
    "validation": ["The {} was very big."],
    "test": ["He came to the {} in the morning.", "Mom told Tim about the {}."],
}


COPIED = 600  # prompts that name their answer


def write(folder: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """Writes the rows of every split as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tasks(split: str) -> list[dict[str, str]]:
    """Every word of every task in the sentences of a split."""
    return [
        {"text": f"{frame.format(word)} {question}", "label": answer, "task": task}
        for task, (question, answers) in TASKS.items()
        for answer, words in answers.items()
        for word in words.split()
        for frame in FRAMES[split]
    ]


def copies(split: str, count: int) -> list[dict[str, str]]:
    """Prompts that name a random answer."""
    rng = random.Random(split)
    nouns = [word for _, answers in TASKS.values() for words in answers.values() for word in words.split()]
    vocabulary = [*nouns, *(answer for _, answers in TASKS.values() for answer in answers)]
    rows = []
    for _ in range(count):
        question, _ = rng.choice(list(TASKS.values()))
        word, frame = rng.choice(vocabulary), rng.choice(FRAMES[split])
        rows.append({"text": f"It is {word}. {frame.format(rng.choice(nouns))} {question}", "label": word})
    return rows


def main(folder: Path) -> None:
    """Writes train, validation and test, whose sentences differ."""
    write(folder / "tasks", {split: tasks(split) for split in FRAMES})
    sizes = {"train": COPIED, "validation": 20, "test": 60}
    write(folder / "copy", {split: copies(split, size) for split, size in sizes.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
