"""The options of peft: what each can do on each kind of model, their fields, targets, dropout, and refusals."""

import copy
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from transformers.pytorch_utils import Conv1D

from clpet.cli.options import options
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.errors import ConfigError, ModelError
from clpet.models.adapters import Adapters
from clpet.models.architectures import all_linear, norm_layers
from clpet.models.backbone import Backbone
from clpet.models.peft_methods import METHODS, REFUSED
from clpet.models.peft_options import FullFineTuning, Lora, Peft, PeftOption
from clpet.objectives.base import AnswerSpace
from clpet.runtime.run_checkpoint import read_tree, write_tree
from tests.models.peft_cases import KINDS, NAMES, SMALL, STEPS, measure

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
NETWORKS = ("tiny", "tiny_llama", "tiny_gpt2", "tiny_t5")


def table() -> dict[str, list[str]]:
    """{option: what it can do on the three kinds of model} of docs/adapters.md."""
    rows = re.findall(r"^\| `(\w+)` \| ([TREM-]+) \| ([TREM-]+) \| ([TREM-]+) \|", PAGE.read_text(), re.M)
    return {name: cells for name, *cells in rows}


def option(name: str, *more: str) -> FullFineTuning:
    """An option of the group peft with the sizes of the tiny models."""
    node = yaml.safe_load(options("peft")[name].read_text())
    for word in (*SMALL.get(name, []), *more):
        key, _, value = word.partition("=")
        node[key.lstrip("+").removeprefix("peft.")] = yaml.safe_load(value)
    return build(node, "peft")


def network(name: str, generates: bool = True) -> tuple[torch.nn.Module, Backbone]:
    """A tiny network with its output layer, and its backbone."""
    backbone: Backbone = build(parse_config(compose_config([f"model={name}"])).model, "model")
    return backbone.load(torch.float32, torch.device("cpu"), 0, generates)[0], backbone


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
@pytest.mark.parametrize("name", NAMES)
def test_an_option_can_do_what_the_table_says(name: str, kind: str, words: Path, prose: Path) -> None:
    """Train, resume bit for bit, export for plain peft, merge: as in docs/adapters.md. Also: with the adapter off the
    network is the pretrained one, if the option says so.
    """
    measured = measure(name, kind, words, prose)
    cell = "".join(step[0].upper() if measured.get(step) == "yes" else "-" for step in STEPS)
    assert cell == table()[name][KINDS.index(kind)], measured


def test_an_adapter_with_shared_tensors_trains_resumes_and_is_exported(words: Path, prose: Path) -> None:
    assert measure("vblora", "encoder", words, prose) == dict.fromkeys(STEPS, "yes")


def test_the_table_lists_every_option() -> None:
    assert sorted(table()) == NAMES


def test_every_method_of_peft_is_an_option_or_refused_with_a_reason() -> None:
    """A new version of peft with a new method fails here."""
    known = {*METHODS, *(name.upper() for name in REFUSED)}
    assert {kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING} - known == set()
    assert {option(name).method for name in NAMES} == set(METHODS)
    page = PAGE.read_text()
    assert [name for name, reason in REFUSED.items() if f"| `{name}` | {reason} |" not in page] == []


def test_the_page_lists_the_options_for_gpt2() -> None:
    listed = re.search(r"On GPT-2[^:]*:([^.]*)\.", PAGE.read_text())
    assert listed
    assert re.findall(r"`(\w+)`", listed[1]) == [name for name in NAMES if option(name).traits.transposed]


@pytest.mark.slow
def test_options_that_support_transposed_layers_run_on_gpt2() -> None:
    ids = torch.arange(12).view(2, 6) + 40
    model, backbone = network("tiny_gpt2")
    for name in [name for name in NAMES if option(name).traits.transposed]:
        adapters = Adapters(copy.deepcopy(model), backbone, option(name), generates=True)
        for adapter in ("one", "two")[: 1 + adapters.traits.several]:
            adapters.add(adapter, 0)
            output = adapters.model(input_ids=ids, use_cache=False).logits
            output.square().mean().backward()
            assert any(value.grad is not None for value in adapters.tensors(adapter).values()), (name, adapter)


def test_other_options_refuse_transposed_layers() -> None:
    model, backbone = network("tiny_gpt2")
    assert any(isinstance(module, Conv1D) for module in model.modules())
    for name in ("boft", "olora"):
        with pytest.raises(ModelError, match=rf"peft={name} supports linear layers only.*Conv1D"):
            Adapters(model, backbone, option(name)).add("default", 0)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("vera", ["+peft.rank=4"], r"unknown key peft.rank; "),
        ("vera", ["peft.r=four"], r"peft.r must be an integer, not four"),
        (
            "vera",
            ["peft.targets=query"],
            r"peft.targets must be a list of module names, all-linear, or null, not query",
        ),
        ("lora", ["peft.use_dora=1"], r"peft.use_dora must be true or false, not 1"),
        ("lora", ["+peft.lora_alpha=3"], r"peft.lora_alpha has a name of its own here"),
        ("lora", ["+peft.bias=all"], r"peft.bias is not supported: it trains biases of the backbone"),
        ("lora", ["+peft.init_lora_weights=eva"], r"init_lora_weights=eva is not supported: it initialises LoRA from"),
        ("lora", ["+peft.init_lora_weights=pissa_niter_4"], r"is not supported: use true, false, gaussian"),
        ("lora", ["peft.eva_config={rho: 2}"], r"peft.eva_config must be null"),
        ("boft", ["peft.boft_block_size=0"], r"peft=boft: "),
        ("trainable_tokens", ["peft.token_indices=[]"], r"peft.token_indices must be a list of token ids"),
        ("p_tuning", ["peft.targets=[query]"], r"peft.targets must be null with peft=p_tuning"),
        ("vera", ["peft.type=ADALORA"], r"peft.type=ADALORA is not supported: its ranks follow a schedule"),
        ("vera", ["peft.type=VERRA"], r"peft.type must be a method of peft, not VERRA; did you mean VERA"),
    ],
)
def test_fields_of_peft_are_checked_before_any_work(name: str, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        option(name, *more)


def test_a_refused_method_is_named_with_its_reason(clpet) -> None:
    answer = clpet("train", "peft=adalora")
    assert answer.code == 2
    assert answer.err == f"clpet: peft=adalora is not supported: {REFUSED['adalora']}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=independent", "peft=pissa"], "needs an adapter per task and cannot run with peft=pissa"),
        (["method=o_lora", "peft=dora"], "method=o_lora needs peft=lora, not dora"),
        (["method=o_lora", "+peft.use_rslora=true"], "computes its LoRA itself"),
        (["method=kif", "peft=dora"], "needs peft=lora; with peft=dora use method.unit=matrix"),
        (["method=l2p", "peft=vera"], "needs peft=frozen"),
        (["method=sequential", "peft=prefix", "model=tiny_t5"], "peft=prefix does not support the encoder of an"),
        (["method=sequential", "peft=vera", "hardware.shard=true"], "hardware.shard does not support peft=vera"),
    ],
)
def test_methods_refuse_adapters_that_they_cannot_use(arguments: list[str], message: str, make) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*arguments)


def test_fields_of_lora_are_passed_to_peft() -> None:
    model, backbone = network("tiny")
    config = option("lora", "+peft.use_rslora=true", "+peft.layers_to_transform=[1]").peft_config(backbone, model)
    assert (config.use_rslora, config.layers_to_transform, config.r, config.lora_alpha) == (True, [1], 8, 16)
    assert isinstance(option("dora"), PeftOption)
    assert option("dora").peft_config(backbone, model).use_dora


@pytest.mark.parametrize("name", NETWORKS)
def test_all_linear_is_every_linear_layer_but_the_output_and_the_pooler(name: str) -> None:
    model, backbone = network(name)
    names, output = set(all_linear(model, pooled=False)), model.get_output_embeddings()
    linear = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    left_out = {key for key in linear - names if model.get_submodule(key) is not output}
    assert {key.split(".")[0] for key in left_out} == ({"cls"} if name == "tiny" else set())  # BERT's head for tokens
    adapters = Adapters(model, backbone, Lora(name="lora", targets="all-linear"), generates=True)
    adapters.add("default", 0)
    adapted = {key.split(".lora_A")[0].removeprefix("base_model.model.") for key in adapters.tensors("default")}
    assert {key.split(".lora_B")[0] for key in adapted} == names
    assert norm_layers(network(name)[0])


def test_all_linear_of_an_encoder_leaves_out_an_unused_pooler() -> None:
    model, _ = network("tiny", generates=False)
    assert "pooler.dense" in all_linear(model, pooled=True)
    assert "pooler.dense" not in all_linear(model, pooled=False)


@pytest.mark.parametrize("chosen", ["loha", "pvera", "lora"])
def test_the_dropout_of_any_adapter_is_active_in_training_only(chosen: str) -> None:
    rate = {"loha": "peft.module_dropout=0.5", "pvera": "peft.pvera_dropout=0.5", "lora": "peft.dropout=0.5"}
    model, backbone = network("tiny", generates=False)
    adapters = Adapters(model, backbone, option(chosen, rate[chosen]))
    adapters.add("default", 0)
    with torch.no_grad():
        for value in adapters.tensors("default").values():
            value.add_(torch.linspace(0.1, 0.3, value.numel()).view_as(value))

    def distinct() -> int:
        ids = torch.arange(9)[None] + 40
        with torch.inference_mode():
            return len({float(adapters.model(input_ids=ids).last_hidden_state.sum()) for _ in range(8)})

    assert distinct() == 1
    adapters.train_mode(True)
    assert distinct() > 1
    wrapped = [m for name, m in adapters.model.named_modules() if name.endswith(".base_layer")]
    assert not any(module.training for module in wrapped)
    adapters.train_mode(False)
    assert distinct() == 1


def test_a_prompt_can_be_switched_off_in_front_of_an_encoder() -> None:
    """peft's own switch fails for networks that cannot generate."""
    model, backbone = network("tiny", generates=False)
    ids = torch.arange(9)[None] + 40
    with torch.inference_mode():
        before = model(input_ids=ids).last_hidden_state
        adapters = Adapters(model, backbone, option("prompt"))
        adapters.add("default", 0)
        assert adapters.model(input_ids=ids).last_hidden_state.shape[1] == 9 + 4
        with adapters.off():
            assert torch.equal(adapters.model(input_ids=ids).last_hidden_state, before)
        assert adapters.model(input_ids=ids).last_hidden_state.shape[1] == 9 + 4


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["frod", "lily", "unilora", "vblora", "vera"])
def test_an_adapter_per_task_is_restored_to_the_bit(chosen: str, make, tmp_path: Path) -> None:
    """Methods with an adapter per task add it again, with another seed, before its tensors are loaded."""
    args = ["method=independent", f"peft={chosen}", "train.epochs=1", *SMALL.get(chosen, [])]
    run, restored = make(*args), make(*args)
    run.learn(0)
    run.learn(1)
    write_tree(tmp_path / "state", {"method": run.method.state_dict()})
    restored.method.load_state_dict(read_tree(tmp_path / "state")["method"])
    batch = run.data.test.batch(np.concatenate([run.data.test.rows_of(task)[:3] for task in range(3)]))
    choices = AnswerSpace(range(12), batch.tasks)
    with torch.inference_mode():
        assert torch.equal(run.method.predict(batch, choices).scores, restored.method.predict(batch, choices).scores)


def test_the_initial_tensors_of_an_adapter_depend_on_the_seed_alone() -> None:
    def initial(seed: int) -> torch.Tensor:
        model, backbone = network("tiny", generates=False)
        adapters = Adapters(model, backbone, option("lokr"))
        adapters.add("default", seed)
        return torch.cat([value.detach().flatten() for value in adapters.tensors("default").values()])

    assert torch.equal(initial(3), initial(3))
    assert not torch.equal(initial(3), initial(4))


def test_a_type_of_ones_own_yaml_is_an_option() -> None:
    assert Peft(name="mine", type="HRA", fields={"r": 2}).traits == METHODS["HRA"]
    assert sorted(set(options("peft")) - set(NAMES)) == ["blocks", "frozen", "none"]
