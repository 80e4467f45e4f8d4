"""Tasks, the built-in tokenizer, stored data sets and the input pipeline."""

from __future__ import annotations

from jaxrl_llm.data import tasks
from jaxrl_llm.data.builder import DataSet, DataSpec, TaskItems, data_set, fingerprint
from jaxrl_llm.data.encoding import Tokenizer, encode_prompts
from jaxrl_llm.data.pipeline import (
    Batches,
    EvaluationBatch,
    PromptBatch,
    SupervisedBatch,
    evaluation_batches,
    prompt_batches,
    supervised_batches,
)
from jaxrl_llm.data.tasks import Item, Task, reference_response, split_of
from jaxrl_llm.data.tokenizer import CharacterTokenizer

__all__ = [
    "Batches",
    "CharacterTokenizer",
    "DataSet",
    "DataSpec",
    "EvaluationBatch",
    "Item",
    "PromptBatch",
    "SupervisedBatch",
    "Task",
    "TaskItems",
    "Tokenizer",
    "data_set",
    "encode_prompts",
    "evaluation_batches",
    "fingerprint",
    "prompt_batches",
    "reference_response",
    "split_of",
    "supervised_batches",
    "tasks",
]
