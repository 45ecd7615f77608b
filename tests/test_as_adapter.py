"""`--as-adapter`: LoRA experts in, a LoRA adapter out that PEFT loads on the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.project import EXPERTS, Project

AT = "red=0.3,blue=0.8"
AUTO: dict[str, tuple[Any, str, list[str]]] = {
    "llama": (AutoModelForCausalLM, "CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]),
    "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", ["q", "v"]),
    "gpt2": (AutoModelForCausalLM, "CAUSAL_LM", ["c_attn", "c_proj"]),
    "bert": (AutoModelForSequenceClassification, "SEQ_CLS", ["query", "value"]),
}


def with_adapters(project: Project, **settings: Any) -> None:
    """Make LoRA experts of rank 2 and 3 on the project's base, instead of the whole ones."""
    auto, kind, targets = AUTO[project.family]
    for number, name in enumerate(EXPERTS):
        labels = {"num_labels": 3 - number} if project.family == "bert" else {}
        fields = {"r": 2 + number, "lora_alpha": 8, "target_modules": targets, "task_type": kind, **settings}
        with torch.random.fork_rng():
            torch.manual_seed(number)
            live = peft.get_peft_model(
                auto.from_pretrained(project.folder / "base", **labels), peft.LoraConfig(**fields)
            )
            with torch.no_grad():
                for parameter in live.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        live.save_pretrained(project.folder / f"lora-{name}")
    experts = {name: {"model": f"lora-{name}", "task": name} for name in EXPERTS}
    project.spec["experts"] = experts
    project.write()


def merge(project: Project, out: str, *flags: str, method: str = "gta") -> dict[str, Any]:
    return project.json("merge", "spec.yaml", "--coefficients", AT, "--method", method, "--out", out, *flags)


def logits(model: Any, folder: Path, **more: Any) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("the river was quiet", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids, **more).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_a_sum_of_scaled_experts_comes_out_whole_at_the_sum_of_their_ranks(
    project_of: Callable[[str], Project], family: str
):
    project = project_of(family)
    with_adapters(project)
    done = merge(project, "adapter", "--as-adapter")
    assert done["adapter"]["rank"] == 5
    assert done["adapter"]["energy"] == pytest.approx(1.0, abs=1e-6)
    merge(project, "whole")
    auto, more = AUTO[family][0], {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
    live = peft.PeftModel.from_pretrained(auto.from_pretrained(project.folder / "base"), project.folder / "adapter")
    expected = logits(auto.from_pretrained(project.folder / "whole"), project.folder / "whole", **more)
    torch.testing.assert_close(logits(live, project.folder / "adapter", **more), expected, rtol=1e-3, atol=1e-4)
    checked = done["checked"]["tasks"]
    assert all(entry["score"] == pytest.approx(entry["merged"]) for entry in checked.values())
    again = project.json("evaluate", "spec.yaml", "--model", "adapter")["tasks"]
    assert {task: entry["score"] for task, entry in again.items()} == {t: e["score"] for t, e in checked.items()}


def test_what_a_smaller_rank_keeps_is_the_share_of_the_largest_singular_values(project_of: Callable[[str], Project]):
    project = project_of("llama")
    with_adapters(project)
    done = project.cli(
        "merge",
        "spec.yaml",
        "--coefficients",
        AT,
        "--method",
        "df-merge",
        "--out",
        "adapter",
        "--as-adapter",
        "--rank",
        "2",
    )
    merge(project, "whole", method="df-merge")
    base, whole = (AutoModelForCausalLM.from_pretrained(project.folder / name) for name in ("base", "whole"))
    kept = total = 0.0
    shares = {}
    for name, start in base.named_parameters():
        squares = (
            torch.linalg.svdvals((whole.get_parameter(name) - start).double()).square() if start.dim() == 2 else None
        )
        if squares is not None and squares.sum() > 1e-12:
            kept, total = kept + squares[:2].sum(), total + squares.sum()
            shares[name.removesuffix(".weight")] = squares[:2].sum() / squares.sum()
    found = json.loads((project.folder / "adapter/dfmerge.json").read_text())["adapter"]
    assert found["energy"] == pytest.approx(float(kept / total), rel=1e-3)
    assert found["matrices"] == len(shares) == 6
    worst = min(shares, key=lambda name: shares[name])
    assert (found["worst"]["layer"], found["worst"]["energy"]) == (worst, pytest.approx(float(shares[worst]), rel=1e-3))
    assert f"rank 2 on 6 matrices keeps {100 * found['energy']:.2f}% of the energy" in done.stdout
    assert "as an adapter of rank 2 (and before): red" in done.stdout


def test_each_task_of_a_classifier_gets_an_adapter_with_its_own_head(project_of: Callable[[str], Project]):
    project = project_of("bert")
    with_adapters(project)
    merge(project, "adapters", "--as-adapter")
    merge(project, "whole", "--split-heads")
    for task, classes in (("red", 3), ("blue", 2)):
        folder = project.folder / "adapters" / task
        live = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        whole = AutoModelForSequenceClassification.from_pretrained(project.folder / "whole" / task)
        torch.testing.assert_close(logits(live, folder), logits(whole, folder), rtol=1e-3, atol=1e-4)


def test_the_card_s_code_loads_the_adapter_and_names_no_library_but_peft(project_of: Callable[[str], Project]):
    project = project_of("llama")
    with_adapters(project)
    merge(project, "adapter", "--as-adapter")
    card = ModelCard.load(project.folder / "adapter/README.md")
    assert card.data.library_name == "peft"
    assert str(project.folder) not in str(card)
    names: dict[str, Any] = {}
    exec(card.text.split("```python")[1].split("```")[0].replace("DIR", str(project.folder / "adapter")), names)
    assert names["model"](**names["tokenizer"]("rain", return_tensors="pt")).logits.isfinite().all()


def test_whole_experts_and_other_adapters_are_refused_by_name(project_of: Callable[[str], Project]):
    project = project_of("llama")
    flags = ("merge", "spec.yaml", "--coefficients", AT, "--out", "adapter")
    failed = project.cli(*flags, "--as-adapter", check=2)
    assert "the expert red is a whole model" in failed.stderr
    assert "--rank" in project.cli(*flags, "--rank", "4", check=2).stderr
    assert not (project.folder / "adapter").exists()


@pytest.mark.parametrize("what", ["norm", "lm_head"])
def test_what_no_adapter_can_express_is_refused_by_name(project_of: Callable[[str], Project], what: str):
    """An expert that also trained whole modules: a norm; and the output, which is one matrix with the embeddings."""
    project = project_of("llama")
    with_adapters(project, modules_to_save=["norm"] if what == "norm" else ["embed_tokens"])
    flags = ("merge", "spec.yaml", "--coefficients", AT, "--method", "gta", "--out", "adapter", "--as-adapter")
    failed = project.cli(*flags, check=2)
    assert ("input_layernorm.weight" if what == "norm" else "embed_tokens.weight") in failed.stderr
    assert "adapter" in failed.stderr
    assert not (project.folder / "adapter").exists()
