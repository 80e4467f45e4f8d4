"""Tasks, tokenizers and prompts, data sets and the input pipeline."""

from __future__ import annotations

from jaxrl_llm.data import tasks
from jaxrl_llm.data.builder import DataSet, DataSpec, data_set, fingerprint
from jaxrl_llm.data.encoding import Tokenizer, encode_prompts
from jaxrl_llm.data.handbook import with_handbook
from jaxrl_llm.data.hf_tokenizer import (
    HuggingFaceTokenizer,
    load_tokenizer,
    require_embedding,
    with_chat,
    with_prompt_format,
)
from jaxrl_llm.data.jsonl import Fields, fields_of, read_records
from jaxrl_llm.data.order import Batches
from jaxrl_llm.data.pipeline import (
    EvaluationBatch,
    PromptBatch,
    SupervisedBatch,
    evaluation_batches,
    prompt_batches,
    supervised_batches,
)
from jaxrl_llm.data.splits import (
    ProblemSet,
    Refining,
    mixture,
    problem_sets,
    with_column,
    with_examples,
    with_templates,
)
from jaxrl_llm.data.tasks import Item, Task, reference_response, split_of
from jaxrl_llm.data.tokenizer import CharacterTokenizer

__all__ = [
    "Batches",
    "CharacterTokenizer",
    "DataSet",
    "DataSpec",
    "EvaluationBatch",
    "Fields",
    "HuggingFaceTokenizer",
    "Item",
    "ProblemSet",
    "PromptBatch",
    "Refining",
    "SupervisedBatch",
    "Task",
    "Tokenizer",
    "data_set",
    "encode_prompts",
    "evaluation_batches",
    "fields_of",
    "fingerprint",
    "load_tokenizer",
    "mixture",
    "problem_sets",
    "prompt_batches",
    "read_records",
    "reference_response",
    "require_embedding",
    "split_of",
    "supervised_batches",
    "tasks",
    "with_chat",
    "with_column",
    "with_examples",
    "with_handbook",
    "with_prompt_format",
    "with_templates",
]
