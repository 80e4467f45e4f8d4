"""A model's directory: local first, a repository's snapshot else; nothing here touches the network."""

from __future__ import annotations

import fnmatch
import json

import huggingface_hub
import pytest

from jaxrl_llm.hub import model_directory

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def model(directory, **config):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What was asked of the hub; its snapshot is a local directory."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(model(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_local_directory_is_never_looked_up(tmp_path, asked, monkeypatch):
    assert model_directory(model(tmp_path / "owner" / "name")) == tmp_path / "owner" / "name"
    monkeypatch.chdir(tmp_path)
    assert str(model_directory("owner/name")) == "owner/name"
    assert not asked


def test_a_repository_is_downloaded_without_pickles(tmp_path, asked):
    found = model_directory("owner/name-1.5B", revision="abc", cache_dir=tmp_path / "cache")
    assert found == tmp_path / "snapshot"
    (_, first), (name, options) = asked
    assert not any(fnmatch.fnmatch("model.safetensors", pattern) for pattern in first["allow_patterns"])
    assert (name, options["revision"], options["cache_dir"]) == ("owner/name-1.5B", "abc", tmp_path / "cache")

    def fetched(file):
        allowed = any(fnmatch.fnmatch(file, pattern) for pattern in options["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in options["ignore_patterns"])

    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "config.json"]
    assert all(map(fetched, [*wanted, "generation_config.json", "chat_template.jinja"]))
    unwanted = ["pytorch_model.bin", "model.pt", "weights.pth", "x.pkl", "code.py", "consolidated.safetensors"]
    assert not any(map(fetched, [*unwanted, "original/model.safetensors", "README.md"]))


@pytest.mark.parametrize(
    "config", [{"architectures": ["GPT2LMHeadModel"]}, {"quantization_config": {"bits": 4}}, {"hidden_act": "relu"}]
)
def test_what_is_not_supported_is_refused_before_weights_are_downloaded(tmp_path, monkeypatch, config):
    asked = []

    def snapshot_download(name, **options):
        asked.extend(options["allow_patterns"])
        return str(model(tmp_path / "snapshot", **config))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ValueError, match=r"'owner/name' is not supported, and no weights were downloaded: config\.json"
    ):
        model_directory("owner/name")
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)
    # A plan needs the sizes alone, and whoever reads them refuses them.
    assert model_directory("owner/name", weights=False)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./x", "~/no/such/model", "name", "a/b/c", "owner/", "../name"])
def test_a_path_that_does_not_exist(path, asked):
    with pytest.raises(ValueError, match="does not exist"):
        model_directory(path)
    assert not asked


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("bad name")])
def test_a_repository_that_cannot_be_had(monkeypatch, error):
    def snapshot_download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=rf"'owner/name' is not a local directory, and .*{error.args[0]}"):
        model_directory("owner/name")


def test_errors_of_the_hub_are_among_those_that_are_explained():
    from huggingface_hub import errors

    for kind in (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError):
        assert issubclass(kind, (OSError, ValueError))


def test_what_is_no_model_directory(tmp_path, asked):
    with pytest.raises(ValueError, match=r"has no config.json"):
        model_directory(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        model_directory(tmp_path / "file")
    with pytest.raises(ValueError, match=r"revision is 'main', but .* is a local directory"):
        model_directory(model(tmp_path), revision="main")
