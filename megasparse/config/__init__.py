"""YAML configuration: `load_config(path, overrides) -> Config`. Imports nothing else of this package."""

from megasparse.config.errors import ConfigError, Problem
from megasparse.config.inputs import check_directories, check_files
from megasparse.config.loader import (
    LoadedConfig,
    Origin,
    dump_config,
    load_config,
    load_with_origins,
    parse_config,
)
from megasparse.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    Fp8Recipe,
    L1Config,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReinitConfig,
    RopeScaling,
    RunConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainingConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Fp8Recipe",
    "L1Config",
    "LoadedConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Origin",
    "ParallelConfig",
    "Problem",
    "ReinitConfig",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "SparsityConfig",
    "TrainingConfig",
    "WandbConfig",
    "check_directories",
    "check_files",
    "dump_config",
    "load_config",
    "load_with_origins",
    "parse_config",
]
