"""The order of samples, blends and splits, document boundaries, and finding out that the data has changed."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core import parallel_state

from megasparse.config import ConfigError, parse_config
from megasparse.megatron.spec import have_transformer_engine
from megasparse.ranks import StorageError
from megasparse.training import datasets
from megasparse.training.data import MicroBatchSampler, StepLoader, document_mask
from megasparse.training.datasets import TokenizerFacts, check_splits, tokenizer_facts
from tests.launch import run_distributed
from tests.training.cases import END, configuration, write_data


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_every_layout_takes_the_same_samples_in_each_step(ranks: int, micro: int) -> None:
    batch, last = 4, 40
    per_step = batch // (ranks * micro)
    streams = [list(MicroBatchSampler(8, micro, rank, ranks, last)) for rank in range(ranks)]
    assert len({len(stream) for stream in streams}) == 1
    for step in range((last - 8) // batch):
        taken = [i for stream in streams for rows in stream[step * per_step : (step + 1) * per_step] for i in rows]
        assert sorted(taken) == list(range(8 + step * batch, 8 + (step + 1) * batch))


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without process groups."""
    for name, value in (("rank", 0), ("world_size", 1)):
        for group in ("data", "context"):
            monkeypatch.setattr(parallel_state, f"get_{group}_parallel_{name}", lambda value=value: value)


def test_reading_ahead_gives_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("tokens", "labels", "loss_mask", "position_ids")
    dataset = [{name: torch.full((4,), index) for name in names} for index in range(10)]
    data = configuration(Path("run"), "data", training={"micro_batch_size": 2, "global_batch_size": 4})
    alone(monkeypatch)
    loader = StepLoader(parse_config(data), dataset, 0, 10, 1, torch.device("cpu"))

    def step() -> list[int]:
        return [int(row[0]) for batch in loader.next_step() for row in batch.tokens]

    loader.look_ahead()
    loader.look_ahead()  # no further than one step
    assert step() == [0, 1, 2, 3]
    assert step() == [4, 5, 6, 7]
    loader.look_ahead()  # two samples are left: no whole step
    with pytest.raises(StopIteration):
        step()


def test_a_step_of_many_micro_batches_finds_files_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pipeline parallelism it has hundreds, each of four tensors, which hold a file open on their way."""
    alone(monkeypatch)
    sections: dict[str, Any] = {"training": {"global_batch_size": 100}, "data": {"num_workers": 1}}
    dataset = [dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.zeros(4)) for _ in range(100)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        loader = StepLoader(
            parse_config(configuration(Path("run"), "data", **sections)), dataset, 0, 100, 1, torch.device("cpu")
        )
        assert len(loader.next_step()) == 100
        loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_document_mask() -> None:
    tokens = torch.tensor([[5, 6, END, 7, 8, 9], [END, 1, 2, 3, 4, END]])
    mask = document_mask(tokens, END)
    assert mask.shape == (2, 1, 6, 6)
    allowed = ~mask[0, 0]
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert (~mask[1, 0])[5].tolist() == [False, True, True, True, True, True]


def test_micro_batches_of_a_step_hold_no_masks(monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
    """A mask is s^2 bytes a sequence: those of a whole step would be gigabytes."""
    alone(monkeypatch)
    length = 64
    tokens = torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(0))
    dataset = [dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), tokens)] * 8
    sections: dict[str, Any] = {
        "training": {"global_batch_size": 8},
        "data": {
            "sequence_length": length,
            "reset_attention_mask": True,
            "tokenizer": str(data_folder / "tokenizer.json"),
            "num_workers": 0,
        },
    }
    cfg = parse_config(configuration(Path("run"), "data", **sections))
    batches = StepLoader(cfg, dataset, 0, 8, 1, torch.device("cpu")).next_step()
    held = {id(value): value.nbytes for batch in batches for value in batch if isinstance(value, torch.Tensor)}
    assert sum(held.values()) <= 8 * 4 * length * 8
    for batch in batches:
        mask = batch.attention_mask()
        assert mask is not None
        assert torch.equal(mask, document_mask(tokens[None], END))


def logits_of_two_documents(data: dict[str, Any]) -> dict[str, Any]:
    """Logits of a sample of two documents before and after a change of the first; and with the mask off."""
    from megasparse.megatron import build_model
    from megasparse.training.data import make_micro_batch
    from megasparse.training.distributed import initialize
    from megasparse.training.launch_environment import read_environment

    results = {}
    for name, reset in (("masked", True), ("unmasked", False)):
        cfg = parse_config(data, [f"data.reset_attention_mask={'true' if reset else 'false'}"])
        device = initialize(cfg, read_environment())
        model = build_model(cfg)[0].eval()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 60, (1, 16), generator=generator)
        tokens[0, 7] = END
        outputs = []
        for _ in range(2):
            sample = {
                "tokens": tokens.clone(),
                "labels": tokens.clone(),
                "loss_mask": torch.ones(1, 16),
                "position_ids": torch.arange(16)[None],
            }
            batch = make_micro_batch(cfg, sample, device)
            with torch.no_grad():
                outputs.append(model(batch.tokens, batch.position_ids, batch.attention_mask()))
            tokens[0, :7] = torch.randint(1, 60, (7,), generator=generator)
        results[name] = [bool(torch.equal(outputs[0][:, s], outputs[1][:, s])) for s in (slice(0, 7), slice(8, 16))]
        from megasparse.training.distributed import shut_down

        shut_down()
    return results


@pytest.mark.parametrize(
    ("implementation", "precision"),
    [
        ("local", "fp32"),
        pytest.param(
            "te",
            "bf16",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine and a GPU"),
            ],
        ),
    ],
)
def test_a_document_does_not_see_the_one_before_it(
    implementation: str, precision: str, tmp_path: Path, data_folder: Path
) -> None:
    data = configuration(
        tmp_path / "run",
        str(data_folder / "a"),
        data={"tokenizer": str(data_folder / "tokenizer.json")},
        training={"precision": precision},
    )
    data["model"] |= {"implementation": implementation, "hidden_size": 64}
    result = run_distributed(1, "tests.training.test_data:logits_of_two_documents", data)[0]
    assert result == {"masked": [False, True], "unmasked": [False, False]}


def test_documents_end_where_the_data_says(tmp_path: Path, data_folder: Path) -> None:
    """The token of `preprocess --eod`, not the one that the tokenizer calls its end."""

    def facts(*ends: int | None) -> TokenizerFacts:
        for index, end in enumerate(ends):
            (tmp_path / f"{index}.json").write_text(json.dumps({"eod": end}))
        data = {
            "blend": [str(tmp_path / str(index)) for index in range(len(ends) or 1)],
            "tokenizer": str(data_folder / "tokenizer.json"),
            "reset_attention_mask": True,
        }
        tokenizer_facts.cache_clear()
        return tokenizer_facts(parse_config(configuration(tmp_path / "run", "", data=data)))

    assert facts().eod == END  # data of other tools
    assert facts(7, 7).eod == 7
    with pytest.raises(ConfigError, match=r"(?s)end their documents with different ones \(\[7, 8\]\).*same --eod"):
        facts(7, 8)
    with pytest.raises(ConfigError, match=r"(?s)it was written without them.*without --no-eod"):
        facts(7, None)


def sample_sources(data: dict[str, Any]) -> dict[str, Any]:
    """Which data set each training sample of a blend comes from, and hashes of what was read, in order."""
    from megasparse.training.data import DataChangedError, check_probes, data_probes
    from megasparse.training.datasets import build_datasets
    from megasparse.training.distributed import initialize, shut_down
    from megasparse.training.launch_environment import read_environment
    from megasparse.training.sources import SourceTokens

    cfg = parse_config(data)
    initialize(cfg, read_environment())
    datasets = build_datasets(cfg)
    train = datasets.train
    sources = [int(train[i]["dataset_id"]) for i in range(len(train))]
    counter = SourceTokens(cfg, train)
    tokens = [counter.metrics(samples) for samples in (7, 7, 40)]
    probes = data_probes(train, 50)
    check_probes(train, probes)
    changed = [(position, text[::-1]) for position, text in probes]
    try:
        check_probes(train, changed)
        message = ""
    except DataChangedError as error:
        message = str(error)
    shut_down()
    valid = [datasets.valid[i]["tokens"].tolist() for i in range(4)]
    known = {tuple(train[i]["tokens"].tolist()) for i in range(len(train))}
    return {"sources": sources, "tokens": tokens, "probes": len(probes), "message": message,
            "overlap": sum(tuple(tokens) in known for tokens in valid)}  # fmt: skip


def test_blend_keeps_its_weights_and_splits_do_not_overlap(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(
        tmp_path / "run",
        str(data_folder / "a"),
        data={"blend": [[0.75, str(data_folder / "a")], [0.25, str(data_folder / "b")]]},
        training={"steps": 50, "eval_steps": 1},
    )
    result = run_distributed(1, "tests.training.test_data:sample_sources", data)[0]
    sources = result["sources"]
    assert sources.count(0) / len(sources) == pytest.approx(0.75, abs=0.02)
    assert sources[:40].count(0) == pytest.approx(30, abs=1)  # everywhere, not only on the whole
    for samples, counted in zip((7, 7, 40), result["tokens"], strict=True):
        of_a = sources[:samples].count(0)
        length = data["data"]["sequence_length"]
        assert counted == {"progress/tokens/a": length * of_a, "progress/tokens/b": length * (samples - of_a)}
    assert result["probes"] == 16
    assert "is not what it was" in result["message"]
    assert result["overlap"] == 0


def lengths_of_blends(data: dict[str, Any], blends: list[list[Any]]) -> list[int]:
    """Validation samples that Megatron's builder gives for each blend."""
    from megasparse.training.datasets import build_datasets
    from megasparse.training.distributed import initialize, shut_down
    from megasparse.training.launch_environment import read_environment

    found = []
    for blend in blends:
        data["data"]["valid"] = blend
        cfg = parse_config(data)
        initialize(cfg, read_environment())
        valid = build_datasets(cfg, train=False).valid
        assert all(len(valid[i]["tokens"]) == 16 for i in range(len(valid)))
        found.append(len(valid))
        shut_down()
    return found


def test_a_few_samples_of_many_small_data_sets(tmp_path: Path, data_folder: Path) -> None:
    """Megatron would index too few of the one with the largest weight."""
    small = [write_data(tmp_path / str(seed), 6, seed) for seed in range(20)]
    blends = [[[weight, small[0]], *([1, prefix] for prefix in small[1:])] for weight in (1, 50, 5000)]
    data = configuration(tmp_path / "run", "", training={"eval_steps": 20})
    data["data"] = {"train": str(data_folder / "a"), "sequence_length": 16, "num_workers": 0}
    lengths = run_distributed(1, "tests.training.test_data:lengths_of_blends", data, blends)[0]
    assert min(lengths) >= 80


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["data/web", "data/code"], ["web", "code"]),
        (["a/train/text", "b/train/text", "b/code"], ["a/train/text", "b/train/text", "b/code"]),
        (["web", "web"], ["web", "web#2"]),
        (["/text", "/x/text"], ["text", "x/text"]),
    ],
)
def test_source_names(prefixes: list[str], names: list[str]) -> None:
    from megasparse.training.sources import source_names

    assert source_names(prefixes) == names


def validate_on(data: dict[str, Any]) -> tuple[int, list[str]]:
    """How many tokens a validation reads that it has read before, and what this rank says of it."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megasparse").addHandler(handler)
    try:
        cfg = parse_config(data)
        valid = datasets.build_datasets(cfg).valid
    finally:
        logging.getLogger("megasparse").removeHandler(handler)
    tokens = torch.cat([valid[i]["tokens"] for i in range(datasets.validation_samples(cfg))])
    return len(tokens) - len(tokens.unique()), told


@pytest.mark.parametrize("blended", [False, True])
def test_a_validation_that_reads_data_again_says_so(tmp_path: Path, blended: bool) -> None:
    """With the number of steps that reads none twice."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, first in (("a", 0), ("b", 10_000)):  # 8,000 different tokens each
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint16)
        for document in range(400):
            builder.add_document(torch.arange(20) + first + 20 * document, [20])
        builder.finalize(f"{tmp_path / name}.idx")

    def read(steps: int) -> tuple[int, list[str]]:
        sections: dict[str, Any] = {"training": {"eval_steps": steps}}
        if blended:
            blend = [[0.75, str(tmp_path / "a")], [0.25, str(tmp_path / "b")]]
            sections["data"] = {"blend": blend, "sequence_length": 16, "split": "90,10,0"}
        data = configuration(tmp_path / "run", str(tmp_path / "a"), **sections)
        (found, told), (_, other) = run_distributed(2, "tests.training.test_data:validate_on", data)
        assert other == []
        return found, told

    repeated, [told] = read(100)
    assert repeated > 0
    assert "400 samples of 16 tokens (training.eval_steps 100 x training.global_batch_size 4)" in told
    assert f"{tmp_path / 'a'} has 49 for {300 if blended else 400}" in told
    enough = int(re.findall(r"training\.eval_steps=(\d+)", told)[0])
    assert read(enough) == (0, [])
    repeated, [told] = read(enough + 1)
    assert repeated > 0
    assert f"training.eval_steps={enough} reads none twice" in told


def build_with_own_disks(data: dict[str, Any], folder: str) -> list[str]:
    """Both ranks believe to be the first of their node, each with a cache directory that the other does not see."""
    import os

    from megasparse.training.datasets import build_datasets
    from megasparse.training.distributed import initialize, shut_down
    from megasparse.training.launch_environment import read_environment

    os.environ["NODE_DISK"] = f"{folder}/node{os.environ['RANK']}"
    cfg = parse_config(data, ["data.cache_dir=$NODE_DISK/cache"])
    initialize(cfg, read_environment())
    datasets = build_datasets(cfg, local_rank=0)
    first = [str(datasets.train[i]["tokens"].tolist()) for i in range(8)]
    shut_down()
    return first


def test_nodes_with_their_own_disks_build_their_own_indices(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"))
    first, second = run_distributed(2, "tests.training.test_data:build_with_own_disks", data, str(tmp_path))
    assert first == second
    files = [sorted(path.name for path in (tmp_path / node / "cache").iterdir()) for node in ("node0", "node1")]
    assert files[0] == files[1]
    assert files[0]


def build_and_build_again_read_only(data: dict[str, Any]) -> list[bool]:
    """Whether a second opening, of a cache that nobody can write to any more, finds what the first had built."""
    import errno

    from megasparse.training.datasets import build_datasets
    from megasparse.training.distributed import initialize, shut_down
    from megasparse.training.launch_environment import read_environment

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    cfg = parse_config(data)
    initialize(cfg, read_environment())
    first = build_datasets(cfg, local_rank=int(os.environ["RANK"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        again = build_datasets(cfg, local_rank=int(os.environ["RANK"]))
    shut_down()
    return [bool((first.train[i]["tokens"] == again.train[i]["tokens"]).all()) for i in range(8)]


def test_indices_in_a_directory_that_cannot_be_written_are_read(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(tmp_path / "run", str(data_folder / "a"))
    for same in run_distributed(2, "tests.training.test_data:build_and_build_again_read_only", data):
        assert all(same)


def test_a_split_without_tokens_is_refused(tmp_path: Path, data_folder: Path) -> None:
    data = configuration(
        tmp_path / "run", str(data_folder / "b"), data={"split": "999,1,0"}, training={"eval_steps": 1}
    )
    with pytest.raises(ConfigError, match=r"data\.split.*leaves no tokens for valid: .*b has 100 documents"):
        check_splits(parse_config(data))


def test_an_index_cut_short_is_built_again(tmp_path: Path, data_folder: Path) -> None:
    """The disk is full, or the job is killed, while the last and largest file of the indices is written."""
    blend = [[0.5, str(data_folder / "a")], [0.5, str(data_folder / "b")]]
    content = configuration(tmp_path / "run", "", data={"blend": blend}, training={"steps": 1000})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"sample indices to \S+cache, failed \(.* written\); make room"):
            datasets.main([str(config)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run" / "cache").glob("*-dataset_index.npy"))
    datasets.main([str(config)])
    datasets.main([str(config)])
    assert not list((tmp_path / "run" / "cache").glob("*.part"))


def read_before_and_after(data: dict[str, Any]) -> list[list[int]]:
    """Tokens of the validation samples of a data set, of another in its place, and of that with a cache of its own."""
    prefix = data["data"]["valid"]
    found = []
    for documents, cache in ((200, "cache"), (20, "cache"), (20, "other")):
        write_data(Path(prefix), documents, seed=documents)
        cfg = parse_config(data, [f"data.cache_dir={prefix}-{cache}"])
        valid = datasets.build_datasets(cfg, train=False).valid
        found.append(torch.cat([valid[i]["tokens"] for i in range(datasets.validation_samples(cfg))]).tolist())
    return found


def test_indices_are_those_of_the_data_that_is_there(tmp_path: Path) -> None:
    """Written anew, or found under the same relative path from another working directory."""
    data = configuration(tmp_path / "run", "", training={"eval_steps": 10})
    prefix = str(tmp_path / "held-out")
    data["data"] = {"train": prefix, "valid": prefix, "sequence_length": 16, "num_workers": 0}
    before, after, expected = run_distributed(1, "tests.training.test_data:read_before_and_after", data)[0]
    assert after == expected != before


def test_the_command_that_builds_indices_explains_mistakes(tmp_path: Path, data_folder: Path) -> None:
    def build(prefix: Path) -> subprocess.CompletedProcess[str]:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(configuration(tmp_path / "run", str(prefix))))
        command = [sys.executable, "-m", "megasparse.training.datasets", str(config), "training.steps=20"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    missing = build(tmp_path / "none")
    assert missing.returncode == 2
    assert "\nmegasparse: " in "\n" + missing.stderr  # after warnings of what was imported
    assert "none.bin" in missing.stderr
    assert "Traceback" not in missing.stderr
    built = build(data_folder / "a")
    assert built.returncode == 0, built.stderr
    assert built.stdout.endswith(f"sample indices: {tmp_path / 'run' / 'cache'}\n")
    assert list((tmp_path / "run" / "cache").glob("*.npy"))
