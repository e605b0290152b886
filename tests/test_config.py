"""Configuration: inheritance, overrides, YAML's scalars, resolved values, origins, every file in configs/."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.config import (
    Config,
    ConfigError,
    L1Config,
    check_files,
    dump_config,
    known_settings,
    load_config,
    load_with_origins,
    parse_config,
)
from megasparse.data.preprocess import PreprocessOptions, preprocess

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1000},
    "training": {"global_batch_size": 8, "steps": 100},
}


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_defaults_and_derived_values() -> None:
    cfg = parse_config(SMALL)
    assert cfg.model.query_groups == 4
    assert cfg.model.head_width == 16
    assert cfg.max_position_embeddings == cfg.data.sequence_length == 2048
    assert cfg.padded_vocab_size() == 1024
    assert cfg.padded_vocab_size(tensor=3) == 1152
    assert cfg.run_directory == Path("runs/run")
    assert cfg.checkpoint_directory == Path("runs/run/checkpoints")
    assert cfg.logging_directory == Path("runs/run")
    assert cfg.cache_directory == Path("runs/run/cache")
    assert cfg.parallel.model_size == 1
    assert cfg.num_microbatches(4) == 2
    assert cfg.data.split_weights == pytest.approx((0.969, 0.03, 0.001))
    with pytest.raises(ValueError, match="frozen"):
        cfg.model.num_layers = 5  # type: ignore[misc]


def test_layers_win_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", {**SMALL, "optimizer": {"lr": 0.1, "min_lr": 0.01, "eps": 1e-6}})
    write(tmp_path / "deep" / "middle.yaml", {"base": "../root.yaml", "optimizer": {"lr": 0.2, "min_lr": 0.02}})
    write(tmp_path / "top.yaml", {"base": "deep/middle.yaml", "optimizer": {"lr": 0.3}})
    loaded = load_with_origins(tmp_path / "top.yaml", ["optimizer.clip_grad=2", "training.steps=7"])
    optimizer = loaded.config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.eps, optimizer.clip_grad) == (0.3, 0.02, 1e-6, 2.0)
    assert loaded.config.training.steps == 7
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    assert origins["optimizer.lr"] == f"{tmp_path / 'top.yaml'}:3"
    assert origins["optimizer.min_lr"].endswith("deep/middle.yaml:4")
    assert origins["optimizer.eps"].startswith(f"{tmp_path}/deep/../root.yaml:")
    assert origins["optimizer.clip_grad"] == "override optimizer.clip_grad=2"
    assert origins["run.name"] == "name of the file"
    assert "optimizer.weight_decay" not in origins
    assert loaded.config.run.name == "top"


def test_a_list_replaces_a_list(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", {**SMALL, "data": {"train": [[1, "a"], [2, "b"]]}})
    write(tmp_path / "top.yaml", {"base": "root.yaml", "data": {"train": ["c", "d"], "valid": "e"}})
    data = load_config(tmp_path / "top.yaml").data
    assert data.train == ((1.0, "c"), (1.0, "d"))
    assert data.valid == ((1.0, "e"),)
    assert data.prefixes == ("c", "d", "e")


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        """
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 256, num_attention_heads: 4, vocab_size: 1_000}
training: {global_batch_size: 0010, steps: 100}
optimizer: {lr: 1e-3, eps: 1E-8, weight_decay: .1}
sparsity: {l1: {mode: off}}
run: {name: 2026_11_20}
logging: {wandb: {tags: [yes, no, on, 7_]}}
"""
    )
    cfg = load_config(path, ["optimizer.min_lr=1e-4", "training.recompute=none"])
    assert cfg.optimizer.lr == 1e-3
    assert cfg.optimizer.eps == 1e-8
    assert cfg.optimizer.weight_decay == 0.1
    assert cfg.optimizer.min_lr == 1e-4
    assert cfg.model.vocab_size == 1000
    assert cfg.training.global_batch_size == 10
    assert cfg.sparsity.l1.mode == "off"
    assert cfg.run.name == "2026_11_20"
    assert cfg.logging.wandb.tags == ("yes", "no", "on", "7_")


def test_overrides_take_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", SMALL)
    cfg = load_config(
        path,
        [
            "data.blend=[[0.3, a], [0.7, b]]",
            "model.rope_scaling={factor: 16}",
            "parallel.tensor=2",
            "parallel.sequence_parallel=true",
            "checkpoint.keep_every=null",
            "optimizer.betas=[0.8, 0.9]",
            "run.directory=runs/a=b",
        ],
    )
    assert cfg.data.blend == ((0.3, "a"), (0.7, "b"))
    assert cfg.model.rope_scaling is not None
    assert cfg.model.rope_scaling.factor == 16
    assert cfg.parallel.sequence_parallel
    assert cfg.checkpoint.keep_every is None
    assert cfg.optimizer.betas == (0.8, 0.9)
    assert cfg.run.directory == "runs/a=b"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    assert cfg.run.name == path.stem
    (tmp_path / "resolved.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "resolved.yaml") == cfg
    assert Config.model_validate(cfg.model_dump()) == cfg


@pytest.mark.parametrize(
    "name", ["1e-4", "0089", "2026_11_20", "12", "1_000", "1.5", "off", "yes", "null", "2026-11-20"]
)
def test_a_name_reads_back_as_a_name(name: str, tmp_path: Path) -> None:
    """Also one that only YAML 1.2, which is what is read, takes for a number."""
    cfg = parse_config({**SMALL, "run": {"name": name}})
    (tmp_path / "resolved.yaml").write_text(dump_config(cfg))
    assert load_config(tmp_path / "resolved.yaml") == cfg
    assert yaml.safe_load(dump_config(cfg)) == cfg.model_dump(mode="json")


def test_a_configuration_of_another_version_is_read_without_what_is_unknown() -> None:
    cfg = parse_config({**SMALL, "model": {**SMALL["model"], "rope_scaling": {"factor": 8.0}}})
    saved = cfg.model_dump(mode="json")
    assert known_settings(saved) == (saved, [])
    newer = copy.deepcopy(saved)
    newer["model"]["rope_scaling"]["extra"] = 1
    newer["training"]["novel"] = {"a": 1, "b": 2}
    part, unknown = known_settings(newer)
    assert unknown == ["model.rope_scaling.extra", "training.novel.a", "training.novel.b"]
    assert parse_config(part) == cfg


def test_the_papers_recipe() -> None:
    """Sizes and hyperparameters of arXiv 2603.23198."""
    by_name = {path.stem: load_config(path) for path in CONFIGS}
    layers = [by_name[f"paper-{size}b"].model.num_layers for size in ("0.5", "1", "1.5", "2")]
    assert layers == [8, 18, 28, 38]
    for size in ("0.5", "1", "1.5", "2"):
        cfg = by_name[f"paper-{size}b"]
        model, optimizer = cfg.model, cfg.optimizer
        assert (model.hidden_size, model.ffn_hidden_size, model.num_attention_heads) == (2048, 5632, 32)
        assert (model.vocab_size, model.query_groups, model.rotary_base) == (49152, 32, 1e5)
        assert model.tie_embeddings
        assert model.gated
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == (
            1e-3,
            (0.9, 0.95),
            0.1,
            1,
        )
        assert (optimizer.schedule.kind, optimizer.schedule.warmup_steps, cfg.training.steps) == ("cosine", 600, 30000)
        assert cfg.training.global_batch_size * cfg.data.sequence_length == 512 * 2048
        assert (cfg.sparsity.l1.mode, cfg.sparsity.l1.coeff) == ("constant", 2e-5)
        steered = by_name[f"paper-{size}b-target"]
        assert (steered.sparsity.l1.mode, steered.sparsity.l1.target_l0, steered.sparsity.reinit.every) == (
            "target",
            24,
            50,
        )
        for section in Config.model_fields.keys() - {"run", "sparsity"}:
            assert getattr(steered, section) == getattr(cfg, section)


def test_l1_can_be_turned_off_from_outside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**SMALL, "sparsity": {"l1": {"mode": "target", "target_l0": 20, "gain": 0.1}}})
    off = load_config(path, ["sparsity.l1.mode=off"])
    assert off.sparsity.l1 == L1Config()
    (tmp_path / "resolved.yaml").write_text(dump_config(off))
    assert load_config(tmp_path / "resolved.yaml") == off
    assert load_config(path, ["sparsity.l1.mode=constant"]).sparsity.l1 == L1Config(mode="constant")
    with pytest.raises(ConfigError, match=r"sparsity\.l1\.gain = 0\.2: means nothing with sparsity\.l1\.mode: off"):
        load_config(path, ["sparsity.l1.mode=off", "sparsity.l1.gain=0.2"])


def test_vocabulary_comes_from_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text, some more text " * 20)
    options = PreprocessOptions([str(tmp_path / "in.txt")], tmp_path / "data", train_vocab_size=270)
    size = preprocess(options).vocab_size
    model = {key: value for key, value in SMALL["model"].items() if key != "vocab_size"}
    data = {"blend": str(tmp_path / "data"), "tokenizer": str(tmp_path / "data-tokenizer")}
    cfg = parse_config({**SMALL, "model": model, "data": data})
    assert cfg.vocab_size == size
    check_files(cfg)
    with pytest.raises(ConfigError, match=f"has {size} tokens"):
        parse_config({**SMALL, "model": {**model, "vocab_size": size - 1}, "data": data})
    without = parse_config({**SMALL, "model": model})
    with pytest.raises(ConfigError, match=r"set data\.tokenizer"):
        without.padded_vocab_size()
    with pytest.raises(ConfigError, match=f"the data .* has tokens of a vocabulary of {size}"):
        check_files(
            parse_config({**SMALL, "model": {**model, "vocab_size": size - 1}, "data": {"blend": data["blend"]}})
        )


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, text in (("a", "some text of one kind " * 20), ("b", "1234 5678 quite another kind " * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
        preprocess(PreprocessOptions([str(tmp_path / f"{name}.txt")], tmp_path / name, train_vocab_size=265))

    def check(**data: Any) -> None:
        check_files(parse_config({**SMALL, "data": {k: str(tmp_path / v) for k, v in data.items()}}))

    check(train="a", valid="a", tokenizer="a-tokenizer")
    with pytest.raises(ConfigError, match=r"data\.valid = .*b': made with another tokenizer"):
        check(train="a", valid="b")
    with pytest.raises(ConfigError, match="a-tokenizer"):
        check(train="b", tokenizer="a-tokenizer")


def test_fp8_where_every_size_fits() -> None:
    """Two sequences of 24 tokens are three times 16; what concerns fp8 alone is no matter without it."""
    fits = ["data.sequence_length=24", "training.micro_batch_size=2"]
    for recipe in ("delayed", "tensorwise", "blockwise"):
        cfg = parse_config(SMALL, [*fits, "training.fp8=hybrid", f"training.fp8_recipe={recipe}"])
        assert (cfg.training.fp8, cfg.training.fp8_recipe) == ("hybrid", recipe)
    blocks = ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.hidden_size=128"]
    parse_config(SMALL, ["training.fp8=e4m3", "training.fp8_recipe=blockwise", "data.sequence_length=256", *blocks])
    assert parse_config(SMALL, ["data.sequence_length=40"]).training.fp8 == "off"
