"""Invalid input: one line with what is wrong, where, and how to fix it, and exit code 2."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import tiny_args


def one_line(result) -> str:
    """The error message of a rejected command, after checks: exit code 2, one line, no traceback."""
    assert result.code == 2, (result.code, result.err)
    assert result.err.startswith("clpet: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.out
    return result.err


BAD = [
    ("unknown command", ["trian"], "unknown command 'trian'; did you mean train?"),
    ("unknown method", ["train", "method=dynamic_conpte"], "did you mean dynamic_conpet?"),
    ("unknown model", ["train", "model=minilmm"], "did you mean minilm?"),
    ("unknown benchmark", ["train", "benchmark=clinc"], "did you mean clinc150?"),
    ("unknown hardware", ["train", "hardware=tpu"], "unknown hardware 'tpu'"),
    ("mistyped key", ["train", "train.epohcs=3"], "did you mean train.epochs?"),
    ("mistyped method key", ["train", "method.topk=2"], "did you mean method.top_k?"),
    ("key of another group", ["train", "lr=1e-3"], "unknown key lr; did you mean train.lr?"),
    ("part of a key", ["train", "batch_size=4"], "did you mean train.global_batch_size?"),
    ("window of labels", ["train", "evaluation.bos=true"], "evaluation.bos is for language_modeling"),
    ("answers of labels", ["train", "evaluation.decode=rank"], "evaluation.decode is for text_to_text"),
    ("no test rows", ["train", "benchmark=files", "data_dir=NOROWS"], "test.jsonl has no rows"),
    ("no UTF-8", ["train", "benchmark=files", "data_dir=LATIN"], "train.csv is not UTF-8 (byte 0xe9 in line 2)"),
    ("unknown encoding", ["train", "benchmark=files", "data_dir=WORDS", "benchmark.encoding=utf8x"], "benchmark.encoding"),
    ("file as data_dir", ["train", "benchmark=folders", "data_dir=WORDS/train.jsonl"], "train.jsonl is not a folder"),
    ("file of another kind", ["train", "benchmark=files", "data_dir=LATIN/../nothing.xlsx"], "is not a folder or a file"),
    ("added unknown key", ["train", "+method.alpha=2"], "unknown key method.alpha"),
    ("unknown top-level key", ["train", "sede=3"], "did you mean seed?"),
    ("wrong type", ["train", "train.lr=fast"], "train.lr"),
    ("wrong type in a method", ["train", "method.top_k=many"], "method.top_k"),
    ("wrong choice", ["train", "train.schedule=sometimes"], "train.schedule"),
    ("syntax", ["train", "benchmark.tasks=[a,"], "benchmark.tasks=[a,"),
    ("no epochs", ["train", "train.epochs=0"], "train.epochs must be at least 1, or a list of such numbers, one per task, not 0"),
    ("negative rate", ["train", "train.lr=-1"], "train.lr must be 0 or more"),
    ("no batch", ["train", "train.global_batch_size=0"], "train.global_batch_size must be at least 1"),
    ("negative seed", ["train", "seed=-1"], "seed must be 0 or more"),
    ("no modules", ["train", "method.top_k=0"], "method.top_k must be at least 1"),
    ("no rank", ["train", "peft.r=0"], "peft.r must be at least 1"),
    ("no train examples", ["train", "benchmark.max_train=0"], "benchmark.max_train must be at least 1"),
    ("data_dir is missing", ["train", "benchmark=clinc150", "data_dir=nowhere"], "data_dir=nowhere is not a folder"),
    ("data_dir is empty", ["train", "benchmark=files", "data_dir=."], "nor a single data file"),
    ("files need data_dir", ["train", "benchmark=files"], "set data_dir=FOLDER"),
    ("missing column", ["train", "benchmark=files", "data_dir=WORDS", "text=body"], "has no column body"),
    ("missing label column", ["train", "benchmark=files", "data_dir=WORDS", "label=topic"], "has no column topic"),
    ("unknown task", ["train", "benchmark=files", "data_dir=WORDS", "benchmark.task=task", "tasks=[fruits]"], "did you mean fruit?"),
    ("unknown order", ["train", "order=upwards"], "benchmark.order=upwards is none of"),
    ("order misses a task", ["train", "order=[data,code]"], "must list each of these exactly once"),
    ("task without test examples", ["train", "benchmark=files", "data_dir=NOTEST", "benchmark.task=task"], "has no test examples"),
    ("label unseen in train", ["train", "benchmark=files", "data_dir=UNSEEN"], "'new' occurs in test but not in train"),
    ("empty text", ["train", "benchmark=files", "data_dir=EMPTY"], "row 2 has an empty text"),
    ("label is null", ["train", "benchmark=files", "data_dir=NULL"], "row 1 has no label"),
    ("broken file", ["train", "benchmark=files", "data_dir=BROKEN"], "cannot be read as parquet"),
    ("partition does not cover", ["train", "benchmark=files", "data_dir=WORDS", "benchmark.task_labels={a: [apple]}"], "does not cover"),
    ("model is not there", ["train", "model=bert_base"], "hf download google-bert/bert-base-uncased"),
    ("model path", ["train", "model=local", "model.path=."], "has no config.json: give a folder in the hub's layout"),
    ("model path in no data_dir", ["train", "model=local", "model.path=${data_dir}/x"], "has no config.json: give data_dir"),
    ("local model without path", ["train", "model=local"], "model.path"),
    ("wrong adapter layer", ["train", "model=tiny", "peft.targets=[q_proj]"], "peft.targets names the layer q_proj"),
    ("method without memory", ["train", "method=dynamic_conpet", "replay=none"], "replay=dynamic"),
    ("replay for nothing", ["train", "method=sequential", "replay=fixed"], "does not replay"),
    ("adapter per task without adapters", ["train", "method=independent", "peft=none"], "peft=none"),
    ("increments without LoRA", ["train", "method=o_lora", "peft=ia3"], "method=o_lora needs peft=lora, not ia3"),
    ("prompts and an adapter", ["train", "method=l2p", "peft=lora"], "method=l2p needs peft=frozen"),
    ("osf without its adapter", ["train", "method=osf", "peft=lora"], "method=osf needs peft=osf"),
    ("nothing to train", ["train", "method=sequential", "peft=frozen"], "leaves nothing to train"),
    ("replay in a router", ["train", "method=sapt", "replay=fixed"], "does not replay"),
    ("more prompts than there are", ["train", "method=l2p", "method.top_k=11"], "method.top_k must be from 1 to method.pool=10"),
    ("text for a list", ["train", "method=o_lora", "method.orthogonality=much"], "a number of 0 or more, or a list of one per task"),
    ("list of another length", ["train", "method=o_lora", "method.decay=[0,1]"], "has 2 values for"),
    ("prompts that fill the model", ["train", "model=tiny", "method=progressive_prompts", "method.length=200"], "leave no room"),
    ("composition", ["train", "method=mocl", "method.compose=sum"], "method.compose"),
    ("all of the spectrum", ["train", "method=inf_lora", "method.epsilon=1"], "method.epsilon must be between 0 and 1"),
    ("no mask in the template", ["train", "model=tiny", "model.representation=mask"], "{mask}"),
    ("no text in the template", ["train", "benchmark.template=hello"], "contains {text}"),
    ("output is a file", ["train", "output_dir=FILE"], "FILE"),
    ("config dir", ["train", "--config-dir", "nowhere"], "is not a folder"),
    ("list of nothing", ["list", "metods"], "unknown group 'metods'; did you mean method"),
    ("two folders", ["train", "--config-dir", "a", "--config-dir=b"], "--config-dir is given twice"),
    ("list of an unknown", ["list", "method", "nosuch"], "unknown method 'nosuch'"),
    ("runs elsewhere", ["runs", "nowhere"], "nowhere is not a folder"),
    ("compare by nothing", ["runs", ".", "--compare", "method"], "no finished runs"),
    ("show nothing", ["show", "nowhere"], "is not a run directory"),
    ("betas", ["train", "train.betas=[2,3]"], "train.betas must be two numbers in [0, 1)"),
    ("momentum", ["train", "train.momentum=1"], "train.momentum must be in [0, 1), or null"),
    ("optimiser", ["train", "train.optimizer=adam"], "unknown train.optimizer=adam; did you mean adamw?"),
    ("betas of sgd", ["train", "train.optimizer=sgd", "train.betas=[0.8,0.9]"], "train.optimizer=sgd does not use train.betas"),
    ("momentum of adamw", ["train", "train.momentum=0.9"], "train.optimizer=adamw does not use train.momentum, which is for muon, sgd"),
    ("nothing to carry", ["train", "train.optimizer=sgd", "train.optimizer_state=carry"], "needs train.momentum with sgd"),
    ("eps", ["train", "train.eps=-1"], "train.eps must be more than 0"),
    ("threads", ["train", "hardware.threads=-1"], "hardware.threads must be at least 1"),
    ("no selector to start from", ["train", "model=tiny", "method.top_k=5", "method.warm_start=selector"], "needs a trained selector"),
    ("longer than the model reads", ["train", "model=tiny", "benchmark.max_length=1024"], "reads at most 512 tokens"),
    ("impossible shape", ["train", "model=tiny", "model.config.hidden_size=33"], "cannot be built from model.config"),
    ("impossible attention", ["train", "model=tiny", "model.attention=flash"], "cannot be built from model.config"),
    ("no model at all", ["train", "model=null"], "unknown model 'null'"),
    ("task named twice", ["train", "tasks=[data,data]"], "names a task twice"),
    ("negative clip", ["train", "method.selector_clip=-1"], "method.selector_clip must be 0 (off) or more"),
    ("too few per label", ["train", "benchmark.per_label=0"], "benchmark.per_label must be at least 4"),
    ("path in a name", ["train", "method.name=a/b"], "method.name must be letters"),
    ("unknown slot", ["train", "benchmark.template='{text} about {title}'"], "whose slots are among {text}, {mask}"),
    ("flag without value", ["train", "--config-dir"], "--config-dir needs a value"),
    ("unknown flag", ["train", "--multi"], "unknown flag --multi"),
    ("fewer than labels", ["train", "benchmark.max_train=2"], "too few for the 4 labels of task data"),
    ("sweep without -m", ["train", "seed=0,1"], "add -m"),
    ("added group", ["train", "+experiment=foo"], "experiment"),
    ("batch without room for old", ["train", "train.global_batch_size=1"], "both must be at least 1"),
    ("best without validation", ["train", "model=tiny", "train.select=best", "benchmark.validation_share=0"], "no validation examples"),
    ("ranks without LoRA", ["train", "method=kif", "peft=none"], "use method.unit=matrix"),
    ("replay after nothing", ["train", "method=kif", "method.replay_phase=after"], "method.replay_phase=after needs a memory"),
    ("unknown score", ["train", "method=kif", "method.score=third"], "method.score must be first or second or mix, not third"),
    ("no temperature", ["train", "method=kif", "method.tau=0"], "method.tau must be more than 0"),
    ("decay of 1", ["train", "method=kif", "method.beta1=1"], "method.beta1 must be in [0, 1)"),
    ("rounds without memory", ["train", "method=recurrent_kif", "replay=none"], "needs a memory"),
    ("no inner steps", ["train", "method=recurrent_kif", "method.inner_steps=0"], "method.inner_steps must be at least 1"),
    ("questions of labels", ["train", "method=lamol"], "method=lamol does not support objective=classification: it writes questions and their answers"),
    ("new tokens and virtual ones", ["train", "method=lamol", "objective=text_to_text", "model=tiny_llama", "peft=prefix"], "which peft=prefix does not support"),
    ("interval beyond the longest", ["train", "method=aim_merging", "method.interval=200"], "method.interval must be from method.shortest=2 to method.longest=128"),
    ("share above 1", ["train", "method=kif", "replay=share", "replay.share=2"], "replay.share must be in [0, 1]"),
    ("labels of free text", ["train", "method=crl", "benchmark=superni"], "method=crl does not support objective=text_to_text: it needs labels"),
    ("modules of free text", ["train", "method=dynamic_conpet", "benchmark=superni"], "does not support objective=text_to_text"),
    ("classes of free text", ["train", "method=replay", "replay=fixed", "benchmark=superni", "model=tiny_llama"], "replay=fixed chooses its memory by class"),
    ("Fisher of labels", ["train", "method=ewc", "method.fisher=labels", "benchmark=superni"], "use batch or sample"),
    ("encoder that should write", ["train", "method=sequential", "benchmark=files", "data_dir=WORDS", "objective=text_to_text"], "is an encoder and cannot write"),
    ("unknown objective", ["train", "objective=translate"], "objective"),
    ("unknown metric", ["train", "benchmark.metric=bleu"], "benchmark.metric must be accuracy or exact_match or rouge_l"),
    ("column of the prompt", ["train", "method=sequential", "model=tiny_llama", "benchmark=files", "data_dir=WORDS", "objective=text_to_text", "benchmark.prompt='{subject} {text}'"], "has no column subject"),
    ("answer of no length", ["train", "benchmark.max_target=0"], "benchmark.max_target must be at least 1 token"),
    ("more keys than there are", ["train", "method=slm", "method.keys=4", "method.top_k=5"], "method.top_k must be from 1 to method.keys=4"),
    ("groups that do not divide", ["train", "method=slm", "method.groups=5"], "method.groups=5 must be a divisor of 384"),
    ("encoder that is not here", ["train", "method=slm", "method.encoder=nli_mpnet_base"], "hf download sentence-transformers/nli-mpnet-base-v2"),
    ("layer without values", ["train", "method=slm", "model=tiny", "method.targets=[o_proj]"], "available: dense, key, query, value"),
    ("shots of nothing", ["train", "benchmark.shots=0"], "benchmark.shots must be at least 1"),
    ("data of an unknown", ["data", "nosuch"], "nosuch is neither a file or folder nor a benchmark"),
    ("licensed data", ["train", "benchmark=tacred"], "put train.json, dev.json, test.json of TACRED (LDC2018T24"),
    ("licensed data elsewhere", ["train", "benchmark=ace2005", "data_dir=."], "lacks train.json, dev.json, test.json: put"),
    ("unknown layout", ["train", "benchmark=bbn", "benchmark.layout=conll"], "benchmark.layout must be fewrel, fewnerd, spans"),
    ("no classes", ["train", "benchmark=bbn", "benchmark.classes_per_task=[5,0]"], "benchmark.classes_per_task must be at least 1"),
    ("rates by task", ["train", "train.lr=[1e-3,-1]"], "train.lr must be 0 or more, or a list"),
]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path, words: Path) -> dict[str, str]:
    """{name in BAD: path} of valid and invalid data folders."""

    def folder(name: str, train: list[dict], test: list[dict] | None = None) -> str:
        path = tmp_path / name.lower()
        path.mkdir()
        for split, rows in (("train", train), ("test", test)):
            if rows is not None:
                (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def lines(name: str, content: bytes) -> str:
        path = tmp_path / name.lower() / "train.csv"
        path.parent.mkdir()
        path.write_bytes(content)
        return str(path.parent)

    good = [{"text": f"t{i}", "label": "ab"[i % 2], "task": "x"} for i in range(8)]
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no parquet")
    return {
        "WORDS": str(words),
        "NOTEST": folder("NOTEST", [*good, {"text": "y", "label": "c", "task": "y"}], good),
        "UNSEEN": folder("UNSEEN", good, [{"text": "t", "label": "new"}]),
        "EMPTY": folder("EMPTY", [good[0], {"text": " ", "label": "a"}]),
        "NULL": folder("NULL", [{"text": "t", "label": None}, good[0]]),
        "NOROWS": folder("NOROWS", good, []),
        "LATIN": lines("LATIN", b"text,label\ncaf\xe9,a\n"),
        "BROKEN": str(tmp_path / "broken"),
        "FILE": str(tmp_path / "FILE"),
    }


@pytest.mark.parametrize(("name", "command", "expected"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_input_gets_one_line(name: str, command: list[str], expected: str, clpet, folders: dict[str, str]) -> None:
    words = [word.partition("=")[0] + "=" + folders.get(word.partition("=")[2], word.partition("=")[2]) if "=" in word else word
             for word in command]  # fmt: skip
    if words[0] == "train":
        words.insert(1, "tracking=off")
    assert expected in one_line(clpet(*words))


def test_a_misspelt_file_name(clpet, words: Path) -> None:
    missing = words / "tran.jsonl"
    for command in (["data", missing], ["init", missing], ["train", "benchmark=files", f"data_dir={missing}"]):
        assert one_line(clpet(*command)).endswith("; did you mean train.jsonl?\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_write_permission(clpet, words: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in one_line(clpet("train", *tiny_args(words), "output_dir=locked/x"))


def test_a_read_only_output_folder(clpet, words: Path) -> None:
    """Nobody can create folders in /proc, not even root."""
    assert "/proc" in one_line(clpet("train", *tiny_args(words), "output_dir=/proc/clpet"))


def test_a_corrupt_result_is_refused(clpet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"tasks": 3}')
    assert "results.json has no method" in one_line(clpet("show", run))
