"""The step: collect, fill, learn."""

from jaxrl_llm.experience import Loss, Method
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.terms import Fill, LossTerm, Reward, Update, View
from jaxrl_llm.training.composition import Resources
from jaxrl_llm.training.networks import Network
from jaxrl_llm.training.segments import Placement
from jaxrl_llm.training.step import TrainStep, make_train_step

__all__ = [
    "Fill",
    "Loss",
    "LossTerm",
    "Method",
    "Network",
    "Placement",
    "Resources",
    "Reward",
    "Rollout",
    "TrainStep",
    "Update",
    "View",
    "make_train_step",
]
