"""Import and export of weights: equal to `transformers`, slice by slice, on many devices; damaged files are refused.

`loaded_on_a_mesh` is run as a script in a process with four virtual CPU devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrl_llm
from jaxrl_llm.models import (
    LoraConfig,
    LowRank,
    add_adapters,
    load_adapters,
    load_model,
    load_params,
    logical_axes,
    merged,
    save_adapters,
    save_imported,
    save_model,
)
from jaxrl_llm.models.adapters import OF_EXPERTS, TARGETS
from jaxrl_llm.models.checkpoint_files import INDEX, stored_tensors
from jaxrl_llm.models.export import shard_plan
from jaxrl_llm.models.families import text_part
from jaxrl_llm.models.tensor_names import leaves
from jaxrl_llm.models.weights import leaf_slice, stored_model

TIED, UNTIED = "qwen3 tied", "llama"


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def logits_of(theirs, batch):
    import torch

    with torch.no_grad():
        return theirs(
            torch.tensor(batch.tokens),
            attention_mask=torch.tensor(batch.mask.astype(int)),
            position_ids=torch.tensor(np.maximum(batch.positions, 0)),
        ).logits.numpy()


def from_pretrained(directory):
    import transformers

    # Without the original files, the text part of a vision-language model is exported as a text-only model.
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(directory, attn_implementation="eager")
    if any(getattr(model.config.get_text_config(), name, None) for name in ("num_experts_per_tok", "top_k_experts")):
        model.set_experts_implementation("eager")
    return model


def text_class(checkpoint) -> str:
    """Names of the text part of a vision-language model."""
    return text_part(json.loads((checkpoint.directory / "config.json").read_text()))[0]


def assert_same_weights(one, other):
    """Equal bits of the weights that the text model of `one` has."""
    one, other = one.state_dict(), other.state_dict()
    assert len(one) > 8
    for name, weight in one.items():
        found = [key for key in other if key == name or key.replace("model.language_model.", "model.") == name]
        assert len(found) == 1, name
        assert np.array_equal(weight.numpy(), other[found[0]].numpy()), name


def test_an_export_gives_transformers_the_same_logits_and_us_the_same_weights(exported, batch, tmp_path):
    before = logits_of(exported.theirs, batch)
    # In several files with an index and the original config.json, and in one file with a config.json of ours.
    save_model(
        tmp_path / "many", exported.params, exported.model.config, source=exported.directory, max_shard_bytes=9999
    )
    save_model(tmp_path / "one", exported.params, exported.model.config)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert (tmp_path / "many" / "generation_config.json").exists()
    assert [file.name for file in sorted((tmp_path / "one").iterdir())] == ["config.json", "model.safetensors"]
    for name in ("many", "one"):
        theirs = from_pretrained(tmp_path / name)
        # If two families describe the same config, our file may name the other one, whose products have other shapes.
        # Even equal weights may give other last bits: sums in torch depend on where the weights lie in memory.
        if name == "many" or type(theirs).__name__ in (type(exported.theirs).__name__, text_class(exported)):
            assert_same_weights(theirs, exported.theirs)
        assert np.abs(logits_of(theirs, batch) - before)[batch.mask].max() < 1e-4
        model, params = load_model(tmp_path / name, **exported.execution)
        assert model.config == exported.model.config
        same(params, exported.params)


@pytest.mark.parametrize("case", ["gemma3 with vision", "qwen2.5 with vision"])
def test_what_is_not_text_is_carried_along_bit_for_bit(case, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(case)
    with pytest.warns(UserWarning, match="only its text model is used"):
        model, params = load_model(checkpoint.directory)
    before = {name: tensor.read((...,)) for name, tensor in stored_tensors(checkpoint.directory).items()}
    assert sum("language_model" not in name and "lm_head" not in name for name in before) > 5
    # From the files directly, and through orbax.
    save_imported(tmp_path / "imported", params, source=checkpoint.directory)
    same(load_params(tmp_path / "imported", model.config), params)
    save_model(tmp_path / "one", params, model.config, source=checkpoint.directory)
    same({name: tensor.read((...,)) for name, tensor in stored_tensors(tmp_path / "one").items()}, before)
    save_model(tmp_path / "two", params, model.config, source=tmp_path / "imported")
    theirs, again = checkpoint.theirs.state_dict(), from_pretrained(tmp_path / "two").state_dict()
    same({name: weight.numpy() for name, weight in again.items()}, {n: w.numpy() for n, w in theirs.items()})


def test_weights_in_mxfp4_are_read_block_by_block_and_written_as_they_are_meant(make_checkpoint, tmp_path):
    """The experts of a tiny gpt-oss as blocks and scales, compared with `transformers`."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    checkpoint = make_checkpoint("gpt_oss", hidden_size=64, intermediate_size=32, num_attention_heads=6)
    directory, meant = copied(checkpoint.directory, tmp_path / "packed"), {}
    rng = np.random.default_rng(0)

    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
            scales = rng.integers(120, 128, (experts, outputs, inputs // 32)).astype(np.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            unpacked = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
            meant[name] = unpacked.numpy()

    rewritten(directory, pack)
    with pytest.raises(ValueError, match=r"surplus: .*_proj_blocks"):
        load_model(directory)
    edited(directory, quantization_config={"quant_method": "mxfp4"})
    model, params = load_model(directory)
    assert len(meant) == 2 * model.config.layers
    save_model(tmp_path / "plain", params, model.config, source=directory)
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in written
    plain = stored_tensors(tmp_path / "plain")
    for name, expected in meant.items():
        np.testing.assert_array_equal(plain[name].read((...,)), expected, err_msg=name)
    layout, stored = stored_model(directory, model.config)
    box = (slice(1, 2), slice(2, 4), slice(33, 40), slice(0, 2), slice(3, 30))
    read = leaf_slice(layout, "blocks/gate_up", box, stored, np.float32)
    np.testing.assert_array_equal(read, np.asarray(params["blocks"]["gate_up"])[box])
    rewritten(directory, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("_scales"))))
    with pytest.raises(ValueError, match=r"MXFP4 weights have no .*_scales; copy all files"):
        load_model(directory)


def _packed_words(numbers, bits, axis, order):
    """Integers packed into 32-bit words along an axis; number `order[i]` is in the i-th place from the lowest bits."""
    count = 32 // bits
    numbers = np.moveaxis(np.asarray(numbers, np.uint32), axis, -1)
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // count), np.uint32)
    for place, number in enumerate(order):
        words |= numbers[..., number::count] << np.uint32(place * bits)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def _packed(kind, weight, rng, bits=4, group=8):
    """(tensors by name suffix, the dequantised matrix) for a matrix [outputs, inputs]."""
    outputs, inputs = weight.shape
    if kind == "fp8":
        import ml_dtypes

        values = weight.astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.5, 2, (-(-outputs // 7), -(-inputs // 5))).astype(np.float32)
        wide = np.kron(scales, np.ones((7, 5), np.float32))[:outputs, :inputs]
        return {"weight": values, "weight_scale_inv": scales}, values.astype(np.float32) * wide
    numbers = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = rng.integers(0, 2**bits - 1, (inputs // group, outputs))
    scales = rng.uniform(0.1, 1, zeros.shape).astype(np.float16)
    of_input = np.arange(inputs) // group
    order, axis = ([0, 2, 4, 6, 1, 3, 5, 7], 1) if kind == "awq" else (range(32 // bits), 0)
    extra = {}
    if kind == "gptq with an order of its own":
        of_input = rng.permutation(of_input)
        extra = {"g_idx": of_input.astype(np.int32), "bias": np.zeros(outputs, np.float16)}
    words, packed_zeros = _packed_words(numbers, bits, axis, order), _packed_words(zeros, bits, 1, order)
    meant = (numbers - (zeros + (kind != "awq"))[of_input]) * scales[of_input].astype(np.float32)
    return {"qweight": words, "qzeros": packed_zeros, "scales": scales} | extra, np.ascontiguousarray(meant.T)


@pytest.mark.parametrize(
    "kind, described",
    [
        ("fp8", {"quant_method": "fp8", "weight_block_size": [7, 5]}),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
        ("gptq", {"quant_method": "gptq", "bits": 8, "group_size": 8}),
        ("gptq with an order of its own", {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}),
    ],
)
def test_weights_of_few_bits_are_read_as_what_they_mean(kind, described, make_checkpoint, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    directory, rng = copied(make_checkpoint("llama", **sizes).directory, tmp_path / "model"), np.random.default_rng(0)
    plain = copied(directory, tmp_path / "plain")
    meant = {}

    def pack(tensors):
        for name in [name for name in tensors if "_proj." in name]:
            weight, module = tensors.pop(name), name.removesuffix(".weight")
            parts, meant[name] = _packed(kind, weight, rng, described.get("bits", 4))
            tensors.update({f"{module}.{end}": part for end, part in parts.items()})

    rewritten(directory, pack)
    rewritten(plain, lambda tensors: tensors.update({name: x.astype(np.float32) for name, x in meant.items()}))
    edited(directory, quantization_config=described)
    same(load_model(directory)[1], load_model(plain)[1])
    layout, stored = stored_model(directory, load_model(plain)[0].config)
    box = (slice(1, 2), slice(3, 29), slice(0, 2), slice(1, 3), slice(2, 7))
    read = leaf_slice(layout, "blocks/qkv", box, stored, np.float32)
    np.testing.assert_array_equal(read, np.asarray(load_model(plain)[1]["blocks"]["qkv"])[box])
    if kind != "fp8":  # which safetensors.numpy cannot read
        rewritten(directory, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("scales"))))
        with pytest.raises(ValueError, match=r"quantised weights have no .*scales; copy all files"):
            load_model(directory)
    edited(directory, quantization_config={"quant_method": "awq", "bits": 3})
    with pytest.raises(ValueError, match="quant_method 'awq', bits 3; supported are fp8"):
        load_model(directory)


def test_experts_in_one_tensor_are_read_as_those_in_many(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("qwen3_5_moe")
    directory = copied(checkpoint.directory, tmp_path / "model")

    def join(tensors):
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts"
            one = lambda expert, part: tensors.pop(f"{prefix}.{expert}.{part}_proj.weight")  # noqa: B023, E731
            both = [np.concatenate([one(expert, "gate"), one(expert, "up")]) for expert in range(5)]
            tensors[f"{prefix}.gate_up_proj"] = np.stack(both)
            tensors[f"{prefix}.down_proj"] = np.stack([one(expert, "down") for expert in range(5)])
        tensors["mtp.fc.weight"] = np.ones((2, 2), np.float32)

    rewritten(directory, join)
    same(load_model(directory)[1], checkpoint.params)


def test_layers_that_predict_further_tokens_are_passed_over(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("glm4_moe")
    directory = copied(checkpoint.directory, tmp_path / "model")
    rewritten(directory, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}))
    edited(directory, num_nextn_predict_layers=1)
    same(load_model(directory)[1], checkpoint.params)
    edited(directory, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"surplus: model\.layers\.3\.eh_proj\.weight"):
        load_model(directory)


def test_the_bias_of_a_choice_stays_in_float32(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("glm4_moe")
    save_model(tmp_path / "half", checkpoint.params, checkpoint.model.config, dtype="bfloat16")
    _, params = load_model(tmp_path / "half")
    assert params["blocks"]["router"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["blocks"]["selection_bias"], checkpoint.params["blocks"]["selection_bias"])


ADAPTED = ["llama biased, linear rope", "phi3 partly rotated", "glm4_moe", "deepseek_v3"]


def tensors_of(directory, params, config, source):
    save_model(directory, params, config, source=source)
    return {name: tensor.read((...,)) for name, tensor in stored_tensors(directory).items()}


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_go_out_as_peft_has_them_and_come_back(case, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(case)
    config, source, blocks = checkpoint.model.config, checkpoint.directory, checkpoint.params["blocks"]
    targets = tuple(name for name in TARGETS if name in blocks and not ("router" in blocks and name in OF_EXPERTS))
    if "router" in blocks:
        of_experts = add_adapters(checkpoint.params, LoraConfig(1, 1.0, targets=("down",)), jax.random.key(0))
        with pytest.raises(ValueError, match="the experts have adapters, which PEFT has no place for"):
            save_adapters(tmp_path / "no", of_experts, config, LoraConfig(1, 1.0), source=source)
    lora = LoraConfig(rank=2, alpha=3.0, targets=targets, rank_stabilised=case == "glm4_moe")
    rng = np.random.default_rng(0)
    drawn = jax.eval_shape(lambda params: add_adapters(params, lora, jax.random.key(0)), checkpoint.params)
    shaped = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), drawn)
    fill = lambda node, leaf: LowRank(leaf, node.down, node.up, node.scale) if isinstance(node, LowRank) else leaf  # noqa: E731
    params = jax.tree.map(fill, shaped, checkpoint.params, is_leaf=lambda node: isinstance(node, LowRank))
    save_adapters(tmp_path / "peft", params, config, lora, source=source)
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (2, 3.0, "LORA")
    # W + scale B A, as PEFT merges them.
    before = tensors_of(tmp_path / "before", checkpoint.params, config, source)
    after = tensors_of(tmp_path / "after", merged(params), config, source)
    adapters = {name: tensor.read((...,)) for name, tensor in stored_tensors(tmp_path / "peft").items()}
    for name, weight in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        change = 0.0
        if f"{module}.lora_A.weight" in adapters:
            change = lora.scale * adapters.pop(f"{module}.lora_B.weight") @ adapters.pop(f"{module}.lora_A.weight")
        np.testing.assert_allclose(after[name], weight + change, rtol=1e-4, atol=1e-4, err_msg=name)
    assert not adapters
    again = load_adapters(tmp_path / "peft", checkpoint.params, config, source=source)
    same(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, params))
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_adapters(tmp_path / "peft", params, config, lora, source=source)
    with pytest.raises(ValueError, match="the parameters have no adapters"):
        save_adapters(tmp_path / "none", checkpoint.params, config, lora, source=source)


def test_adapters_of_peft_that_have_a_matrix_each_come_in_side_by_side(make_checkpoint, tmp_path):
    from safetensors.numpy import save_file

    checkpoint = make_checkpoint("qwen3 tied")
    config, source = checkpoint.model.config, checkpoint.directory
    before = tensors_of(tmp_path / "before", checkpoint.params, config, source)
    rng = np.random.default_rng(0)
    adapters, expected = {}, dict(before)
    for name, weight in before.items():
        # Queries and values of all layers but the first.
        if name.endswith(("q_proj.weight", "v_proj.weight")) and ".layers.0." not in name:
            down, up = rng.standard_normal((2, weight.shape[1])), rng.standard_normal((weight.shape[0], 2))
            module = "base_model.model." + name.removesuffix(".weight")
            adapters |= {
                f"{module}.lora_A.weight": down.astype(np.float32),
                f"{module}.lora_B.weight": up.astype(np.float32),
            }
            expected[name] = weight + 0.5 * up @ down
    directory = tmp_path / "peft"
    directory.mkdir()

    def write(extra=(), **fields):
        described = {"peft_type": "LORA", "r": 2, "lora_alpha": 1.0} | fields
        (directory / "adapter_config.json").write_text(json.dumps(described))
        save_file(adapters | dict(extra), directory / "adapter_model.safetensors")

    write()
    params = load_adapters(directory, checkpoint.params, config, source=source)
    assert params["blocks"]["qkv"].down.shape[-1] == 4
    assert not isinstance(params["blocks"]["down"], LowRank)
    after = tensors_of(tmp_path / "after", merged(params), config, source)
    for name, weight in expected.items():
        np.testing.assert_allclose(after[name], weight, rtol=1e-4, atol=1e-5, err_msg=name)
    for fields, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA'"),
        ({"use_dora": True}, "use_dora True, which is not supported"),
    ):
        write(**fields)
        with pytest.raises(ValueError, match=message):
            load_adapters(directory, checkpoint.params, config, source=source)
    write({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 36), np.float32)})
    with pytest.raises(ValueError, match=r"has no place for: base_model\.model\.lm_head"):
        load_adapters(directory, checkpoint.params, config, source=source)


def test_any_box_of_any_leaf_can_be_read_by_itself(thorough):
    layout, stored = stored_model(thorough.directory, thorough.model.config)
    rng = np.random.default_rng(0)
    for path, leaf in leaves(jax.device_get(thorough.params)).items():
        for _ in range(4):
            starts = [int(rng.integers(0, size)) for size in leaf.shape]
            stops = [int(rng.integers(start, size)) + 1 for start, size in zip(starts, leaf.shape, strict=True)]
            box = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
            np.testing.assert_array_equal(leaf_slice(layout, path, box, stored, np.float32), leaf[box], err_msg=path)


class Counting:
    """A stored tensor that counts how many of its numbers are read."""

    def __init__(self, tensor, counts):
        self.tensor, self.counts = tensor, counts

    def read(self, ranges):
        read = self.tensor.read(ranges)
        self.counts.append(read.size)
        return read


@pytest.mark.parametrize("case", [UNTIED, "mixtral", "phi3 partly rotated"])
def test_nothing_outside_a_slice_is_read(case, make_checkpoint):
    checkpoint = make_checkpoint(case)
    layout, tensors = stored_model(checkpoint.directory, checkpoint.model.config)
    axes = leaves(logical_axes(checkpoint.model.specs))
    counts: list[int] = []
    stored = {name: Counting(tensor, counts) for name, tensor in tensors.items()}
    split = 0
    for path, shape in layout.shapes.items():
        for axis, name in enumerate(axes[path]):
            if name is None or shape[axis] < 3:
                continue
            counts.clear()
            box = tuple(slice(0, size // 3 if i == axis else size) for i, size in enumerate(shape))
            read = leaf_slice(layout, path, box, stored, np.float32)
            assert sum(counts) == read.size, (path, name)
            split += 1
    assert split > 10


def loaded_on_a_mesh(directory: str, out: str) -> None:
    """Load every leaf split over the first axis that four devices divide, and export it from there."""
    mesh = jax.make_mesh((4,), ("shard",), axis_types=(AxisType.Auto,))

    def split(spec):
        axis = next((i for i, size in enumerate(spec.shape) if size % 4 == 0), None)
        return NamedSharding(mesh, P(*[None] * axis, "shard") if axis is not None else P())

    model, _ = load_model(directory)
    params = load_params(directory, model.config, sharding=jax.tree.map(split, model.specs))
    embedding = params["blocks"]["qkv"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 4
    save_model(out, params, model.config, source=directory)


@pytest.mark.parametrize("case", ["qwen3_moe"])
def test_a_model_is_read_into_a_mesh_and_written_from_it(case, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(case)
    root = str(Path(jaxrl_llm.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, str(checkpoint.directory), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    same(load_params(tmp_path / "out", checkpoint.model.config), checkpoint.params)


def test_bfloat16_comes_in_and_goes_out_bit_for_bit(make_checkpoint, tmp_path):
    import torch

    checkpoint = make_checkpoint(UNTIED)
    config = checkpoint.model.config
    save_model(tmp_path / "half", checkpoint.params, config, source=checkpoint.directory, dtype="bfloat16")
    model, params = load_model(tmp_path / "half")
    assert (model.config.parameter_dtype, model.config.compute_dtype) == ("bfloat16", "bfloat16")
    same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), checkpoint.params))
    theirs = from_pretrained(tmp_path / "half")
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(theirs.lm_head.weight.float().detach(), params["unembedding"].astype(jnp.float32))
    save_model(tmp_path / "again", params, model.config, source=tmp_path / "half")
    for name, tensor in stored_tensors(tmp_path / "again").items():
        assert tensor.dtype == "BF16", name
    wide, _ = load_model(tmp_path / "half", parameter_dtype="float32")
    same(
        load_params(tmp_path / "half", wide.config),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), checkpoint.params),
    )


def test_the_files_that_came_with_a_model_go_with_it(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(TIED)
    source = copied(checkpoint.directory, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f'{{"this": "is {name}"}}')
    (source / "training_state.txt").write_text("not of the model")
    written = save_model(tmp_path / "out", checkpoint.params, checkpoint.model.config, source=source)
    assert [file.name for file in written] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert after == before


def test_an_export_is_whole_or_not_there(make_checkpoint, tmp_path, monkeypatch):
    import safetensors.numpy

    checkpoint = make_checkpoint(UNTIED)
    arguments = (checkpoint.params, checkpoint.model.config)

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_model(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    save_model(tmp_path / "out", *arguments)
    with pytest.raises(ValueError, match="exists and is not empty; export to a new directory"):
        save_model(tmp_path / "out", *arguments)
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_model(tmp_path / "new", *arguments, max_shard_bytes=0)
    blocks = checkpoint.params["blocks"] | {"down": jnp.zeros((1, 2, 3))}
    misfit = checkpoint.params | {"blocks": blocks, "final_norm": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"do not fit the config at blocks/down, final_norm"):
        save_model(tmp_path / "new", misfit, checkpoint.model.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_files_are_filled_in_order():
    sizes = {"a": 4, "b": 4, "c": 4}
    assert shard_plan(sizes, 8) == [["a", "b"], ["c"]]
    assert shard_plan(sizes, 1) == [["a"], ["b"], ["c"]]
    assert shard_plan(sizes, 100) == [["a", "b", "c"]]


def copied(directory: Path, to: Path) -> Path:
    to.mkdir()
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def rewritten(directory: Path, change) -> None:
    """Change the tensors of model.safetensors in place."""
    from safetensors.numpy import load_file, save_file

    tensors = dict(load_file(directory / "model.safetensors"))
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edited(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def broken(make_checkpoint, tmp_path):
    """A copy of an untied checkpoint, for damaging."""
    return copied(make_checkpoint(UNTIED).directory, tmp_path / "model")


@pytest.fixture
def sharded(make_checkpoint, tmp_path):
    """The same in several files."""
    checkpoint = make_checkpoint(UNTIED)
    save_model(tmp_path / "sharded", checkpoint.params, checkpoint.model.config, max_shard_bytes=20_000)
    return tmp_path / "sharded"


def test_missing_surplus_and_misshaped_tensors_are_all_named_at_once(broken):
    def change(tensors):
        tensors["model.norm.bias"] = np.zeros(36, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(35, np.float32)
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((36, 36), np.int32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((18, 36), np.float64)

    rewritten(broken, change)
    with pytest.raises(ValueError, match="tensors do not fit") as error:
        load_model(broken)
    message = str(error.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, lm_head.weight" in message
    assert "1 surplus: model.norm.bias" in message
    assert "1 mis-shaped: model.layers.0.input_layernorm.weight (has (35,), needs (36,))" in message
    assert "model.layers.2.self_attn.k_proj.weight (F64), model.layers.2" not in message
    assert "2 of a data type other than BF16, F32, F16" in message
    assert "self_attn.q_proj.weight (I32)" in message
    assert "self_attn.k_proj.weight (F64)" in message


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(TIED)
    directory = copied(checkpoint.directory, tmp_path / "model")
    rewritten(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    same(load_model(directory)[1], checkpoint.params)
    rewritten(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(directory)
    edited(directory, tie_word_embeddings=False)
    params = load_model(directory)[1]
    np.testing.assert_array_equal(params["unembedding"], params["embedding"] + 1)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(broken, make_checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(broken, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    same(load_model(broken)[1], make_checkpoint(UNTIED).params)


@pytest.mark.parametrize("left", [0, 5, 100, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(broken, left):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged .*copy the file again"):
        load_model(broken)


def test_a_file_of_something_else_is_refused(broken):
    (broken / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="is cut off or damaged"):
        load_model(broken)


def test_an_index_that_does_not_fit_its_files_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    tensor, file = next(iter(index["weight_map"].items()))

    def write(**change):
        (sharded / INDEX).write_text(json.dumps(index | change))

    write(weight_map=index["weight_map"] | {"nothing": file})
    with pytest.raises(ValueError, match=rf"nothing \(listed in {file}, not there\)"):
        load_model(sharded)
    write(weight_map={name: where for name, where in index["weight_map"].items() if name != tensor})
    with pytest.raises(ValueError, match=rf"{tensor} \(in {file}, not listed\)"):
        load_model(sharded)
    write(weight_map=index["weight_map"] | {"x": "../outside.safetensors"})
    with pytest.raises(ValueError, match=r"names files outside its directory: \.\./outside\.safetensors"):
        load_model(sharded)
    write(weight_map=index["weight_map"] | {"x": "shard.bin"})
    with pytest.raises(ValueError, match=r"shard\.bin: pickle files are not read"):
        load_model(sharded)
    write(weight_map={})
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(sharded)
    write()
    (sharded / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {file}, which .* does not hold; copy all files"):
        load_model(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match=r"but no model\.safetensors\.index\.json"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_files_are_refused(broken, name):
    (broken / "model.safetensors").unlink()
    (broken / name).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=f"{name}: pickle files are not read"):
        load_model(broken)
    with pytest.raises(ValueError, match=f"{name}: pickle files are not read"):
        stored_tensors(broken / name)


def test_paths_that_are_not_there_are_named(broken, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model path .*nowhere does not exist; give the directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file, not a directory"):
        stored_tensors(broken / "config.json")
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_model(broken)
    (broken / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds list"):
        load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(broken)
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(broken)


def test_a_tree_of_shardings_must_be_that_of_the_parameters(make_checkpoint):
    checkpoint = make_checkpoint(UNTIED)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="the tree of shardings has embedding, but the parameters are"):
        load_params(checkpoint.directory, checkpoint.model.config, sharding={"embedding": one})


if __name__ == "__main__":
    loaded_on_a_mesh(*sys.argv[1:])
