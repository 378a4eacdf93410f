"""Loads an archive through the real source of vLLM and SGLang: their plugin registries, their loaders, our plugins.

    python tools/check_engines.py                 # fetches `ENGINES` as wheels, some 400 MB, and keeps their files
    python tools/check_engines.py DIRECTORY       # or: where others are unzipped

Neither can be installed without a GPU's libraries. What of their Python code the plugins touch is imported as it is;
third-party packages that are not installed are stood in for by empty ones, and so are the compiled parts of the
engines. It prints a line for each check and fails at the first that does not hold.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers

import deltafmt
import fixtures
import merges
from deltafmt.errors import UsageError

ENGINES = {"vllm": "0.33.0", "sglang": "0.5.23"}
"""What is fetched: the versions that the README names."""
WEIGHTS = "model.safetensors"

_HARDWARE = {
    *("amdsmi", "flashinfer", "habana_frameworks", "intel_extension_for_pytorch", "libtpu", "torch_musa", "torch_npu"),
    *("torch_xla", "tpu_inference"),
}
"""What the engines look for to learn what they run on: it stays absent."""


class _Meta(type):
    """Of classes that stand for nothing: base classes, decorators, annotations, all the same."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        super().__init__(name, bases, namespace)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and not options and inspect.isroutine(args[0]):
            return args[0]  # a decorator
        return super().__call__(*args, **options) if "__init__" in cls.__dict__ else cls

    def __or__(cls, other: Any) -> Any:
        return other

    __ror__ = __or__

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __bool__(cls) -> bool:
        return False


def _nothing(name: str) -> Any:
    return _Meta(name, (), {})


class _Absent(types.ModuleType):
    """A module that is not there: every name in it stands for nothing."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: for what an engine imports and nothing else finds. `absent` are the packages that it stood in for."""

    def __init__(self, engines: Path) -> None:
        self._ours = {path.name for path in engines.iterdir()}
        self.absent: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        compiled = name.rpartition(".")[2].startswith("_") and top in self._ours
        if (top in self._ours and not compiled) or top in sys.stdlib_module_names:
            return None
        if top in _HARDWARE or (top not in self._ours and top not in self.absent and "." in name):
            return None  # a part of an installed package
        caller = sys._getframe(1)
        while caller is not None and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back  # type: ignore[assignment]
        origin = caller.f_code.co_filename if caller is not None else ""
        if not any(f"{os.sep}{engine}{os.sep}" in origin for engine in self._ours):
            return None  # an optional import of an installed package
        if top not in self._ours:
            self.absent.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Shell(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked first: of a package only some modules are real, those above them are empty, and all others stand-ins."""

    def __init__(self, package: str, real: set[str]) -> None:
        self._package, self._real = package, real
        self._above = {name.rsplit(".", dots)[0] for name in real for dots in range(1, name.count(".") + 1)} - real

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self._package or name in self._real:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name in self._above:
            found = importlib.machinery.PathFinder.find_spec(name, path)
            assert found is not None
            spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def fetched(folder: Path) -> Path:
    """`ENGINES`, from the package index or the fixture cache, in a new folder. Raises `RuntimeError`."""
    folder.mkdir()
    for name, version in ENGINES.items():
        (folder / name).symlink_to(fixtures.fetch(fixtures.Package(f"{name}=={version}", name)))
    return folder


# The checks


def models(folder: Path) -> tuple[Path, Path, Path]:
    """A base, a fine-tune of it, and its archive."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=80
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    merges.merged_lora(folder / "base", folder / "tuned", rank=4, ulps=4)
    deltafmt.pack(folder / "tuned", folder / "packed", base=folder / "base")
    return folder / "base", folder / "tuned", folder / "packed"


def without(name: str, base: Path, tuned: Path) -> Path:
    """An archive of the fine-tune that lacks a tensor."""
    from safetensors.torch import load_file, save_file

    folder = tuned.with_name(f"without-{name}")
    folder.mkdir()
    save_file({key: tensor for key, tensor in load_file(tuned / WEIGHTS).items() if key != name}, folder / WEIGHTS)
    (folder / "config.json").write_bytes((tuned / "config.json").read_bytes())
    deltafmt.pack(folder, packed := folder.with_name(f"{folder.name}-packed"), base=base)
    return packed


def check(what: str, holds: bool) -> None:
    """Print what was checked. Raises `SystemExit` if it does not hold."""
    click.echo(f"{'ok' if holds else 'FAILED':8}{what}")
    if not holds:
        raise SystemExit(1)


def same(found: Iterable[tuple[str, torch.Tensor]], wanted: Path) -> bool:
    """Whether names and values are those of a plain checkpoint."""
    from safetensors.torch import load_file

    expected, got = load_file(wanted / WEIGHTS), dict(found)
    return got.keys() == expected.keys() and all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def check_vllm(base: Path, tuned: Path, packed: Path) -> None:
    """vLLM: its registries, its loader base class, its own way of filling a model's parameters."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # it would look for hardware
    from vllm.config.load import LoadConfig
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.models.utils import AutoWeightsLoader

    from deltafmt.vllm import ArchiveLoader, PassThrough, register

    register()
    register()
    options = {"base": str(base)}
    loader = get_model_loader(LoadConfig(load_format="deltafmt", model_loader_extra_config=options))
    check("vLLM: --load-format deltafmt is our loader", type(loader) is ArchiveLoader)

    class Model(torch.nn.Module):
        """The module tree of transformers, filled by vLLM."""

        def __init__(self) -> None:
            super().__init__()
            inner = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(packed)).to(torch.bfloat16)
            self.model, self.lm_head = inner.model, inner.lm_head

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
            return loaded

    model, config = Model(), types.SimpleNamespace(model=str(packed), revision=None, quantization=None)
    loader.download_model(config)
    loader.load_weights(model, config)
    check("vLLM: its AutoWeightsLoader fills a model with the fine-tune", same(model.state_dict().items(), tuned))

    for lacking in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        config.model = str(without(lacking, base, tuned))
        try:
            loader.load_weights(Model(), config)
            refused = ""
        except UsageError as error:
            refused = str(error)
        check(f"vLLM: an archive without {lacking} is refused", "1 weights" in refused and lacking in refused)

    check("vLLM: 'deltafmt' is a known quantization", "deltafmt" in quantization.QUANTIZATION_METHODS)
    known = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    check("vLLM: and our pass-through is its config", known["deltafmt"] is PassThrough)
    config_of_it = PassThrough.from_config({"quant_method": "deltafmt"})
    method = config_of_it.get_quant_method(ReplicatedLinear.__new__(ReplicatedLinear), "")
    check("vLLM: linear layers stay unquantized", type(method) is UnquantizedLinearMethod)
    check("vLLM: all other layers decide for themselves", config_of_it.get_quant_method(torch.nn.Module(), "") is None)


def check_sglang(base: Path, tuned: Path, packed: Path) -> None:
    """SGLang: its hook registry, applied to its default loader. Of SGLang itself these modules are imported, no other:
    all else asks for kernels."""
    real = {"plugins", "plugins.hook_registry", "model_loader.loader", "configs.load_config"}
    sys.meta_path.insert(0, _Shell("sglang", {f"sglang.srt.{name}" for name in real}))
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins.hook_registry import HookRegistry

    import deltafmt.sglang as plugin

    plugin.register()
    plugin.register()
    HookRegistry.apply_hooks()
    check("SGLang: the hook was applied", plugin.HOOKED in HookRegistry._patched)
    loader = DefaultModelLoader(LoadConfig())
    os.environ[plugin.BASE] = str(base)

    def read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        config = types.SimpleNamespace(model_path=str(path), revision=None)
        weights: Iterator[tuple[str, torch.Tensor]] = loader._get_all_weights(config, torch.nn.Module())
        return weights

    check("SGLang: an archive loads as the fine-tune", same(read(packed), tuned))
    original = DefaultModelLoader._get_weights_iterator.__wrapped__
    check(
        "SGLang: the original takes what the hook gives on", list(inspect.signature(original).parameters)[1] == "source"
    )


@click.command(help=__doc__)
@click.argument("engines", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(engines: Path | None) -> None:
    """All checks."""
    with tempfile.TemporaryDirectory() as scratch:
        engines = engines or fetched(Path(scratch) / "engines")
        made = models(Path(scratch))
        stand_in = _StandIn(engines)
        sys.path.insert(0, str(engines))
        sys.meta_path.append(stand_in)
        for engine, run in (("vllm", check_vllm), ("sglang", check_sglang)):
            if (engines / engine).is_dir():
                run(*made)
        click.echo(f"stood in for: {', '.join(sorted(stand_in.absent))}")


if __name__ == "__main__":
    main()
