"""Every mistake in a configuration gives a message that names file and line, key, value, rule and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasparse.config import ConfigError, check_directories, check_files, check_space, load_config, parse_config
from megasparse.data.index_file import DatasetWriter
from tests.test_config import SMALL
from tests.training.cases import write_data

MODEL = "model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 256, num_attention_heads: 4, vocab_size: 1000}\n"
GOOD = MODEL + "training: {global_batch_size: 8, steps: 100}\n"


def message(call: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def of_file(tmp_path: Path, text: str, *overrides: str) -> str:
    (tmp_path / "a.yaml").write_text(text)
    return message(load_config, tmp_path / "a.yaml", overrides)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("modle: {}", ["a.yaml:3: modle: unknown key", "did you mean model?"]),
        (
            "optimizer: {learning_rate: 1}",
            ["a.yaml:3: optimizer.learning_rate: unknown key", "optimizer has: lr, min_lr"],
        ),
        ("parallel: {tensr: 2}", ["parallel.tensr: unknown key", "did you mean parallel.tensor?"]),
        (
            "optimizer: {warmup_steps: 3}",
            ["unknown key", "sparsity.l1.warmup_steps or optimizer.schedule.warmup_steps"],
        ),
        ("data: {seq_length: 3}", ["did you mean data.sequence_length?"]),
        ("parallel: {tensor: '2'}", ["a.yaml:3: parallel.tensor = '2'", "valid integer", "without quotes"]),
        ("parallel: {tensor: 2.0}", ["parallel.tensor = 2.0", "valid integer", "write it as 2"]),
        ("parallel: {tensor: true}", ["parallel.tensor = True", "valid integer"]),
        ("parallel: {tensor: 0}", ["parallel.tensor = 0", "greater than 0"]),
        ("parallel: {sequence_parallel: yes}", ["sequence_parallel = 'yes'", "true or false"]),
        ("parallel: 2", ["parallel = 2: is a section", "parallel has: tensor, pipeline"]),
        ("optimizer: {lr: -1e-3}", ["optimizer.lr = -0.001", "greater than 0"]),
        ("optimizer: {betas: [0.9, 1.0]}", ["optimizer.betas = [0.9, 1.0]", "item 2 should be less than 1"]),
        ("optimizer: {betas: [0.9]}", ["a.yaml:3: optimizer.betas = [0.9]", "item 2 is missing"]),
        ("optimizer: {weight_decay_exclude: [norms]}", ["item 1", "did you mean norm?"]),
        ("training: {precision: fp16}", ["training.precision = 'fp16'", "'bf16' or 'fp32'"]),
        ("data: {blend: [[a, 0.5]]}", ["data.blend = [['a', 0.5]]", "[[weight, prefix], ...]"]),
        ("data: {blend: [0.3, a, 0.7, b]}", ["data.blend = [0.3, 'a', 0.7, 'b']", "[[weight, prefix], ...]"]),
        ("data: {blend: []}", ["data.blend"]),
        ("run: {name: a/b}", ["run.name = 'a/b': may hold letters, digits"]),
        ("run: {name: 7}", ["run.name = 7", """quote it: run.name="'7'" on the command line, '7' in a file"""]),
    ],
)
def test_single_keys(tmp_path: Path, line: str, words: list[str]) -> None:
    text = of_file(tmp_path, (GOOD if not line.startswith("training") else MODEL) + line + "\n")
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensor=3"], ["parallel.tensor = 3", "num_attention_heads = 4", "ffn_hidden_size = 256", "set 255"]),
        (
            ["run.directory=~/x", "data.blend=~/text"],
            [
                "run.directory = '~/x': ~ would be a folder of that name",
                f"write {Path.home()}/x",
                f"{Path.home()}/text",
            ],
        ),
        (["model.num_query_groups=3"], ["model.num_query_groups = 3: does not divide model.num_attention_heads = 4"]),
        (["model.num_query_groups=2", "parallel.tensor=4"], ["does not divide model.num_query_groups = 2"]),
        (
            ["model.num_attention_heads=6"],
            ["model.hidden_size = 64: not a multiple", "set 66, or set model.kv_channels"],
        ),
        (["model.kv_channels=15"], ["even head width"]),
        (["parallel.pipeline=3"], ["model.num_layers = 4: not a multiple of", "3 x 1 = 3", "set 3 layers"]),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], ["2 x 3 = 6", "set 6 layers"]),
        (["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline = 2", "parallel.pipeline is 1"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel = True", "parallel.tensor > 1"]),
        (["parallel.context=3"], ["data.sequence_length = 2048", "not a multiple of 6", "set 2046"]),
        (
            ["parallel.tensor=4", "parallel.sequence_parallel=true", "data.sequence_length=1022"],
            ["multiple of parallel.tensor = 4"],
        ),
        (["model.max_position_embeddings=1024"], ["longer than model.max_position_embeddings = 1024"]),
        (["parallel.context=2", "data.reset_attention_mask=true"], ["not available with context parallelism"]),
        (["parallel.overlap_param_gather=true"], ["distributed_optimizer: true", "overlap_grad_reduce: true"]),
        (["training.recompute_layers=2"], ["means nothing with training.recompute: none"]),
        (["training.recompute=full", "training.recompute_layers=5"], ["a pipeline chunk has 4 layers"]),
        (["training.recompute=some"], ["'none', 'selective' or 'full'"]),
        (["training.fp8=e5m2"], ["'off', 'hybrid' or 'e4m3'"]),
        (["training.fp8=hybrid", "training.fp8_recipe=mxfp8"], ["'delayed', 'tensorwise' or 'blockwise'"]),
        (["training.fp8=hybrid", "training.precision=fp32"], ["training.fp8 = 'hybrid'", "training.precision is fp32"]),
        (["training.fp8=hybrid", "model.implementation=local"], ["model.implementation is local", "auto or te"]),
        (["training.fp8=e4m3", "model.hidden_size=72", "model.kv_channels=16"], ["a multiple of 16", "set 64"]),
        (["training.fp8=e4m3", "model.kv_channels=4", "parallel.tensor=2"], ["attention's output is 8 wide"]),
        (
            ["training.fp8=e4m3", "model.num_query_groups=1", "model.kv_channels=4"],
            ["queries, keys and values is 24 wide"],
        ),
        (
            ["training.fp8=hybrid", "data.sequence_length=40"],
            ["multiple of 16 tokens", "1 x data.sequence_length = 40"],
        ),
        (["training.fp8=hybrid", "data.sequence_length=16", "parallel.context=2"], ["over 2 GPUs is not"]),
        (
            [
                "training.fp8=e4m3",
                "training.fp8_recipe=blockwise",
                "data.sequence_length=128",
                "parallel.tensor=2",
                "parallel.sequence_parallel=true",
            ],
            ["model.hidden_size = 64: blockwise scaling under sequence parallelism", "a multiple of 128 tokens"],
        ),
        (
            ["training={fp8: hybrid, recompute: selective, recompute_modules: [layernorm]}"],
            ["no layernorm under training.fp8_recipe: delayed"],
        ),
        (
            ["training={fp8: hybrid, recompute: selective, recompute_modules: [mlp]}"],
            ["Transformer Engine recomputes the mlp, and only its own", "training.recompute: full"],
        ),
        (["training={cuda_graphs: true, fp8: hybrid}"], ["delayed scaling", "training.fp8_recipe: tensorwise"]),
        (["training={cuda_graphs: true, recompute: full}"], ["is not recomputed", "recompute_modules: [mlp]"]),
        (["training={cuda_graphs: true, recompute: selective}"], ["is not recomputed", "training.cuda_graphs: false"]),
        (["training.cuda_graphs=true", "model.attention_dropout=0.1"], ["model.attention_dropout is 0.1"]),
        (["training.cuda_graphs=true", "data.reset_attention_mask=true"], ["a mask of its own", "one memory"]),
        (["optimizer.schedule.warmup_steps=101"], ["more than training.steps = 100"]),
        (["optimizer.schedule.warmup_steps=100"], ["leaves no step to decay"]),
        (["optimizer.schedule.decay_steps=101"], ["after training.steps = 100"]),
        (["optimizer.schedule.kind=wsd"], ["needs the length of its final decay", "set for example 20"]),
        (
            ["optimizer.schedule={kind: wsd, warmup_steps: 50, decay_steps: 60}"],
            ["longer than training.steps = 100", "set at most 50"],
        ),
        (["optimizer.schedule={kind: constant, decay_steps: 60}"], ["means nothing with kind: constant"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr = 1.0: above optimizer.lr"]),
        (["sparsity.l1.mode=target"], ["sparsity.l1.target_l0 = None", "set for example 5"]),
        (["sparsity.l1={mode: target, target_l0: 257}"], ["more active neurons than model.ffn_hidden_size = 256"]),
        (["sparsity.l1={mode: target, target_l0: [3, 4]}"], ["2 targets for model.num_layers = 4"]),
        (["sparsity.l1={mode: constant, gain: 1}"], ["sparsity.l1.gain = 1.0: means nothing", "set mode: target"]),
        (["sparsity.l1={mode: target, target_l0: 3, decay_to: 1}"], ["set mode: constant, or leave it out"]),
        (["sparsity.l1.coeff=1e-5"], ["means nothing with sparsity.l1.mode: off"]),
        (["sparsity.l1={mode: constant, start_step: 100}"], ["never reached"]),
        (["sparsity.l1={mode: constant, decay_steps: 9}"], ["means nothing without sparsity.l1.decay_start_step"]),
        (["sparsity.l1={mode: constant, decay_to: 1e-6}"], ["means nothing without sparsity.l1.decay_start_step"]),
        (["optimizer.lr=.inf"], ["optimizer.lr", "finite"]),
        (["data.blend=[[.nan, a], [1, b]]"], ["data.blend", "finite"]),
        (["sparsity.l1={mode: constant, warmup_steps: 9, decay_start_step: 8}"], ["end of the warm-up at step 9"]),
        (["data.blend=a", "data.train=b"], ["use blend with split, or train, valid and test"]),
        (["data.valid=b"], ["data.train", "give a blend for training"]),
        (["data.split=1,2"], ["data.split = '1,2'", '"969,30,1"']),
        (["data.split=1e3,30,1"], ["data.split = '1e3,30,1'", "not three plain numbers"]),
        (["data.split=nan,1,1"], ["data.split = 'nan,1,1'", "not three plain numbers"]),
        (["data={blend: a, split: '1,0,0'}"], ["leaves nothing for validation"]),
        (["data={blend: a, split: '0,1,0'}"], ["leaves nothing for training"]),
        (["model.rope_scaling={high_freq_factor: 1}"], ["not above low_freq_factor = 1.0"]),
        (["steps"], ["command line: steps: not an override", "section.key=value"]),
        (["training.steps=[1"], ["training.steps", "not a YAML value"]),
        (
            ["training.stepz=3"],
            ["override training.stepz=3: training.stepz: unknown key", "did you mean training.steps?"],
        ),
    ],
)
def test_rules(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    text = of_file(tmp_path, GOOD, *overrides)
    for word in words:
        assert word in text


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = of_file(tmp_path, GOOD, "parallel.tensor=3", "optimizer.min_lr=1", "data.split=x")
    assert text.startswith("4 problems in the configuration\n")
    text = of_file(tmp_path, "model: {num_layers: 4, hidden: 3}\n")
    for word in ("model.hidden: unknown key", "model.ffn_hidden_size: missing", "training: missing"):
        assert word in text


def test_files(tmp_path: Path) -> None:
    assert "a.yaml:3: not valid YAML" in of_file(tmp_path, GOOD + "optimizer: {lr: 1").replace("yaml: ", "", 1)
    assert "a.yaml:4: training.steps: given twice (first in line 3)" in of_file(
        tmp_path, MODEL + "training:\n  steps: 1\n  steps: 2\n"
    )
    assert "holds a list, not sections" in of_file(tmp_path, "- a\n")
    assert "sections are run, model" in of_file(tmp_path, "- a\n")
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\n")
    assert "cannot be read" in message(load_config, tmp_path / "a.yaml")
    assert f"did you mean {tmp_path / 'a.yaml'}?" in message(load_config, tmp_path / "aa.yaml")


def test_base_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("base: c.yaml\n")
    (tmp_path / "c.yaml").write_text("run: {}\nbase: a.yaml\n")
    text = of_file(tmp_path, "base: b.yaml\n")
    assert "c.yaml:2: base: files build on each other in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml" in text
    assert "a.yaml:1: base = " in of_file(tmp_path, "base: none.yaml\n")
    assert "not the path of one YAML file" in of_file(tmp_path, "base: [b.yaml]\n")
    (tmp_path / "c.yaml").write_text(GOOD + "optimizer: {lr: x}\n")
    assert "c.yaml:3: optimizer.lr = 'x'" in of_file(tmp_path, "base: b.yaml\n"), "the file that set it is named"


def test_world_size() -> None:
    cfg = parse_config(SMALL, ["parallel.tensor=2", "parallel.pipeline=2"])
    cfg.validate(8)
    text = message(cfg.validate, 6)
    assert "6 ranks is not a multiple of tensor x pipeline x context = 2 x 2 x 1 = 4" in text
    assert "training.global_batch_size = 8: not a multiple of micro_batch_size x data-parallel size = 1 x 3" in message(
        cfg.validate, 12
    )
    interleaved = parse_config(SMALL, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    interleaved.validate(8)
    assert "gives 1 micro-batches per step" in message(interleaved.validate, 16)


HIDDEN = """
import os, sys
from pathlib import Path
from megasparse.config import ConfigError, check_directories, check_files, parse_config
from megasparse.config.inputs import existing_parent
from megasparse.start_checks import check_resume
from megasparse.training.checkpoint_files import leftover_bytes
from tests.test_config import SMALL

folder = sys.argv[1]
os.chmod(folder, 0o700 if os.getuid() == 0 else 0)
if os.getuid() == 0:
    os.setuid(65534)
data = {"data": {"blend": folder + "/text", "tokenizer": folder + "/words"}, "checkpoint": {"load": folder + "/old"}}
run = {"run": {"directory": folder + "/runs/a"}}
assert leftover_bytes(Path(folder) / "runs" / "a" / "checkpoints") == 0
for check, sections in ((check_files, data), (check_directories, run), (check_resume, run)):
    try:
        check(parse_config({**SMALL, **sections}))
    except ConfigError as error:
        print(error)
print(existing_parent(Path(folder) / "runs" / "a"))
"""

SHARED = """
import os, sys
from megasparse.config import check_directories, parse_config
from tests.test_config import SMALL

os.setuid(65534) if os.getuid() == 0 else os.chmod(sys.argv[1], 0o555)
check_directories(parse_config({**SMALL, "run": {"directory": sys.argv[2]}, "data": {"cache_dir": sys.argv[1]}}))
"""


def test_indices_that_others_made_need_not_be_writable() -> None:
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, which lies in a folder of this user alone
        Path(place).chmod(0o777)
        cache = Path(place) / "cache"
        cache.mkdir(mode=0o755)
        command = [sys.executable, "-c", SHARED, str(cache), f"{place}/run"]
        empty = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        cache.chmod(0o755)
        (cache / "train-shuffle_index.npy").touch()
        filled = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        cache.chmod(0o755)
    assert f"data.cache_dir = '{cache}': {cache} is not writable" in empty.stderr
    assert filled.returncode == 0, filled.stderr


def test_folders_of_other_users_are_named_as_what_cannot_be_read() -> None:
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, which lies in a folder of this user alone
        Path(place).chmod(0o755)
        folder = Path(place) / "theirs"
        folder.mkdir()
        command = [sys.executable, "-c", HIDDEN, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        folder.chmod(0o700)
    assert done.returncode == 0, done.stderr
    for name in ("text.bin", "text.idx", "words", "old"):
        assert f"{folder}/{name} cannot be read: Permission denied" in done.stdout
    assert f"run.directory = '{folder}/runs/a': {folder} is not writable" in done.stdout
    assert f"{folder}/runs/a/checkpoints cannot be read: Permission denied" in done.stdout
    assert done.stdout.splitlines()[-1] == str(folder)


def test_inputs_are_checked(tmp_path: Path) -> None:
    assert "write one with `megasparse preprocess`" in message(check_files, parse_config(SMALL))
    data = {"blend": str(tmp_path / "absent"), "tokenizer": str(tmp_path / "tokenizer")}
    text = message(check_files, parse_config({**SMALL, "data": data, "checkpoint": {"load": str(tmp_path / "old")}}))
    assert text.startswith("3 problems")
    for word in ("absent.bin and no file", "data.tokenizer", "checkpoint.load"):
        assert word in text
    for name, fix in (
        (f"{tmp_path}/data.bin", "/data: prefixes are without"),
        ("0.3 a 0.7 b", "[[weight, prefix], ...]"),
    ):
        train = write_data(tmp_path / "data", 3, seed=0)
        text = message(check_files, parse_config({**SMALL, "data": {"train": train, "valid": name}}))
        assert text.startswith(f"data.valid = '{name}': no file {name}.bin")
        assert fix in text
    (tmp_path / "file").write_text("")
    text = message(check_directories, parse_config({**SMALL, "run": {"directory": str(tmp_path / "file" / "run")}}))
    assert text.startswith("run.directory = "), "once, though all else lies in there"
    assert f"{tmp_path}/file is not a directory" in text
    check_directories(parse_config({**SMALL, "run": {"directory": str(tmp_path / "new" / "run")}}))
    data = {"blend": write_data(tmp_path / "data", 3, seed=0)}
    check_files(parse_config({**SMALL, "data": data}))
    tokens, index = (tmp_path / "data.bin").read_bytes(), (tmp_path / "data.idx").read_bytes()
    for name, content, rule in (
        ("data.bin", tokens[:-2], f"data.bin has {len(tokens) - 2} bytes, and its index counts {len(tokens)}"),
        ("data.idx", index[:-8], f"data.idx has {len(index) - 8} bytes instead of {len(index)}"),
        ("data.idx", index[:17] + b"\x09" + index[18:], "data.idx holds tokens of type 9, which Megatron does not"),
        ("data.idx", index[:20], "data.idx is not the index of a Megatron data set"),
        ("data.idx", b"version https://git-lfs.github.com/spec/v1", "data.idx is not the index of a Megatron data set"),
    ):
        (tmp_path / name).write_bytes(content)
        text = message(check_files, parse_config({**SMALL, "data": data}))
        assert rule in text
        assert text.endswith("-> copy it again, or write it anew with `megasparse preprocess`")
        (tmp_path / "data.bin").write_bytes(tokens)
        (tmp_path / "data.idx").write_bytes(index)
    (tmp_path / "broken.json").write_text("{}")
    data = {"tokenizer": str(tmp_path / "broken.json")}
    assert "not a readable tokenizer" in message(parse_config, {**SMALL, "data": data})


def test_data_of_another_tool_with_tokens_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    cfg = parse_config({**SMALL, "data": {"blend": str(tmp_path / "data")}})
    size = cfg.vocab_size
    for tokens, there in (
        ([], True),
        ([1, size - 1], True),
        ([size, *range(size), 5], False),
        (range(size + 1), False),
    ):
        writer = DatasetWriter(tmp_path / "data", size)
        writer.add(np.array(tokens, np.int64), [len(tokens)])
        writer.finish()
        if there:
            check_files(cfg)
        else:
            text = message(check_files, cfg)
            assert f"model.vocab_size = {size}: the data {tmp_path}/data has the token {size}" in text
            assert f"set at least {size + 1}" in text


def test_no_room_for_a_checkpoint(tmp_path: Path) -> None:
    check_space(parse_config({**SMALL, "run": {"directory": str(tmp_path / "new" / "run")}}), 1)
    cfg = parse_config({**SMALL, "run": {"directory": str(tmp_path / "a")}})
    text = message(partial(check_space, needed=1 << 60), cfg)
    assert text.startswith(f"checkpoint.directory = '{tmp_path}/a/checkpoints': a checkpoint takes 1.07e+09 GiB")
    assert f"GiB, and {tmp_path} has " in text
    check_space(cfg, 1 << 60, leftovers=1 << 60)


def test_no_room_to_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    cfg = parse_config(
        {**SMALL, "run": {"directory": str(tmp_path / "full")}, "checkpoint": {"directory": str(tmp_path)}}
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0) if "full" in str(path) else usage)
    text = message(check_space, cfg, 1)
    assert text.startswith("run.directory")
    assert f"{tmp_path}/full has 0 GiB free" in text
    assert "checkpoint.directory" not in text
    check_space(cfg, 1, leftovers=1 << 30)  # on the same disk
