"""DeltaLLM (arXiv 2501.18596) end to end, beside other ways to remove as many parameters, on the same text.

For each method, fraction and seed: the model is built, measured, trained and measured again, on speeches it never saw:

- `delta`: shared layers and low-rank deltas, trained with progressive replacement and distillation;
- `svd`, `asvd`: each MLP matrix as two factors, without sharing; weighted by the inputs that occur;
- `drop`: whole layers go, those that matter least (ShortGPT); `merge`: they are averaged into the one before. Both are
  then trained by a LoRA on all that is left, with as many numbers as `delta` trains, and merged;
- `control`: nothing is removed, and the same LoRA trained: what the text alone brings.

`svd` and `asvd` train all their factors, which are more. One learning rate serves all.

What more tokens bring, runs with several `--tokens` tell. Every finished run adds a line to OUT/results.jsonl, and is
not made again by a later call; one that was interrupted with Ctrl-C goes on, and with `--checkpoint-every` also one
that was killed. OUT/runs/RUN/log.jsonl has what a run tells as it goes.
`--ablate` measures what the parts of the initialisation bring, without training.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

import deltafmt
import deltafmt.torch
import deltallm_results as results
import deltallm_subjects as subjects
from deltafmt.printing import new_table, number, put
from deltallm_ablation import ablation
from deltallm_runs import AFTERWARDS, INITIAL, METHODS, Experiment, Run, append, identity, say
from measure import cells, markdown


def planned(options: argparse.Namespace) -> list[Run]:
    """All runs that were asked for: the first seed of everything first."""
    structure = " ".join(
        [options.layout, options.parts, options.initial]
        + ([f"{options.delta_layers} layers"] if options.delta_layers else [])
        + (["by influence"] if options.importance else [])
    )
    return [
        Run(options.model, method, remove, seed, tokens, structure if method == "delta" else "")
        for tokens in options.tokens
        for seed in options.seeds
        for remove in (*options.remove, 0.0)
        for method in options.methods
        if (method == "control") == (remove == 0)
    ]


def make_all(experiment: Experiment, options: argparse.Namespace) -> None:
    """Make the runs that are not made yet, as many as there is time for."""
    file, begin = options.out / "results.jsonl", time.monotonic()
    for run in planned(options):
        records = results.read(file)
        same = [record for record in records if record["settings"] == experiment.settings]
        if any(record["run"] == asdict(run) for record in same):
            continue
        left = 60 * options.minutes - (time.monotonic() - begin) if options.minutes else None
        if left is not None and left < expected_seconds(run, records, options.checkpoint_every):
            say(f"no time left for {run.title}")
            return
        say(run.title)
        try:
            record = experiment.perform(run, left)
        except deltafmt.UsageError as error:
            say(f"  left out: {error}")
            continue
        if record is None:
            say("  interrupted: another call goes on from here")
            return
        append(file, record)
        gc.collect()


def expected_seconds(run: Run, records: list[dict[str, Any]], checkpoint_every: int | None) -> float:
    """How long a run will take, as those did that were most like it; 0 if there are none. With checkpoints it may take
    several calls, and needs only some time in each."""
    if checkpoint_every is not None:
        return AFTERWARDS
    of_model = [record for record in records if record["run"]["model"] == run.model]
    alike = [record for record in of_model if record["run"]["method"] == run.method] or of_model
    guesses = (
        record["seconds"] + record["train_seconds"] * (run.tokens / record["run"]["tokens"] - 1) for record in alike
    )
    return max(guesses, default=0.0)


def drawn(rows: list[dict[str, Any]], title: str) -> Table:
    """A table for a terminal of 80 columns: the words of a number's head, and its spread, are below each other."""
    heads, *lines = cells(rows)
    words = [head in ("model", "method", "device", "layout", "parts", "initialisation") for head in heads]
    short = {
        "perplexity": "perpl.",
        "accuracy": "accur.",
        "agreement": "agree",
        "parameters": "param.",
        "difference": "diff.",
    }
    table = new_table(
        *(
            Column(head, overflow="fold", style="cyan")
            if is_word
            else number("\n".join(short.get(word, word) for word in head.split() if word != "/"))
            for head, is_word in zip(heads, words, strict=True)
        )
    )
    table.title, table.title_justify, table.padding = title, "left", (0, 1, 0, 0)
    for line in lines:
        table.add_row(*(cell.replace(" ± ", "\n±") for cell in line))
    return table


def report(options: argparse.Namespace) -> None:
    """Tables and pictures of what was measured so far."""
    records, initialised = (results.read(options.out / name) for name in ("results.jsonl", "ablation.jsonl"))
    summary, originals = results.summary(records), results.originals(records)
    tables: dict[str, list[dict[str, Any]]] = {
        "The original": originals,
        "Quality, on text that was not trained on": results.quality_table(summary),
        "Size and speed": results.size_table(summary),
        "Checkpoints, and what is read back": results.archive_table(summary),
        "What the initialisation brings, without training": initialised,
    }
    tables = {title: rows for title, rows in tables.items() if rows}
    if options.json:
        print(json.dumps({"originals": originals, "runs": summary, "ablation": initialised}, indent=2))
    elif options.markdown:
        print("\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in tables.items()))
    elif options.table:
        put(drawn(rows, title) for title, rows in tables.items())
    if options.plot and records:
        options.plot.write_text(results.quality_picture(records), encoding="utf-8")
        logs = {}
        for name, group in results.grouped(records):
            first = min(group, key=lambda record: record["run"]["seed"])
            run = Run(**first["run"])
            log = options.out / "runs" / identity(run, first["settings"]) / "log.jsonl"
            if log.is_file():
                logs[f"{name} -{run.remove:.0%}"] = results.read(log)
        if logs:
            name = f"{options.plot.stem}-loss{options.plot.suffix}"
            options.plot.with_name(name).write_text(results.loss_picture(logs), encoding="utf-8")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--out", type=Path, required=True, help="directory of results")
    add("--model", default="smollm2" if cuda else "mgm", help=f"{', '.join(subjects.NAMES)}; with --model-dir any name")
    add("--model-dir", type=Path, help="a Hugging Face directory, with --tokens-file and --held-out, for no network")
    add("--tokens-file", type=Path, help="tokens to train on, .npy")
    add("--held-out", type=Path, help="tokens to be measured on, .npy")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--remove", nargs="+", type=float, default=[0.12, 0.24], help="fractions of the parameters")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--tokens", nargs="+", type=int, default=[2_000_000 if cuda else 100_000], help="to train on; several: all")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", default="bfloat16" if cuda else "float32", choices=("bfloat16", "float32"))
    add("--minutes", type=float, help="begin no run that would end later")
    add("--threads", type=int, help="of torch")
    add("--keep-archives", action="store_true", help="leave the packed models in OUT/archives")
    add("--ablate", action="store_true", help="measure parts of the initialisation instead, without training")
    printed = parser.add_mutually_exclusive_group()
    for way, what in (("table", "tables"), ("markdown", "the same, as Markdown"), ("json", "all of it, for machines")):
        printed.add_argument(f"--{way}", action="store_true", help=f"print what was measured so far; {what}")
    add("--plot", type=Path, help="draw it as SVG: quality over size, and beside it the losses; nothing is run")
    of_delta = parser.add_argument_group("deltas")
    add = of_delta.add_argument
    add("--layout", help="alternating, sequential:K, or LAYER:ANCHOR,...; for mgm and tiny sequential:2")
    add("--parts", choices=("mlp", "attention", "both"), help="also of svd and asvd; mlp, for mgm and tiny both")
    add("--keep", nargs=2, type=int, help="blocks at either end left alone: 2 2, for mgm and tiny 1 1")
    add("--delta-layers", type=int, help="how many layers become deltas")
    add("--importance", action="store_true", help="choose them by their influence")
    add("--initial", default="full", choices=INITIAL)
    training = parser.add_argument_group("training and measuring")
    add = training.add_argument
    add("--batch", type=int, default=16 if cuda else 8)
    add("--length", type=int, default=512 if cuda else 128)
    add("--accumulate", type=int, default=1)
    add("--rate", type=float, default=5e-4)
    add("--distil", type=float, default=1.0, help="weight of the distillation")
    add("--cross-entropy", type=float, default=1.0, help="weight of the cross-entropy")
    add("--temperature", type=float, default=1.0)
    add("--replace-until", type=float, default=0.5, help="fraction of the steps after which all deltas stand in")
    add("--replace-from", type=float, default=0.25, help="probability of a delta at the beginning")
    add("--norms", action="store_true", help="train norms, too")
    add("--lora", type=int, help="rank of LoRAs on what is neither delta nor anchor; drop and merge always have some")
    add("--compiled", action="store_true", help="compile the blocks of both models, and the loss")
    add("--trainable", type=int, help="numbers in the LoRA of drop and merge; as many as delta trains if not given")
    add("--checkpoint-every", type=int, help="steps; only with checkpoints a run that was killed can go on")
    add("--evaluate", type=int, default=None if cuda else 8192, help="tokens of the held-out text; all if not given")
    add("--calibrate", type=int, default=65_536 if cuda else 16_384, help="tokens for influences and second moments")
    options = parser.parse_args(arguments)
    small = options.model in ("mgm", "tiny")  # of eight blocks there is too little else
    options.layout = options.layout or ("sequential:2" if small else "alternating")
    options.parts = options.parts or ("both" if small else "mlp")
    options.keep = options.keep or ([1, 1] if small else [2, 2])
    if options.model_dir and not (options.tokens_file and options.held_out):
        parser.error("--model-dir needs --tokens-file and --held-out")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.table or options.markdown or options.json or options.plot:
        report(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(options, options.out)
    if options.ablate:
        for remove in options.remove:
            for row in ablation(experiment, remove):
                say(json.dumps(row))
                append(options.out / "ablation.jsonl", row)
    else:
        make_all(experiment, options)


if __name__ == "__main__":
    main()
