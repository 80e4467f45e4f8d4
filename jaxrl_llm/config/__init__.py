"""Configuration: typed frozen dataclasses, read from YAML, with dotted overrides and errors that suggest a remedy."""

from jaxrl_llm.config.compared import OF_ENVIRONMENTS, differences, numeric_tree, placement_tree
from jaxrl_llm.config.errors import FREE, PLACEMENT, ConfigError
from jaxrl_llm.config.inputs import (
    BranchConfig,
    DataConfig,
    FewShotConfig,
    HandbookConfig,
    ModelConfig,
    PretrainedConfig,
    RowsConfig,
    SourceConfig,
    TaskConfig,
    WarmStartConfig,
)
from jaxrl_llm.config.method import (
    AdapterConfig,
    EngineConfig,
    NetworkConfig,
    RolloutConfig,
    StopWhenConfig,
    TrainingConfig,
)
from jaxrl_llm.config.operation import (
    AboutConfig,
    CheckpointConfig,
    EvaluationConfig,
    FaultsConfig,
    MeshConfig,
    ReportingConfig,
)
from jaxrl_llm.config.parsing import (
    as_tree,
    load_config,
    parse_config,
    read_tree,
    stage_trees,
)
from jaxrl_llm.config.whole import Config

__all__ = [
    "FREE",
    "OF_ENVIRONMENTS",
    "PLACEMENT",
    "AboutConfig",
    "AdapterConfig",
    "BranchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "FewShotConfig",
    "HandbookConfig",
    "MeshConfig",
    "ModelConfig",
    "NetworkConfig",
    "PretrainedConfig",
    "ReportingConfig",
    "RolloutConfig",
    "RowsConfig",
    "SourceConfig",
    "StopWhenConfig",
    "TaskConfig",
    "TrainingConfig",
    "WarmStartConfig",
    "as_tree",
    "differences",
    "load_config",
    "numeric_tree",
    "parse_config",
    "placement_tree",
    "read_tree",
    "stage_trees",
]
