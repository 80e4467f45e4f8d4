"""The step, the loop, supervised fine-tuning and checkpoints."""

from jaxrl_llm.training.composition import Rollout
from jaxrl_llm.training.credit import CreditTerm
from jaxrl_llm.training.learn import LossTerm, Update
from jaxrl_llm.training.score import RewardTerm
from jaxrl_llm.training.step import TrainStep, make_train_step
from jaxrl_llm.training.supervised import demonstrations, make_supervised_step

__all__ = [
    "CreditTerm",
    "LossTerm",
    "RewardTerm",
    "Rollout",
    "TrainStep",
    "Update",
    "demonstrations",
    "make_supervised_step",
    "make_train_step",
]
