"""Reading models from disk: every way to name and to store them, and what becomes base, task vector and head."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
)

from dfmerge_studies.checkpoints.digest import model_digest
from dfmerge_studies.checkpoints.load import ModelClass, load_model
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.checkpoints.resident import Resident, head_classes, load_resident
from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.encoding import Kind
from tests.models import FAMILIES, make_model, save_model_directory
from tests.project import Project

CLASSES = {
    Kind.TEXT_TO_TEXT: ModelClass.SEQ2SEQ,
    Kind.CAUSAL: ModelClass.CAUSAL,
    Kind.CLASSIFICATION: ModelClass.CLASSIFICATION,
}


def checkpoint(path: Path) -> Checkpoint:
    return resolve(str(path), root=Path("/"), where="spec.yaml: base")


def resident_of(family: str, base: Path, **experts: Path) -> Resident:
    return load_resident(
        checkpoint(base),
        {name: checkpoint(path) for name, path in experts.items()},
        {name: name for name in experts},
        CLASSES[FAMILIES[family].kind],
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def loaded(family: str, path: Path) -> dict[str, Tensor]:
    model = load_model(checkpoint(path), CLASSES[FAMILIES[family].kind], dtype=torch.float32).model
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# Naming.


def test_a_relative_directory_starts_at_the_given_folder_and_an_absolute_one_is_itself(tmp_path: Path) -> None:
    folder = save_model_directory(tmp_path / "models" / "one", "t5")
    assert resolve("models/one", root=tmp_path, where="w").path == folder
    assert resolve("../models/one", root=tmp_path / "models", where="w").path == folder
    assert resolve(str(folder), root=Path("/nowhere"), where="w").path == folder


def test_a_model_may_lie_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "brought_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('looking for files imports nothing')\n")
    save_model_directory(package / "weights" / "one", "t5")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve("package:brought_models/weights/one", root=Path("/nowhere"), where="w")
    assert found.path == package / "weights" / "one"
    assert "brought_models" not in sys.modules
    with pytest.raises(InputError, match="no folder 'two' in the package"):
        resolve("package:brought_models/two", root=tmp_path, where="w")
    with pytest.raises(InputError, match="pip install not-there"):
        resolve("package:not_there/x", root=tmp_path, where="w")


# Storing.


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama-tied"])
def test_sharded_weights_are_the_same_model(tmp_path: Path, family: str) -> None:
    whole = save_model_directory(tmp_path / "whole", family)
    shards = tmp_path / "shards"
    make_model(family).save_pretrained(shards, max_shard_size="10KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert equal(loaded(family, shards), loaded(family, whole))


def test_bin_files_are_read_as_plain_weights(tmp_path: Path) -> None:
    whole = save_model_directory(tmp_path / "whole", "bert")
    pickled = shutil.copytree(whole, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert equal(loaded("bert", pickled), loaded("bert", whole))


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama-tied", "bert"])
def test_a_loaded_model_is_what_from_pretrained_makes_of_its_folder(tmp_path: Path, family: str) -> None:
    folder = save_model_directory(tmp_path / "model", family)
    if family == "gpt2":
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 7}))
    ours = load_model(checkpoint(folder), CLASSES[FAMILIES[family].kind], dtype=torch.float32).model
    theirs = type(ours).from_pretrained(folder)
    assert equal(ours.state_dict(), theirs.state_dict())
    assert equal(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert ours.config.to_diff_dict() == theirs.config.to_diff_dict()
    assert getattr(ours, "generation_config", None) == getattr(theirs, "generation_config", None)
    assert (ours.name_or_path, ours.training) == (theirs.name_or_path, theirs.training)


def test_half_precision_is_widened_as_it_is_read_and_wider_numbers_keep_modules_that_want_them(tmp_path: Path) -> None:
    folder = save_model_directory(tmp_path / "model", "t5", dtype=torch.bfloat16)
    wide = load_model(checkpoint(folder), ModelClass.SEQ2SEQ, dtype=torch.float32).model
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[n].float()) for n, p in wide.named_parameters())
    narrow = load_model(
        checkpoint(save_model_directory(tmp_path / "wide", "t5")), ModelClass.SEQ2SEQ, dtype=torch.float16
    ).model
    theirs = type(narrow).from_pretrained(tmp_path / "wide", dtype=torch.float16)
    assert {p.dtype for p in narrow.parameters()} == {torch.float16, torch.float32}  # T5 keeps `wo` in float32
    assert equal(narrow.state_dict(), theirs.state_dict())


class Runs:
    """Unpickled, it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_code_in_a_bin_file_does_not_run(tmp_path: Path) -> None:
    folder = save_model_directory(tmp_path / "model", "bert")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    torch.save({**tensors, "more": Runs(tmp_path / "owned")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="more than plain weights"):
        loaded("bert", folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff", b""])
def test_a_safetensors_header_of_another_make_is_refused_by_file_name(tmp_path: Path, header: bytes) -> None:
    folder = save_model_directory(tmp_path / "model", "t5")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"model\.safetensors: .*Copy the file again"):
        loaded("t5", folder)


# Digests.


def test_the_same_files_elsewhere_have_the_same_digest(tmp_path: Path) -> None:
    first = save_model_directory(tmp_path / "one", "t5")
    second = shutil.copytree(first, tmp_path / "two")
    (second / "README.md").write_text("moved here")
    (second / "training_args.txt").write_text("lr")
    config = json.loads((second / "config.json").read_text())
    reordered = dict(reversed({**config, "transformers_version": "0.0", "_name_or_path": "/tmp"}.items()))
    (second / "config.json").write_text(json.dumps(reordered))
    assert model_digest(checkpoint(first)) == model_digest(checkpoint(second))


@pytest.mark.parametrize("change", ["weight", "config", "vocabulary"])
def test_whatever_makes_another_model_makes_another_digest(tmp_path: Path, change: str) -> None:
    first = save_model_directory(tmp_path / "one", "t5")
    second = shutil.copytree(first, tmp_path / "two")
    if change == "weight":
        tensors = load_file(second / "model.safetensors")
        tensors["shared.weight"][0, 0] += 1e-3
        save_file(tensors, second / "model.safetensors", {"format": "pt"})
    else:
        file = second / ("config.json" if change == "config" else "tokenizer.json")
        content = json.loads(file.read_text())
        content["changed"] = 1
        file.write_text(json.dumps(content))
    assert model_digest(checkpoint(first)) != model_digest(checkpoint(second))


# Base and task vectors.


def test_a_task_vector_is_the_difference_and_leaves_equal_parameters_out(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "t5")
    expert = shutil.copytree(base, tmp_path / "red")
    tensors = load_file(expert / "model.safetensors")
    changed = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    tensors[changed][1, 2] += 0.5
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    resident = resident_of("t5", base, red=expert)
    (vector,) = resident.task_vectors
    assert list(vector.deltas) == list(resident.names) == list(resident.base) == [changed]
    expected = torch.zeros_like(tensors[changed])
    expected[1, 2] = 0.5
    torch.testing.assert_close(vector.deltas[changed], expected)


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama-tied"])
def test_tied_parameters_appear_once(tmp_path: Path, family: str) -> None:
    base = save_model_directory(tmp_path / "base", family)
    red = save_model_directory(tmp_path / "red", family, seed=1)
    resident = resident_of(family, base, red=red)
    assert "lm_head.weight" not in resident.names
    assert list(resident.names) == [name for name, _ in resident.model.named_parameters()]
    resident.load_scaled_(0, 1.0)
    output, inputs = resident.model.get_output_embeddings(), resident.model.get_input_embeddings()
    assert output.weight is inputs.weight
    expected = loaded(family, red)
    for name, parameter in resident.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-5)


def test_scaling_and_going_back_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "t5")
    resident = resident_of("t5", base, red=save_model_directory(tmp_path / "red", "t5", seed=1))
    resident.load_scaled_(0, 0.3)
    resident.load_base_()
    assert equal({n: p.detach() for n, p in resident.model.named_parameters()}, loaded("t5", base))


def test_buffers_stay_the_bases(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "llama")
    resident = resident_of("llama", base, red=save_model_directory(tmp_path / "red", "llama", seed=1))
    before = {name: buffer.clone() for name, buffer in resident.model.named_buffers()}
    assert before
    resident.load_scaled_(0, 1.0)
    assert equal(dict(resident.model.named_buffers()), before)
    assert not set(before) & set(resident.names)


def test_integer_parameters_are_not_merged() -> None:
    from dfmerge_studies.params import float_parameters

    module = torch.nn.Linear(2, 2)
    module.register_parameter("counts", torch.nn.Parameter(torch.arange(3), requires_grad=False))
    assert list(float_parameters(module)) == ["weight", "bias"]


def test_a_tensor_without_a_place_is_refused_unless_the_base_has_it_too(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "t5")
    red = save_model_directory(tmp_path / "red", "t5", seed=1)

    def add(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "encoder.gate": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})

    add(red)
    with pytest.raises(InputError, match=r"encoder\.gate has no place"):
        resident_of("t5", base, red=red)
    add(base)
    assert resident_of("t5", base, red=red).names


# Heads.


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_heads_are_kept_per_task_with_their_own_number_of_classes(
    project_of: Callable[[str], Project], family: str
) -> None:
    folder = project_of(family).folder
    resident = resident_of(family, folder / "base", red=folder / "red", blue=folder / "blue")
    assert [head_classes(resident.heads[task]) for task in ("red", "blue")] == [3, 2]
    own = {name for head in resident.heads.values() for name in head}
    assert not own & set(resident.names)
    prefix = f"{resident.model.base_model_prefix}."
    assert all(name.startswith(prefix) for name in resident.names)
    expected = {
        "bert": {"classifier"},
        "distilbert": {"pre_classifier", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
    }[family]
    assert {name.rpartition(".")[0] for name in own} == expected


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_an_expert_put_together_again_answers_as_itself(project_of: Callable[[str], Project], family: str) -> None:
    folder = project_of(family).folder
    resident = resident_of(family, folder / "base", red=folder / "red", blue=folder / "blue")
    inputs = torch.tensor([[2, 30, 31, 40, 3]])
    for number, name in enumerate(("red", "blue", "red")):
        resident.load_scaled_(number % 2, 1.0)
        resident.use_head_(name)
        whole = AutoModelForSequenceClassification.from_pretrained(folder / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(resident.model(inputs).logits, whole(inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_base_without_a_pooler_leaves_the_pooler_to_each_task(
    project_of: Callable[[str], Project], tmp_path: Path
) -> None:
    folder = project_of("bert").folder
    config = BertConfig.from_pretrained(folder / "base")
    base = shutil.copytree(folder / "base", tmp_path / "masked")
    BertForMaskedLM(config).save_pretrained(base)
    resident = resident_of("bert", base, red=folder / "red", blue=folder / "blue")
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert pooler <= set(resident.heads["red"])
    assert not pooler & set(resident.names)
    assert head_classes(resident.heads["blue"]) == 2
    inputs = torch.tensor([[2, 30, 31, 40, 3]])
    resident.load_scaled_(1, 1.0)
    resident.use_head_("blue")
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "blue").eval()
    with torch.no_grad():
        torch.testing.assert_close(resident.model(inputs).logits, whole(inputs).logits, rtol=1e-4, atol=1e-4)


# Adapters.


def lora(model: PreTrainedModel, path: Path, seed: int = 0, **settings: Any) -> peft.PeftModel:
    """Save a low-rank adapter with random weights; the model is wrapped in place."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(path)
    return wrapped


def products(path: Path, scale: float, *, transposed: bool = False) -> dict[str, Tensor]:
    """Scale * B @ A of an adapter file, by the name of the parameter that it changes."""
    tensors = load_file(path / "adapter_model.safetensors")
    deltas = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            delta = scale * (b.double() @ a.double())
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            deltas[target] = delta.T if transposed else delta
    return deltas


def test_a_low_rank_adapter_of_gpt2_is_its_product_and_nothing_else(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora(model, tmp_path / "red", target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    resident = resident_of("gpt2", base, red=tmp_path / "red")
    (vector,) = resident.task_vectors
    expected = products(tmp_path / "red", 7 / 3, transposed=True)
    assert set(vector.deltas) == set(expected) == set(resident.names)
    for name, delta in vector.deltas.items():
        torch.testing.assert_close(delta.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_low_rank_adapter_of_a_classifier_brings_its_head(
    project_of: Callable[[str], Project], tmp_path: Path, with_config: bool
) -> None:
    folder = project_of("bert").folder
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=4)
    if with_config:
        model.config.save_pretrained(tmp_path / "red")
    wrapped = lora(model, tmp_path / "red", target_modules=["query", "value"], task_type="SEQ_CLS")
    resident = resident_of("bert", folder / "base", red=tmp_path / "red", blue=folder / "blue")
    red, blue = resident.task_vectors
    expected = products(tmp_path / "red", 7 / 3)
    assert set(red.deltas) == set(expected)
    assert len(blue.deltas) == len(resident.names) > len(red.deltas)
    for name, delta in red.deltas.items():
        torch.testing.assert_close(delta.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert [head_classes(resident.heads[task]) for task in ("red", "blue")] == [4, 2]
    inputs = torch.tensor([[2, 30, 31, 40, 3]])
    resident.load_scaled_(0, 1.0)
    resident.use_head_("red")
    with torch.no_grad():
        torch.testing.assert_close(
            resident.model(inputs).logits, wrapped.eval()(input_ids=inputs).logits, rtol=1e-4, atol=1e-4
        )


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    other = AutoModelForCausalLM.from_pretrained(save_model_directory(tmp_path / "other", "llama"))
    lora(other, tmp_path / "red", target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="does not fit the base"):
        resident_of("gpt2", base, red=tmp_path / "red")


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora(model, tmp_path / "red", target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    file = tmp_path / "red" / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop(min(tensors))
    assert gone.numel()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="lora_A"):
        resident_of("gpt2", base, red=tmp_path / "red")


@pytest.mark.parametrize("damage", ["{", "[]", "\udcff"], ids=["cut short", "a list", "no UTF-8"])
def test_an_adapter_whose_config_is_damaged_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora(model, tmp_path / "red", target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    (tmp_path / "red" / "adapter_config.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"adapter_config\.json.*(JSON|UTF-8)"):
        checkpoint(tmp_path / "red")


def test_an_adapter_pickled_with_more_than_weights_is_not_unpickled(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora(model, tmp_path / "red", target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    (tmp_path / "red" / "adapter_model.safetensors").unlink()
    torch.save({"weights": Path("/")}, tmp_path / "red" / "adapter_model.bin")
    with pytest.raises(InputError, match="not unpickled"):
        resident_of("gpt2", base, red=tmp_path / "red")


def test_an_adapters_digest_follows_its_weights(tmp_path: Path) -> None:
    base = save_model_directory(tmp_path / "base", "gpt2")
    digests = []
    for number in range(2):
        model = AutoModelForCausalLM.from_pretrained(base)
        path = tmp_path / str(number)
        lora(model, path, seed=number, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        digests.append(model_digest(checkpoint(path)))
    assert digests[0] != digests[1]
    moved = shutil.copytree(tmp_path / "0", tmp_path / "moved")
    assert model_digest(checkpoint(moved)) == digests[0]
