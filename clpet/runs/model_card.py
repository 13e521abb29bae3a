"""The model card (README.md) of an exported folder: what it is, how it was trained, its scores, and code to use it."""

import shlex
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from clpet import __version__
from clpet.escape import inline, markdown
from clpet.metrics.transfer_matrix import on_split
from clpet.models.backbone import Architecture, Backbone, Representation
from clpet.objectives.classification import Classification
from clpet.objectives.text_to_text import TextToText
from clpet.reporting.tables import format_table, spell_score

if TYPE_CHECKING:
    from clpet.runs.load_run import LoadedRun

PRIVATE = ("data_dir=", "cache_dir=", "output_dir=", "model.path=")  # options that are paths of one machine
POOLING = {
    Representation.mean: "(hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)",
    Representation.cls: "hidden[:, 0]",
    Representation.last: "hidden[torch.arange(len(hidden)), mask.sum(1) - 1]",
    Representation.mask: 'hidden[batch["input_ids"] == tokenizer.mask_token_id]',
    Representation.pooled: "output.pooler_output",
}


def model_card(run: "LoadedRun", contents: str, loader: str, peft_adapters: list[str], pipeline: bool) -> str:
    """The card as Markdown with the hub's metadata.

    `contents` says what the folder holds, `loader` is the class of transformers that loads the backbone, and
    `peft_adapters` are the adapters in the folder. With `pipeline` the folder's weights answer texts without clpet.
    """
    method, benchmark, backbone = run.method, run.benchmark, run.record.components.backbone
    metadata = ModelCardData(
        base_model=backbone.hub,
        library_name="peft" if peft_adapters else "transformers",
        tags=["clpet", "continual-learning", method.name, method.objective.name],
    )
    tasks = ", ".join(markdown(name) for name in benchmark.names[: run.row])
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {markdown(method.name)} on {markdown(benchmark.name)}, after {run.row} of {len(benchmark)} tasks",
        f"This folder holds {contents}. It was trained with clpet {__version__} on a sequence of tasks: {tasks}.",
        "## Training",
        _training(run),
        "## Scores",
        _scores(run),
        "## Use",
        _use(run, loader, peft_adapters, pipeline),
    ]
    return "\n\n".join(lines) + "\n"


def _training(run: "LoadedRun") -> str:
    """The settings of the run as a table, and its command."""
    config, parts = run.record.config, run.record.components
    settings = {
        "method": run.method.name,
        "backbone": parts.backbone.hub or parts.backbone.name,
        "adapter": parts.peft.name,
        "replay": parts.replay.name,
        "objective": run.method.objective.name,
        "epochs per task": str(config.train.epochs),
        "learning rate": str(config.train.lr),
        "batch": str(config.train.global_batch_size),
        "seed": str(config.seed),
        "longest text": f"{run.benchmark.max_length} tokens",
        "data": str(run.record.run_json["data"]["fingerprint"]),
    }
    table = format_table(["setting", "value"], [[key, value] for key, value in settings.items()], "md", words=2)
    words = [str(word) for word in run.record.run_json.get("overrides", [])]
    command = shlex.join(["clpet", "train", *(word for word in words if not word.startswith(PRIVATE))])
    # Indented code: no text from the run can end it, as it could end a fence.
    return f"{table}\n\nThe command, without the locations of files:\n\n    {inline(command)}"


def _scores(run: "LoadedRun") -> str:
    """The recorded scores of every task after the last one learned."""
    rows = [
        [name, spell_score(score, run.benchmark.direction)]
        for name, score in zip(run.benchmark.names, run.scores, strict=True)
    ]
    metric = run.benchmark.tasks[0].metric
    unit = f"{metric}, lower is better" if run.benchmark.direction == "lower" else f"{metric} in %"
    table = format_table(["task", on_split(unit, run.split)], rows, "md")
    labels = "Over all labels seen so far, after" if run.benchmark.traits.has_labels else "After"
    return f"{labels} {run.row} tasks:\n\n{table}"


def _use(run: "LoadedRun", loader: str, peft_adapters: list[str], pipeline: bool) -> str:
    """Code that loads the weights; with `pipeline` also code that answers a text."""
    backbone, classifies = run.record.components.backbone, run.method.objective.traits.has_labels
    imports = ["import json", "import torch"] if classifies else ["import torch"]
    imports += ["from safetensors import safe_open"] if classifies else []
    imports += ["from peft import PeftModel"] if peft_adapters else []
    lines = [*imports, f"from transformers import AutoTokenizer, {loader}", "", 'folder = "."']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)", *_load(backbone, loader, peft_adapters)]
    if pipeline:
        lines += _answers(run)
        note = ""
    else:
        note = (
            "\n\nTo answer texts with these parts together takes clpet and the run's directory:\n\n"
            '    import clpet\n    clpet.load("RUN").predict(["a text"])'
        )
    return "\n".join(["```python", *lines, "```"]) + note


def _load(backbone: Backbone, loader: str, peft_adapters: list[str]) -> list[str]:
    if not peft_adapters:
        return [f"model = {loader}.from_pretrained(folder).eval()"]
    base = backbone.hub or backbone.path or backbone.package
    name = peft_adapters[0]
    return [
        f"base = {loader}.from_pretrained({base!r})",
        f'model = PeftModel.from_pretrained(base, f"{{folder}}/adapters/{name}").eval()',
    ]


def _answers(run: "LoadedRun") -> list[str]:
    """Code that answers texts, from the tokens to the label, the answer or the perplexity."""
    benchmark, objective = run.benchmark, run.method.objective
    causal = objective.backbone.architecture is Architecture.decoder
    if objective.traits.plain_text:
        return [
            'batch = tokenizer("a text", return_tensors="pt")',
            "with torch.inference_mode():",
            '    loss = model(**batch, labels=batch["input_ids"]).loss',
            "print(loss.exp())  # perplexity",
        ]
    if benchmark.chat:
        return _chat_answers(run)
    lines = [
        f"template, max_length, texts = {benchmark.template!r}, {benchmark.max_length}, ['a text', 'another']",
        "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
        *(['tokenizer.padding_side = "left"'] if causal and objective.traits.in_words else []),
        'template = template.replace("{mask}", str(tokenizer.mask_token))',
        'room = max_length - len(tokenizer(template.replace("{text}", "")).input_ids)  # for the text itself',
        "tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=room).input_ids",
        'prompts = [template.replace("{text}", text) for text in tokenizer.batch_decode(tokens)]',
        'batch = tokenizer(prompts, padding=True, return_tensors="pt")',
        "with torch.inference_mode():",
    ]
    if objective.traits.in_words:
        start = '[:, batch["input_ids"].shape[1] :]' if causal else ""
        return [
            *lines,
            f"    tokens = model.generate(**batch, max_new_tokens={benchmark.max_target}, do_sample=False){start}",
            "answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)",
            "print(answers)",
        ]
    assert isinstance(objective, Classification)  # see `answers_without_clpet`
    return [
        *lines,
        '    output, mask = model(**batch), batch["attention_mask"]',
        "hidden = output.last_hidden_state",
        f"features = {POOLING[objective.representation]}",
        'with safe_open(f"{folder}/heads/default.safetensors", "pt") as head:',
        '    labels = json.loads(head.metadata()["labels"])',
        '    logits = features @ head.get_tensor("weight").T + head.get_tensor("bias")',
        "answers = [labels[index] for index in logits.argmax(1)]",
        "print(answers)",
    ]


def _chat_answers(run: "LoadedRun") -> list[str]:
    """Code that answers conversations with the chat template of the folder's tokenizer."""
    objective, backbone = run.method.objective, run.record.components.backbone
    assert isinstance(objective, TextToText)
    # As a dictionary, since a record from elsewhere may hold any text in place of a name.
    options = f", **{dict(backbone.chat_options)!r}" if backbone.chat_options else ""
    return [
        'messages = [{"role": "user", "content": "a text"}]',
        'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
        f"batch = tokenizer.apply_chat_template(messages, **options{options})",
        "with torch.inference_mode():",
        f"    tokens = model.generate(**batch, max_new_tokens={run.benchmark.max_target}, do_sample=False, "
        f"eos_token_id={objective.ends})",
        'print(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())',
    ]
