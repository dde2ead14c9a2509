"""Folders as people have them: served as transformers reads them, or refused with what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.architecture import load_config, longest_sequence
from hvp_core.model.huggingface.checkpoint import build_empty
from hvp_core.model.loading import load_shard, locate
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
)

from tests.core.problems import CPU, gpt2_config, llama_config, scatter
from tests.core.test_checkpoint import load

attention.register()  # the configs of the models below name it
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def written(model: PreTrainedModel, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A model in float64 as transformers writes it."""
    scatter(model.double(), seed)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(LlamaForCausalLM(llama_config()), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(llama_folder: Path, tmp_path: Path) -> Path:
    """A tied Llama's folder, to be changed."""
    return Path(shutil.copytree(llama_folder, tmp_path / "llama"))


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WHOLE)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, folder / WHOLE)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters that the ranks would hold, by name."""
    model = build_empty(folder, torch.float64)
    sources = locate(model, folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    space = ParameterSpace(Layout(shapes, [tuple(shapes)], 1), Alone(), torch.float64, CPU)
    flat = space.to_flat(load_shard(space, sources))
    return {each.name: flat[each.offset :][: each.numel] for each in space.layout.parameters}


def theirs(folder: Path) -> PreTrainedModel:
    """The folder as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def agree(folder: Path, like: Path | None = None) -> None:
    """Hold that what is read is what transformers reads, bit for bit."""
    own = dict(theirs(like or folder).named_parameters())
    parameters = read(folder)
    assert list(parameters) == list(own)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, own[name].detach().flatten()), name


def losses(
    folder: Path, ids: torch.Tensor, labels: torch.Tensor | None = None
) -> tuple[float, Any]:
    """The loss that is served and transformers' own, whose norms and logits are in float32."""
    labels = ids if labels is None else labels
    model = theirs(folder)
    own = float(model(input_ids=ids, labels=labels, return_dict=True).loss.detach())
    chain, space, parameters = load(folder)
    loss = Curvature(chain, space, parameters, token_batch(ids, labels), 2).loss()
    return loss, pytest.approx(own, rel=1e-6)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(24, shape, generator=torch.Generator().manual_seed(3))


def refusal(folder: Path) -> CurvatureError:
    with pytest.raises(CurvatureError) as caught:
        locate(build_empty(folder, torch.float64), folder)
    return caught.value


# Which files ------------------------------------------------------------------------------------


def other_llama(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of another model of the same shape."""
    model = LlamaForCausalLM(llama_config()).double()
    scatter(model, seed=2)
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def leave_shards(folder: Path) -> None:
    """Shards and index of another model, as an earlier save leaves them."""
    tensors = other_llama(folder)
    names = list(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_whole_model_counts_before_shards_that_an_earlier_save_left(llama: Path) -> None:
    leave_shards(llama)
    agree(llama)


def test_shards_are_those_of_the_index(llama: Path) -> None:
    leave_shards(llama)
    (llama / WHOLE).rename(llama / "zz-copy.safetensors")
    agree(llama)


@pytest.mark.parametrize("name", ["zz.safetensors", "consolidated.safetensors"])
def test_other_weights_beside_the_model_do_not_count(llama: Path, name: str) -> None:
    save_file(other_llama(llama), llama / name)
    (llama / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    (llama / "adapter_model.safetensors").write_bytes(b"")
    agree(llama)


def test_a_config_may_name_the_file_of_its_weights(llama: Path) -> None:
    save_file(other_llama(llama), llama / "mine.safetensors")
    agree(configure(llama, transformers_weights="mine.safetensors"))


def test_an_index_may_name_a_tied_head_that_no_shard_holds(llama: Path) -> None:
    leave_shards(llama)
    (llama / WHOLE).unlink()
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-2.safetensors"
    (llama / INDEX).write_text(json.dumps(index))
    agree(llama)


def test_a_tensor_in_two_shards_is_refused_with_both_named(llama: Path) -> None:
    leave_shards(llama)
    (llama / WHOLE).unlink()
    extra = load_file(llama / "model-1.safetensors")
    name = next(iter(extra))
    both = load_file(llama / "model-2.safetensors") | {name: extra[name] + 1}
    save_file(both, llama / "model-2.safetensors")
    error = refusal(llama)
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert all(part in error.message for part in (name, "model-1", "model-2"))


def test_two_files_of_which_neither_is_the_model_are_refused(llama: Path) -> None:
    (llama / WHOLE).rename(llama / "a.safetensors")
    save_file(other_llama(llama), llama / "b.safetensors")
    assert refusal(llama).reason == "CHECKPOINT_FILES_INVALID"


# Which class ------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_task_is_refused_with_the_task(tmp_path: Path) -> None:
    tagger = written(LlamaForTokenClassification(llama_config()), tmp_path)
    error = refusal(tagger)
    assert error.reason == "TASK_UNSUPPORTED"
    assert error.metadata["class"] == "LlamaForTokenClassification"
    assert "token classification" in error.message


@pytest.mark.parametrize(
    ("names", "reason", "said"),
    [
        (["LlamaForTokenClassification"], "TASK_UNSUPPORTED", "token classification"),
        (["BertForMaskedLM"], "TASK_UNSUPPORTED", "masked language modelling"),
        (["T5ForConditionalGeneration"], "TASK_UNSUPPORTED", "sequence-to-sequence"),
        (["GPT2DoubleHeadsModel"], "TASK_UNSUPPORTED", "GPT2DoubleHeadsModel"),
        (["MistralForCausalLM"], "CONFIG_INVALID", "model_type"),
        (["LlamaForTelepathy"], "ARCHITECTURE_UNKNOWN", "LlamaForTelepathy"),
        ("LlamaForCausalLM", "CONFIG_INVALID", "list"),
    ],
)
def test_the_class_that_the_config_names_decides(
    llama: Path, names: Any, reason: str, said: str
) -> None:
    error = refusal(configure(llama, architectures=names))
    assert error.reason == reason
    assert said in error.message


@pytest.mark.parametrize(
    "names", [None, [], ["LlamaModel"], ["LLaMAForCausalLM"], ["MyLlamaForCausalLM"]]
)
def test_names_of_the_same_function_are_served(llama: Path, names: list[str] | None) -> None:
    agree(configure(llama, architectures=names))


@pytest.mark.parametrize(
    ("kind", "name", "task"),
    [
        ("t5", "T5ForConditionalGeneration", "sequence-to-sequence"),
        ("vit", "ViTForImageClassification", "image classification"),
    ],
)
def test_a_type_without_causal_language_models_is_refused_with_its_task(
    tmp_path: Path, kind: str, name: str, task: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [name]}))
    error = refusal(tmp_path)
    assert error.reason == "TASK_UNSUPPORTED"
    assert task in error.message


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=24,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    error = refusal(written(BertModel(config), tmp_path))
    assert error.reason == "TASK_UNSUPPORTED"
    assert "encoder" in error.message


def test_code_beside_a_class_of_transformers_is_left_alone(llama: Path) -> None:
    """Falcon, Phi-3 and DeepSeek are published so."""
    (llama / "mine.py").write_text("raise SystemExit('this is never run')")
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    agree(configure(llama, auto_map=code))


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "chatglm"}, {"model_type": "vit"}, {"architectures": ["MyForCausalLM"]}],
)
def test_a_class_that_only_remote_code_has_is_refused(llama: Path, changes: dict[str, Any]) -> None:
    code = {"AutoModelForCausalLM": "mine.Model"}
    assert refusal(configure(llama, auto_map=code, **changes)).reason == "REMOTE_CODE_REFUSED"


def test_settings_that_do_not_change_the_function_do_not_matter(llama: Path) -> None:
    ids = tokens(2, 6)
    before, expected = losses(llama, ids)
    configure(
        llama,
        return_dict=False,  # with which transformers' own forward fails
        output_attentions=True,
        output_hidden_states=True,
        use_cache=True,
        torchscript=True,
        gradient_checkpointing=True,
    )
    chain, space, parameters = load(llama)
    after = Curvature(chain, space, parameters, token_batch(ids), 2).loss()
    assert before == after == expected


@pytest.mark.parametrize(
    ("key", "settings", "scheme"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"load_in_8bit": True}, "bitsandbytes"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
        ("text_config", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_quantised_weights_are_refused_with_their_scheme(
    llama: Path, key: str, settings: Any, scheme: str
) -> None:
    error = refusal(configure(llama, **{key: settings}))
    assert error.reason == "QUANTIZATION_UNSUPPORTED"
    assert error.metadata["scheme"] == scheme
    assert scheme in error.message


def test_an_empty_quantisation_is_none(llama: Path) -> None:
    agree(configure(llama, quantization_config=None))


# Which tensors ----------------------------------------------------------------------------------


TIED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied by its config": lambda: LlamaForCausalLM(llama_config()),
    "gpt2, tied by default": lambda: GPT2LMHeadModel(gpt2_config()),
}


@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_a_stored_head_that_differs_from_the_embedding_is_a_parameter_of_its_own(
    tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    model = make()
    folder = written(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if model.config.model_type == "gpt2":
        config.pop("tie_word_embeddings", None)  # silent about it
    (folder / "config.json").write_text(json.dumps(config))
    agree(folder)
    tensors = load_file(folder / WHOLE)
    head = model.get_output_embeddings().weight.detach().clone()
    save_file(tensors | {"lm_head.weight": head}, folder / WHOLE)
    agree(folder)  # an equal copy is the same tensor
    assert "lm_head.weight" not in read(folder)
    head[3, 1] += 1.0
    save_file(tensors | {"lm_head.weight": head}, folder / WHOLE)
    agree(folder)
    assert "lm_head.weight" in read(folder)
    loss, expected = losses(folder, tokens(2, 6))
    assert loss == expected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_training_script_wrapped_are_recognised(
    llama: Path, llama_folder: Path, prefix: str
) -> None:
    rename(llama, lambda name: prefix + name)
    agree(llama, like=llama_folder)


def test_a_layer_that_was_compiled_or_wrapped_alone_is_recognised(
    llama: Path, llama_folder: Path
) -> None:
    rename(llama, lambda name: name.replace("layers.1.", "layers.1._orig_mod."))
    agree(llama, like=llama_folder)


def test_two_stored_names_of_one_parameter_are_refused(llama: Path) -> None:
    tensors = load_file(llama / WHOLE)
    name = "model.norm.weight"
    save_file(tensors | {name.removeprefix("model."): tensors[name] + 1}, llama / WHOLE)
    error = refusal(llama)
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert "norm.weight in" in error.message


def test_one_parameter_that_is_stored_as_two_is_refused(llama: Path) -> None:
    model = build_empty(llama, torch.float64)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(CurvatureError, match=r"layers\.1\.mlp") as caught:
        locate(model, llama)
    assert caught.value.reason == "CHECKPOINT_FILES_INVALID"
    tensors = load_file(llama / WHOLE)
    same = {name: tensors[name.replace("layers.1.mlp", "layers.0.mlp")] for name in tensors}
    save_file({name: tensor.clone() for name, tensor in same.items()}, llama / WHOLE)
    assert locate(model, llama)


def test_a_padded_vocabulary_is_refused_with_what_to_set(llama: Path) -> None:
    error = refusal(configure(llama, vocab_size=17))
    assert error.reason == "TENSOR_SHAPE_MISMATCH"
    assert "set vocab_size in config.json to 24" in error.message
    agree(configure(llama, vocab_size=24))


def test_a_base_models_names_need_no_prefix(llama_folder: Path, llama: Path) -> None:
    rename(llama, lambda name: name.removeprefix("model."))
    agree(llama, like=llama_folder)
    agree(llama)


def test_a_body_with_a_tied_head_is_a_whole_model(tmp_path: Path) -> None:
    agree(written(LlamaModel(llama_config()), tmp_path))


def test_stored_dtypes_may_differ_from_tensor_to_tensor(llama: Path) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    tensors = load_file(llama / WHOLE)
    mixed = {
        name: tensor.to(dtypes[number % 4]) for number, (name, tensor) in enumerate(tensors.items())
    }
    save_file(mixed, llama / WHOLE)
    agree(llama)


def test_tensors_that_no_parameter_takes_may_be_empty(llama: Path) -> None:
    extra = {"rotary.inv_freq": torch.zeros(0), "value_head.weight": torch.zeros(3, 0)}
    save_file(load_file(llama / WHOLE) | extra, llama / WHOLE)
    agree(llama)


def test_a_folder_of_links_under_a_long_name_of_any_letters_that_nobody_may_write_is_read(
    llama: Path, tmp_path: Path
) -> None:
    """A hub cache on a shared disk."""
    blobs = Path(shutil.copytree(llama, tmp_path / "blobs"))
    folder = tmp_path.joinpath("schön 模型 'q'", *["long" * 50] * 4)
    folder.mkdir(parents=True)
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(os.path.relpath(blob, folder))
    folder.chmod(0o555)
    try:
        agree(folder)
    finally:
        folder.chmod(0o755)


# Which config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_spellings_of_rope_scaling_and_a_head_dim_of_null_are_read(
    llama: Path, kind: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    config.pop("rope_parameters")
    (llama / "config.json").write_text(json.dumps(config))
    scaling = {kind: "linear", "factor": 2.0}
    configure(llama, rope_scaling=scaling, rope_theta=10000.0, head_dim=None)
    read = build_empty(llama, torch.float64).config
    assert read.rope_parameters == theirs(llama).config.rope_parameters
    assert read.rope_parameters["factor"] == 2.0
    assert read.head_dim == 2


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "default"}, 8),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1}, 8),
        ({"rope_type": "linear", "factor": 2.0}, 16),
        ({"rope_type": "dynamic", "factor": 2.0}, 8),  # its frequencies follow the length
    ],
)
def test_scaled_positions_reach_as_far_as_they_are_scaled(
    llama: Path, scaling: dict[str, Any], longest: int
) -> None:
    rope = scaling | {"rope_theta": 10000.0}
    config, _ = load_config(configure(llama, max_position_embeddings=8, rope_parameters=rope))
    assert longest_sequence(config) == longest


def test_a_sequence_that_yarn_covers_has_transformers_loss(llama: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "rope_theta": 10000.0,
    }
    configure(llama, max_position_embeddings=8, rope_parameters=rope)
    loss, expected = losses(llama, tokens(2, 30))
    assert loss == expected


# Which batch ------------------------------------------------------------------------------------


def test_one_target_in_four_rows_is_the_whole_loss(llama: Path) -> None:
    ids = tokens(4, 5)
    labels = torch.full_like(ids, -100)
    labels[2, 3] = 7
    loss, expected = losses(llama, ids, labels)
    assert loss == expected


def test_a_vocabulary_of_one_has_no_loss_and_no_curvature(tmp_path: Path) -> None:
    config = llama_config()
    config.vocab_size, config.bos_token_id, config.eos_token_id = 1, None, None
    written(LlamaForCausalLM(config), tmp_path)
    chain, space, parameters = load(tmp_path)
    curvature = Curvature(
        chain, space, parameters, token_batch(torch.zeros(2, 4, dtype=torch.long)), 1
    )
    assert curvature.loss() == 0
    assert not curvature.gradient().any()
    (product,) = curvature.hvp([space.random(1, "rademacher")])
    assert not product.any()
