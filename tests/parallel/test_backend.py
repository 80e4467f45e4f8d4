"""What programs are told of the device that they are made for."""

import jax
import pytest

from jaxrl_llm.parallel.backend import OVERLAPPED_ON_GPUS, backend_in_use, compiler_options, planned_for


class Devices:
    def __init__(self, size):
        self.size = size


@pytest.mark.parametrize(
    "platform, mesh, told",
    [("gpu", Devices(8), True), ("gpu", Devices(1), False), ("gpu", None, False), ("tpu", Devices(8), False)],
)
def test_several_gpus_communicate_while_they_compute(platform, mesh, told):
    with planned_for(platform):
        assert backend_in_use() == platform
        assert compiler_options(mesh) == (OVERLAPPED_ON_GPUS if told else None)


def test_the_compiler_knows_these_options():
    jax.jit(lambda x: x + 1, compiler_options=dict(OVERLAPPED_ON_GPUS)).lower(1.0).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_nothing"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_enable_nothing": True}).lower(1.0).compile()
