"""Policy, reference and value networks: pure functions over parameter pytrees."""

from jaxrl_llm.models.adapter_files import load_adapters, save_adapters
from jaxrl_llm.models.adapters import (
    LoraConfig,
    LowRank,
    add_adapters,
    lora,
    merged,
    without_adapters,
)
from jaxrl_llm.models.attention import attend, attention_in_use
from jaxrl_llm.models.decoder import attention_path, forward, observed_forward, transformer
from jaxrl_llm.models.experts import ExpertsConfig, load_balancing_loss
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.families import FAMILIES, config_from_json, config_to_json
from jaxrl_llm.models.functions import from_functions
from jaxrl_llm.models.heads import (
    HeadConfig,
    at_last,
    from_policy,
    head_outputs,
    head_specs,
    init_head,
    positions_of,
    sequence_reward,
    token_outputs,
)
from jaxrl_llm.models.imported import save_imported
from jaxrl_llm.models.int8 import Quantised, dequantised, quantised
from jaxrl_llm.models.laws import check_model
from jaxrl_llm.models.layer_kinds import DeltaConfig, LatentConfig
from jaxrl_llm.models.linen import from_linen
from jaxrl_llm.models.logprobs import (
    TokenStatistics,
    entropy_of,
    positions_per_chunk,
    scaled_log_softmax,
    token_statistics,
)
from jaxrl_llm.models.merging import (
    averaged,
    balanced_initialisation,
    dropped_and_rescaled,
    elected,
    selected,
    spherical,
    task_arithmetic,
)
from jaxrl_llm.models.model import Model, Trained
from jaxrl_llm.models.parameters import ParameterSpec, abstract, initialise, logical_axes, parameter_count
from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.models.sequence_classifiers import load_reward_model, save_reward_model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.models.weights import load_config, load_model, load_params

__all__ = [
    "FAMILIES",
    "DeltaConfig",
    "ExpertsConfig",
    "HeadConfig",
    "LatentConfig",
    "LoraConfig",
    "LowRank",
    "Model",
    "ParameterSpec",
    "Quantised",
    "RopeScaling",
    "TokenStatistics",
    "Trained",
    "TransformerConfig",
    "abstract",
    "add_adapters",
    "at_last",
    "attend",
    "attention_in_use",
    "attention_path",
    "averaged",
    "balanced_initialisation",
    "check_model",
    "config_from_json",
    "config_to_json",
    "dequantised",
    "dropped_and_rescaled",
    "elected",
    "entropy_of",
    "forward",
    "from_functions",
    "from_linen",
    "from_policy",
    "head_outputs",
    "head_specs",
    "init_head",
    "initialise",
    "load_adapters",
    "load_balancing_loss",
    "load_config",
    "load_model",
    "load_params",
    "load_reward_model",
    "logical_axes",
    "lora",
    "merged",
    "observed_forward",
    "parameter_count",
    "positions_of",
    "positions_per_chunk",
    "quantised",
    "save_adapters",
    "save_imported",
    "save_model",
    "save_reward_model",
    "scaled_log_softmax",
    "selected",
    "sequence_reward",
    "spherical",
    "task_arithmetic",
    "token_outputs",
    "token_statistics",
    "transformer",
    "without_adapters",
]
