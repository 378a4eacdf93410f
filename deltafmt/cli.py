"""The command line: its commands, and `main`. Their work is in other modules, what they show in `tables`
and `scores`.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 I/O, 2 usage, 3 malformed, 4 unsupported,
5 integrity, 6 wrong base (`errors`), and 128 + the number of a signal that ended the work.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import click

from . import native
from .arguments import JOBS, LIMIT, OVERWRITE, QUIET, VERBOSE, Number, Settings, bases, common, layout, model, size
from .errors import DeltafmtError, IntegrityError, UsageError
from .evaluation import DTYPES, MODES, measure
from .inspect import inspect
from .lora_export import RANKS, export_lora
from .methods.panels import MAX_TENSOR_PARALLEL
from .methods.sharing import Parts
from .outcome import Stopped, StoppedError, explained, stoppable, tell
from .pack import METHODS, pack
from .report import Report
from .sources import Bases
from .unpack import unpack
from .verify import verify
from .version import __version__

NUMPY = "numpy (none compiled at installation; the same bytes, more slowly)"
MANY_BYTES = 256 << 20
"""Of a checkpoint that takes long enough for its owner to wonder."""


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="""\b
    Examples:
      deltafmt pack finetune/ packed/ --base base/     a fine-tune as its difference to a base, bit for bit
      deltafmt verify packed/ --base base/             check every byte
      deltafmt unpack packed/ restored/ --base base/   the same files as before
      deltafmt pack --help                             the lossy options, with examples
    """,
)
@click.version_option(
    __version__, prog_name="deltafmt", message=f"%(prog)s %(version)s\nkernels: {'C' if native.available() else NUMPY}"
)
@LIMIT
@QUIET
@VERBOSE
@click.pass_context
def program(ctx: click.Context) -> None:
    """Store shared model weights once, and only what differs for the rest.

    deltafmt packs a Hugging Face checkpoint into an archive: a directory with the weights compressed, identical tensors
    stored once, and those of a fine-tune as their difference to a base model. Unless a lossy option is given, every
    file comes back byte for byte; .bin and .pt files come back as safetensors, with the same tensors.

    A model is named by a directory (safetensors, sharded or not; .bin and .pt need the extra 'torch'), a weight file,
    an archive, or a Hub id such as org/name or org/name@revision (needs the extra 'hub').

    \b
    Exit codes: 0 ok, 1 input or output failed, 2 usage, 3 malformed archive, 4 unsupported,
    5 damaged or different data, 6 wrong base.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(UsageError.exit_code)


@program.command("pack", short_help="Pack a checkpoint into an archive.")
@click.argument("src", type=model)
@click.argument("dst", type=model)
@click.option(
    "--base",
    type=model,
    metavar="BASE",
    multiple=True,
    help="The model that SRC was made from; only the difference is stored. Repeatable: a merge has several.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    help="auto is lowrank if a lossy option is given, and lossless if not.",
)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Lossy: keep N components of each tensor.")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    metavar="F",
    help="Lossy: keep this share of each difference's squared norm, e.g. 0.99.",
)
@click.option(
    "--max-error",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Lossy: keep as few components as leave each tensor's relative error at most F, e.g. 0.01.",
)
@click.option(
    "--target-size",
    type=size,
    metavar="SIZE",
    help="Lossy: bytes of the whole archive, spent where they lower the error most. SIZE is 500MB, 2GiB, 1.5GB.",
)
@click.option(
    "--share",
    type=layout,
    metavar="LAYOUT",
    help="Layers of SRC are differences to an anchor layer; see above. Lossless unless a lossy option is given.",
)
@click.option(
    "--share-parts", type=click.Choice(["mlp", "attention", "both"]), default="both", help="What layers share."
)
@click.option(
    "--include", metavar="GLOB", multiple=True, help="Only tensors of these names may lose anything. Repeatable."
)
@click.option("--exclude", metavar="GLOB", multiple=True, help="Tensors of these names stay lossless. Repeatable.")
@click.option("--force", is_flag=True, help="Share layers even if they are not alike.")
@JOBS
@OVERWRITE
@click.option("--dry-run", is_flag=True, help="Do all the work and report the sizes, but write nothing.")
@click.option("--single-file", is_flag=True, help="Write the whole archive into one file; DST ends in .safetensors.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, MAX_TENSOR_PARALLEL),
    metavar="N",
    help="Store weights that tensor parallelism splits by columns (o_proj, down_proj, ...) so that each of N ranks "
    "reads its own columns only. Not weights stored as a difference.",
)
@click.option(
    "--auto-map",
    is_flag=True,
    help="Let transformers load DST with trust_remote_code=True: changes its config.json (needs the extra 'hf').",
)
@common
@click.pass_obj
def pack_command(settings: Settings, /, src: str, dst: str, share_parts: Parts, auto_map: bool, **options: Any) -> None:
    """Pack the checkpoint SRC into an archive, the new directory DST; with --single-file, the new file DST.

    Lossless by default: each tensor is stored as a reference to an identical one, as a patch to what predicts it,
    compressed, or as it is, whichever is smallest. DST appears once all of it is written, or not at all.

    With --base, what merging left is found and stored exactly, at about the size of the adapter: merged LoRA and DoRA,
    rows that only decayed, added tokens. Of a mixture of models (average, SLERP), or one whose tensors come from
    several, name each with a --base of its own. What of them is needed to read the archive is said at the end; it is
    found again in whatever order they are given.

    \b
    Lossy packing keeps low-rank factors of
      the difference to a base    --base BASE with --rank, --energy, --max-error or --target-size
      layers to an anchor layer   --share LAYOUT with one of these, or with --method lowrank
      the weights themselves      neither --base nor --share; where it pays
    and what does not pay stays lossless. The error of each tensor is measured and stored.

    \b
    LAYOUT, for models whose layers were trained to be alike, is one of
      sequential:K   one anchor layer, then K layers that share it, and so on
      alternating    every other layer shares the one before it (sequential:1)
      5:4,6:4        layers 5 and 6 share layer 4
    The first two and the last two layers are left as they are, unless named.

    A lossy archive as SRC, such as a checkpoint of a training, keeps its recipes: nothing is searched for, and what it
    takes from its --base is stored, so that the new archive stands by itself.

    \b
    Examples:
      deltafmt pack model/ packed/
      deltafmt pack finetune/ packed/ --base org/base-model
      deltafmt pack merge/ packed/ --base one/ --base other/
      deltafmt pack model/ packed.safetensors --single-file
      deltafmt pack model/ packed/ --tensor-parallel 4
      deltafmt pack finetune/ packed/ --base base/ --rank 64 --exclude '*embed*'
      deltafmt pack finetune/ packed/ --base base/ --target-size 1.5GB
      deltafmt pack model/ packed/ --share sequential:2 --share-parts mlp --max-error 0.02 --dry-run
    """
    if auto_map and (options["single_file"] or options["dry_run"]):
        raise UsageError("--auto-map needs a directory that is written", hint="Leave out --single-file and --dry-run")
    write_auto_map = _auto_map_writer(src) if auto_map else None
    with settings.progress("packing") as progress:
        report = pack(src, dst, share_parts=share_parts, progress=progress, limits=settings.limits, **options)
    if write_auto_map is not None:
        write_auto_map(dst)
        mapped = inspect(dst, limits=settings.limits)
        report = replace(report, stored_bytes=mapped.stored_bytes, roles=mapped.roles)
    settings.show(report)
    _tell_of_kernels(settings, report)


def _auto_map_writer(src: str) -> Callable[[str], None]:
    """Before anything is packed: it needs an extra, and not every checkpoint can have one."""
    from .hf import check_auto_map, write_auto_map

    check_auto_map(src)
    return write_auto_map


def _tell_of_kernels(settings: Settings, report: Report) -> None:
    """A note on stderr where the compiled kernels are missing, if it took time: some do not know that they could wait
    less."""
    if not native.available() and not settings.quiet and (settings.verbose or report.logical_bytes >= MANY_BYTES):
        click.echo(
            f"deltafmt: note: kernels: {NUMPY}. "
            "To have them compiled, install deltafmt again, from its source, where there is a C compiler",
            err=True,
        )


@program.command("unpack", short_help="Unpack an archive into a plain checkpoint.")
@click.argument("src", type=model)
@click.argument("dst", type=model)
@bases("The base that SRC was packed against, if it was.")
@click.option("--dtype", metavar="T", help="Cast float tensors to bfloat16, float16, float32 or float64.")
@click.option(
    "--max-shard-size",
    type=size,
    metavar="SIZE",
    help="Write new weight files of at most this size. SIZE is 500MB, 2GiB, 1.5GB.",
)
@JOBS
@OVERWRITE
@common
@click.pass_obj
def unpack_command(settings: Settings, /, src: str, dst: str, **options: Any) -> None:
    """Unpack the archive SRC into a plain Hugging Face checkpoint, the new directory DST.

    Tensor names, dtypes, weight files and all other files are those of the checkpoint that was packed; of a lossless
    archive they are the same byte for byte. Every tensor is checked before DST appears.

    \b
    Examples:
      deltafmt unpack packed/ restored/
      deltafmt unpack packed/ restored/ --base org/base-model
      deltafmt unpack packed/ restored/ --base one/ --base other/
      deltafmt unpack packed/ restored/ --dtype float16 --max-shard-size 2GB
    """
    with settings.progress("unpacking") as progress:
        report = unpack(src, dst, progress=progress, limits=settings.limits, **options)
    settings.show(report)
    _tell_of_kernels(settings, report)


@program.command("export-lora", short_help="Write what a fine-tune changes as a LoRA adapter.")
@click.argument("src", type=model)
@click.argument("dst", type=model)
@bases("The base that SRC was packed against.")
@click.option(
    "--rank",
    type=click.IntRange(1, RANKS[-1]),
    metavar="N",
    show_default="the highest of the archive's factors",
    help=f"Rank of the adapter, raised to the next of {', '.join(map(str, RANKS))}.",
)
@click.option(
    "--format",
    type=click.Choice(["peft", "gguf"]),
    default="peft",
    help="gguf is for llama.cpp, of Llama and Mistral models (needs the extra 'gguf').",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="Of the factors."
)
@click.option("--strict", is_flag=True, help="Refuse if any changed tensor has to be left out.")
@OVERWRITE
@common
@click.pass_obj
def export_lora_command(settings: Settings, /, src: str, dst: str, **options: Any) -> None:
    """Write what the archive SRC changes in its base as a LoRA adapter, the new directory DST.

    Lossy, and what is lost is reported: of each changed tensor, the share of its change that the base with the adapter
    merged lacks. Low-rank factors of the archive, as it has them of a merged LoRA or after --rank, are taken as they
    are; any other changed matrix becomes the best factors of the rank. Norms, biases and embeddings that are the output
    layer as well have no place in an adapter and are left out.

    PEFT, vLLM and SGLang load DST as it is.

    \b
    Examples:
      deltafmt export-lora packed/ adapter/ --base org/base-model
      deltafmt export-lora packed/ adapter/ --base base/ --rank 64 --dtype bfloat16
      deltafmt export-lora packed/ adapter/ --base base/ --rank 64 --format gguf
    """
    with settings.progress("exporting") as progress:
        report = export_lora(src, dst, progress=progress, limits=settings.limits, **options)
    settings.show(report)


@program.command("inspect", short_help="Show what is inside an archive.")
@click.argument("src", type=model)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common
@click.pass_obj
def inspect_command(settings: Settings, /, src: str, tensors: bool) -> None:
    """Show what is inside the archive SRC: sizes, ranks, what shares with what, the base it needs, the files.

    Neither the base nor any tensor is read.

    \b
    Examples:
      deltafmt inspect packed/
      deltafmt inspect packed/ --tensors
      deltafmt inspect packed/ --json | jq .roles
    """
    settings.quiet = False  # what it prints is all that it does
    settings.show(inspect(src, limits=settings.limits), tensors=tensors)


@program.command("verify", short_help="Check an archive, or compare it with a checkpoint.")
@click.argument("src", type=model)
@bases("The base that SRC was packed against. Without it, the rest is checked.")
@click.option(
    "--against", type=model, metavar="CHECKPOINT", help="Compare with this model, tensor by tensor and file by file."
)
@common
@click.pass_context
def verify_command(ctx: click.Context, src: str, base: Bases, against: str | None) -> None:
    """Check every byte of the archive SRC and rebuild every tensor.

    With --against, prove that the archive is equal to a checkpoint, or say what differs (exit code 5). A lossy archive
    passes if each tensor differs by the error that the archive states, and all other tensors and files are equal.

    \b
    Examples:
      deltafmt verify packed/
      deltafmt verify packed/ --base base/
      deltafmt verify packed/ --base base/ --against finetune/
    """
    settings = ctx.ensure_object(Settings)
    with settings.progress("verifying") as progress:
        report = verify(src, base=base, against=against, progress=progress, limits=settings.limits)
    settings.show(report)
    if report.as_stated is False:
        ctx.exit(IntegrityError.exit_code)


@program.command("eval", short_help="Measure how good a packed model still is.")
@click.argument("src", type=model)
@bases("The base that SRC was packed against, if it was.")
@click.option(
    "--text",
    type=model,
    metavar="FILE",
    required=True,
    help="What is predicted: UTF-8 text, - for stdin; or token ids, one row of integers in a .npy file.",
)
@click.option(
    "--against", type=model, metavar="MODEL", help="Compare with this model, an archive or a checkpoint, loaded whole."
)
@bases("The base that the archive MODEL was packed against.", "--against-base")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="full",
    help="How SRC is loaded: dense, as base and factors, or layer by layer as it runs.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    metavar="N",
    show_default="512, or fewer if the model has not so many positions",
    help="Tokens in a window. Windows do not overlap, and the first token of each is given.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", default=8, help="Windows at once.")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    metavar="N",
    show_default="all",
    help="Read at most the first N tokens.",
)
@click.option("--device", metavar="D", default="cpu", help="Where it runs: cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype", type=click.Choice(DTYPES), show_default="what config.json says", help="Of the weights, in all models."
)
@click.option("--markdown", is_flag=True, help="Print a Markdown table with a row per model, and nothing else.")
@common
@click.pass_obj
def eval_command(settings: Settings, /, src: str, markdown: bool, **options: Any) -> None:
    """Let the causal language model SRC predict a text, and say how well, how fast, and at what size it does.

    SRC is an archive or a plain checkpoint. The text should be one that the model was not trained on; it is cut into
    tokens by the tokenizer that SRC brings. Perplexities compare where text, tokenizer and --length are the same.

    With --against, say as well how near SRC is to another model, as a lossy archive to the checkpoint that it was
    packed from: how often both find the same token the likeliest, and how far apart their probabilities are.

    Needs the extra 'hf'. Code that a model brings is not run.

    \b
    Examples:
      deltafmt eval packed/ --text held-out.txt
      deltafmt eval packed/ --text held-out.txt --against original/ --mode fused
      deltafmt eval packed/ --base base/ --text held-out.txt --device cuda --dtype bfloat16
      deltafmt eval packed/ --text ids.npy --tokens 100000 --json | jq .model.perplexity
    """
    with settings.progress("evaluating", in_bytes=False) as progress:
        report = measure(src, progress=progress, limits=settings.limits, **options)
    settings.quiet = False  # what it prints is all that it does
    settings.show(report, markdown=markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Args:
        arguments: without the program's name; `sys.argv` if None.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settings = Settings()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a tensor's name
    try:
        with stoppable():
            code: int | None = program.main(arguments, prog_name="deltafmt", standalone_mode=False, obj=settings)
        return code or 0
    except SystemExit as done:  # a reader of our output has gone
        return done.code if isinstance(done.code, int) else 1
    except Stopped as stopped:
        error: DeltafmtError = StoppedError(stopped.number)
        code = 128 + stopped.number
    except Exception as problem:
        error = explained(problem)
        code = error.exit_code
        if settings.verbose:
            traceback.print_exc()
    with suppress(OSError):
        tell(error, code, as_json=settings.json or "--json" in arguments)
    return code


def _open_closed_streams() -> None:
    """Open on nothing what the caller closed (`>&-`) of stdin, stdout and stderr, in the order of their numbers: each
    gets its own again. Otherwise the next file opened, an archive's maybe, would get it, and what is printed with it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
