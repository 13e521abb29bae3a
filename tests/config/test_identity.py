"""The identity of a run: classes count by name, wherever their module is."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from clpet.config.compose import compose_config
from clpet.config.identity import _identity, portable_signature, register_resolvers, setting, signature


def with_targets(**targets: str) -> Any:
    """The default configuration with other class paths."""
    register_resolvers()
    cfg = compose_config(["method=sequential"])
    OmegaConf.set_struct(cfg, False)
    for group, target in targets.items():
        cfg[group]["_target_"] = target
    return cfg


@pytest.mark.parametrize("path", ["clpet.memory.NoReplay", "clpet.anywhere.else.NoReplay"])
def test_moving_a_class_of_clpet_changes_no_signature(path: str) -> None:
    moved = with_targets(replay=path)
    assert (signature(moved), setting(moved)) == (
        signature(compose_config(["method=sequential"])),
        setting(compose_config(["method=sequential"])),
    )


def test_another_class_or_one_of_a_plugin_has_another_signature() -> None:
    targets = ("clpet.replay.base.NoReplay", "clpet.replay.base.AllReplay", "mine.NoReplay", "other.NoReplay")
    assert len({signature(with_targets(replay=target)) for target in targets}) == 4


def test_an_option_that_was_added_later_counts_only_where_it_is_set() -> None:
    old = OmegaConf.create({"train": {"lr": 0.1}})
    assert signature(OmegaConf.create({"train": {"lr": 0.1, "optimizer": "adamw", "momentum": None}})) == signature(old)
    assert signature(OmegaConf.create({"train": {"lr": 0.1, "optimizer": "muon"}})) != signature(old)


def test_an_objective_is_part_of_the_identity_with_its_options() -> None:
    """The name of an objective of clpet counts as the option of the benchmark that it once was."""
    words = ["method=sequential", "benchmark=files", "data_dir=x"]
    plain = compose_config([*words, "objective=text_to_text"])
    identity = _identity(plain, ())
    assert (identity["benchmark"]["objective"], "objective" in identity) == ("text_to_text", False)
    others = [["objective=classification"], ["objective=preference"], ["objective=preference", "objective.beta=0.5"]]
    assert len({signature(cfg) for cfg in [plain, *(compose_config([*words, *more]) for more in others)]}) == 4
    assert setting(plain) != setting(compose_config([*words, "objective=classification"]))


def test_the_chat_settings_of_a_model_count_for_conversations_only() -> None:
    words = ["method=sequential", "model=tiny_llama", "objective=text_to_text", "data_dir=x"]
    other = "model.chat_template=chatml"
    plain, chat = ([*words, f"benchmark={name}"] for name in ("files", "chat"))
    assert signature(compose_config([*plain, other])) == signature(compose_config(plain))
    assert signature(compose_config([*chat, other])) != signature(compose_config(chat))
    assert signature(compose_config([*plain, "benchmark.chat=last"])) != signature(compose_config(plain))


def test_the_portable_signature_leaves_out_where_data_and_weights_are() -> None:
    def portable(data: str | None, path: str | None, hub: str | None = None, lr: float = 0.1) -> str:
        model = {"hub": hub, "path": path}
        return portable_signature(OmegaConf.create({"data_dir": data, "model": model, "train": {"lr": lr}}))

    plain = OmegaConf.create({"data_dir": None, "model": {"hub": None, "path": None}, "train": {"lr": 0.1}})
    assert portable(None, None) == signature(plain)
    assert portable("/a", "/a/one") == portable("/b", "/b/one") != portable("/b", "/b/two")
    assert portable(None, "/a/x", "org/x") == portable(None, None, "org/x")
    assert portable(None, None, lr=1) != portable(None, None)
