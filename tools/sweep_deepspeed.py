"""Tries every key of a DeepSpeed JSON, with several values each, and writes the table in docs/configs.md.

    python tools/sweep_deepspeed.py run --out runs/sweep_deepspeed
    python tools/sweep_deepspeed.py table --out runs/sweep_deepspeed

A variant is one value of one key (zero_ds/training/deepspeed_keys.py) in a JSON of one ZeRO stage. A tiny model trains
under it for four steps on 2 and on 3 ranks, with a checkpoint after two. Either the variant is refused before anything
is loaded, or

- its losses are those of ZeRO-0 in float32, to 1e-6 (in bf16 and fp16: to 2 %),
- every saved tensor equals the live parameter on every rank, and
- a run that resumes from the checkpoint ends with the same bytes.

Tensors of a tiny model are swapped to a disk as well where a JSON asks for it. That needs libaio and a C++ compiler;
without them these variants are refused, and the table should not be written.

One group of ranks tries all variants of a world size; after a variant that fails, a new group continues with the next
one. Results are appended to OUT/results-RANKS.jsonl, and an interrupted sweep continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.deepspeed import ds_config, take_disks
from zero_ds.training.deepspeed_keys import KEYS, REFUSED

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configs.md"
BEGIN, END = "<!-- table of tools/sweep_deepspeed.py: begin -->", "<!-- end -->"
STEPS, SAVED_AT = 4, 2
TOLERANCES = {"fp32": 1e-6, "bf16": 0.13, "fp16": 0.13}
"""Differences of the losses, which are about 6.5, from ZeRO-0's in float32. In half precision they are 2 %, as in the
doctor's test: another dtype of sums, or a step that a loss scale skips, changes digits after these."""
PATIENCE = 180.0
"""Seconds that a variant may take."""

_CPU = {"device": "cpu"}
BASES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 500},
    "2, offload": {"stage": 2, "offload_optimizer": _CPU},
    "3, offload": {
        "stage": 3,
        "stage3_param_persistence_threshold": 500,
        "offload_optimizer": _CPU,
        "offload_param": _CPU,
    },
    "3, disk": {
        "stage": 3,
        "stage3_param_persistence_threshold": 500,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": _CPU,
    },
    "3, all on disk": {
        "stage": 3,
        "stage3_param_persistence_threshold": 500,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "nvme", "buffer_size": 1_000_000, "max_in_cpu": 0},
    },
}
"""`zero_optimization` of the JSON to which a key is added. Under stage 3 some parameters are gathered and some stay."""

ONLY_STAGE_3 = (
    *("sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply"),
    *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
)
OF_GRADIENTS = (
    *("prescale_gradients", "gradient_predivide_factor", "communication_data_type", "gradient_clipping"),
    *("grad_accum_dtype", "gradient_accumulation_steps", "immediate_grad_update", "loss_scale"),
)
"""Keys outside of `zero_optimization` that each stage reads in code of its own."""
OF_A_DISK = ("nvme_path", "buffer_size", "max_in_cpu", "fast_init")
"""Keys that matter only where something is swapped to a disk, as all of section `aio`."""
ALSO_OF_A_DISK = ("buffer_count", "pin_memory", "pipeline_read", "pipeline_write")
"""Keys of an offload that are read in code of its own where it swaps to a disk."""


@dataclass(frozen=True)
class Variant:
    """One value of one key, in a JSON of one stage."""

    key: str
    """Name of the key; empty for the JSON without a change."""
    value: Any
    base: str
    precision: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)
    """Entries, by dotted key, that the key needs to have an effect."""

    @property
    def name(self) -> str:
        return json.dumps([self.key, self.value, self.base, self.precision], sort_keys=True)

    def json(self) -> dict[str, Any]:
        """Returns the DeepSpeed JSON."""
        content: dict[str, Any] = {"zero_optimization": json.loads(json.dumps(BASES[self.base]))}
        for key, value in {**self.more, **({self.key: self.value} if self.key else {})}.items():
            *sections, last = key.split(".")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return content


def variants() -> list[Variant]:
    """Returns everything to try, first the JSONs without a change."""
    plain = [Variant("", None, base) for base in BASES]
    plain += [Variant("", None, base, precision) for precision in ("bf16", "fp16") for base in "0123"]
    found = [v for v in plain if not (v.base == "0" and v.precision == "fp16")]
    for key, rule in KEYS.items():
        for base, precision, more in _places(key):
            found += [Variant(key, value, base, precision, more) for value in (*rule.tried, *rule.refused)]
    found += [Variant(key, None, "2") for key in REFUSED]
    return found


def _places(key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields base, precision and further entries of the JSONs in which a key is tried."""
    section, _, last = key.rpartition(".")
    if section == "aio" or last in (*OF_A_DISK, *ALSO_OF_A_DISK):
        if not section.endswith("offload_param"):
            yield "3, disk", "fp32", {}
        yield "3, all on disk", "fp32", {}
        if last not in ALSO_OF_A_DISK:
            return
    precisions, more = ["fp32"], {}
    if section in ("bf16", "fp16"):
        precisions = [section] if last != "enabled" else ["fp32", section]
    elif last in ("grad_accum_dtype", "communication_data_type"):
        precisions = ["fp32", "bf16", "fp16"]
    if section in ("csv_monitor", "flops_profiler", "comms_logger") and last != "enabled":
        more[f"{section}.enabled"] = True
    if section == "fp16" and last not in ("enabled", "initial_scale_power"):
        more["fp16.initial_scale_power"] = 8  # no step is skipped, of which the other keys decide what follows
    if last == "prof_ops":
        more["comms_logger.prof_all"] = False
    for base in _bases(section, last):
        for precision in precisions:
            if not (precision == "fp16" and base == "0"):
                yield base, precision, more


def _bases(section: str, last: str) -> list[str]:
    """Returns the bases on which a key is tried."""
    if section.endswith("offload_optimizer"):
        return ["2, offload", "3, offload"]
    if section.endswith("offload_param"):
        return ["3, offload"]
    if section == "zero_optimization":
        if last == "stage":
            return ["0"]
        return ["3"] if last.startswith("stage3_") or last in ONLY_STAGE_3 else ["1", "2", "3"]
    if last in OF_GRADIENTS:
        return ["0", "1", "2", "3"]
    return ["2"] if (section and last != "enabled") or section in ("wandb", "comet", "csv_monitor") else ["2", "3"]


def as_read(variant: Variant, models: Path, ranks: int) -> str:
    """Returns everything that DeepSpeed reads from a variant's JSON, the same text for the same settings.

    Raises:
        ConfigError: the variant is refused.
    """
    import deepspeed.comm
    from deepspeed.runtime.config import DeepSpeedConfig

    def content(part: Any) -> Any:
        if hasattr(part, "model_dump"):
            return part.model_dump()
        return {k: v for k, v in vars(part).items() if k != "_param_dict"} if hasattr(part, "__dict__") else str(part)

    deepspeed.comm.get_rank = lambda group=None: 0  # it asks for the rank along with the size
    with tempfile.TemporaryDirectory() as folder:
        zero = Path(folder) / "variant.json"
        zero.write_text(json.dumps(variant.json()))
        ds = ds_config(run_config(models, zero, variant.precision, Path("out")), ranks)
    for monitor in ("wandb", "comet"):
        if not ds.get(monitor, {}).get("enabled"):
            ds.pop(monitor, None)
    return json.dumps(content(DeepSpeedConfig(ds, mpu=_Ranks(ranks))), default=content, sort_keys=True)


@dataclass(frozen=True)
class _Ranks:
    """Tells DeepSpeed the number of ranks, of which it otherwise asks the process group."""

    ranks: int

    def get_data_parallel_world_size(self) -> int:
        return self.ranks


# -- one rank ----------------------------------------------------------------------------------------------------------


def try_variant(variant: Variant, models: Path, folder: Path) -> dict[str, Any]:
    """Trains under a variant, resumes, and compares; returns the findings. A collective.

    models: folder with tiny models and data, as `write_models` leaves it; folder: a new one, which all ranks share.
    """
    from zero_ds.runtime import distributed
    from zero_ds.training.checkpoint import save
    from zero_ds.training.folders import ModelFolders
    from zero_ds.training.gathering import Units, follow_layers_
    from zero_ds.training.train import train

    distributed.initialize()
    zero = folder / "variant.json"
    if distributed.is_rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        zero.write_text(json.dumps(variant.json()))
    distributed.barrier()
    config = run_config(models, zero, variant.precision, folder / "run")
    try:
        ds = ds_config(config, distributed.world_size())
        follow_layers_(ds, Units.of_folder(ModelFolders.of(config).decoder))
        take_disks(ds)
    except ConfigError as error:
        return {"refused": str(error)}
    differing: list[str] = []
    publish = save.Saving.publish

    def publish_and_compare(self: save.Saving, keep: int) -> Path:
        checkpoint = publish(self, keep)
        differing.extend(differs_from_live(checkpoint, self.engine))
        return checkpoint

    save.Saving.publish = publish_and_compare  # type: ignore[method-assign]
    try:
        train(config)
        _take_back(folder / "run", folder / "again")
        train(config.model_copy(update={"out": str(folder / "again")}))
    finally:
        save.Saving.publish = publish  # type: ignore[method-assign]
    distributed.barrier()
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = f"step-{STEPS:06d}"
    files = ("weights.safetensors", "resume/state.safetensors")
    same = [_digest(folder / "run" / last / f) == _digest(folder / "again" / last / f) for f in files]
    distributed.barrier()  # rank 0 removes the folder next
    return {"losses": losses, "not_as_live": sorted(set(differing)), "resumed": all(same)}


def differs_from_live(checkpoint: Path, engine: Any) -> list[str]:
    """Returns the names of the tensors in a checkpoint that differ from the model's on any rank. A collective."""
    from safetensors import safe_open

    from zero_ds.runtime import distributed
    from zero_ds.runtime.zero3 import gathered

    found = []
    with safe_open(checkpoint / "weights.safetensors", framework="pt") as file:
        for name, parameter in engine.named.items():
            with gathered([parameter]):
                same = bool((parameter.detach().cpu() == file.get_tensor(name)).all())
            if distributed.sum_over_ranks(float(not same))[0]:
                found.append(name)
    return found


def _take_back(run: Path, again: Path) -> None:
    """Copies a run as it was after its first checkpoint. A collective."""
    from zero_ds.runtime import distributed

    distributed.barrier()
    if distributed.is_rank_zero():
        again.mkdir()
        first = f"step-{SAVED_AT:06d}"
        shutil.copytree(run / first, again / first)
        (again / "latest").write_text(first + "\n")
    distributed.barrier()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_config(models: Path, zero: Path, precision: str, out: Path) -> RunConfig:
    """Returns the run that is tried: a trained encoder and adapter against a frozen surrogate."""
    return RunConfig.model_validate(
        {
            "stage": "encoder",
            "target": str(models / "llama"),
            "surrogate": str(models / "surrogate"),
            "encoder": {"path": str(models / "clip")},
            "data": {"sources": [{"path": str(models / "data" / "data.json")}], "max_length": 512},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
            "global_batch": 6,
            "max_steps": STEPS,
            "precision": precision,
            "activation_checkpointing": False,
            "checkpoint": {"every_steps": SAVED_AT, "keep": 2},
            "log_every": 1,
            "zero": str(zero),
            "nvme_path": str(out.parent),
            "out": str(out),
        }
    )


def swap_small_tensors() -> None:
    """Lets DeepSpeed swap tensors of 2 KB and more to a disk; otherwise it keeps all of a tiny model in memory.

    DeepSpeed swaps what has at least a megabyte or `aio.block_size`. Smaller parameters than these are whole on every
    rank in `BASES`.
    """
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    from zero_ds.training import gathering

    gathering.SWAPPED_FROM = 2048
    for swapper in (OptimizerSwapper, AsyncPartitionedParameterSwapper):
        swapper.min_aio_bytes = property(lambda self: 2048, lambda self, value: None)


def rank(todo: Path, models: Path, results: Path, scratch: Path) -> None:
    """Tries the variants of a file on this rank, until one fails; rank 0 appends the results."""
    from zero_ds.runtime import distributed

    swap_small_tensors()
    for number, content in enumerate(json.loads(todo.read_text())):
        variant = Variant(**content)
        try:
            found = try_variant(variant, models, scratch / str(number))
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            (scratch / f"error-{os.environ['RANK']}").write_text(text[:400])
            os._exit(1)  # its remains in DeepSpeed and in hooks must not reach the next variant
        if distributed.is_rank_zero():
            append(results, variant, found)
            shutil.rmtree(scratch / str(number))
        distributed.barrier()
    os._exit(0)


# -- all ranks ---------------------------------------------------------------------------------------------------------


def append(results: Path, variant: Variant, found: dict[str, Any]) -> None:
    """Adds one line to the results."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(variant), **found}) + "\n")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Returns the results so far by name of the variant; of several, the last one."""
    found = {name_of(content): content for content in read_lines(results)}
    return {
        name: {**content, **found.get(content.get("as", ""), {}), **_own(content)} for name, content in found.items()
    }


def _own(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a result that names its variant."""
    return {name: content[name] for name in ("key", "value", "base", "precision", "more")}


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Returns all results in the order in which they were found."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def variant_of(content: dict[str, Any]) -> Variant:
    """Returns the variant of a result."""
    return Variant(**_own(content))


def name_of(content: dict[str, Any]) -> str:
    """Returns the name of the variant of a result."""
    return variant_of(content).name


def write_models(folder: Path) -> None:
    """Writes a tiny Llama, a surrogate of it, a tiny CLIP and data, unless they are there."""
    if (folder / "surrogate").is_dir():
        return
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny

    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    tiny.llama(folder / "llama", tied=True)
    tiny.clip(folder / "clip")
    tiny.write_data(folder / "data")
    build_surrogate(folder / "llama", [Replaced(1, 2), Replaced(3, 4)], folder / "surrogate")


def attempt(todo: list[Variant], ranks: int, out: Path) -> str:
    """Lets one group of ranks try variants; returns why it ended early, or an empty string."""
    from zero_ds.runtime.ports import free_port

    results, scratch = out / f"results-{ranks}.jsonl", out / f"scratch-{ranks}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "todo.json").write_text(json.dumps([asdict(variant) for variant in todo]))
    environment = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "ZERO_DS_SILENCE": str(PATIENCE),  # on a busy machine a rank may be slow
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, __file__, "rank", str(scratch), str(out / "models"), str(results)]
    processes = []
    for number in range(ranks):
        log = (scratch / f"rank-{number}.log").open("w")
        own = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=scratch))
    try:
        return _watch(processes, results, scratch)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _watch(processes: list[subprocess.Popen[bytes]], results: Path, scratch: Path) -> str:
    """Waits for the ranks; returns why they ended early, or an empty string."""
    progress, since = -1, time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(0.5)
        size = results.stat().st_size if results.is_file() else 0
        if size != progress:
            progress, since = size, time.monotonic()
        failed = any(process.poll() for process in processes)
        if failed:
            time.sleep(3.0)  # the other ranks may have more to say
        if failed or time.monotonic() - since > PATIENCE:
            errors = sorted(scratch.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if errors:
                return errors[0].read_text()
            return "a rank ended" if failed else "the ranks hang"
    return ""


app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


@app.command("rank", hidden=True)
def rank_command(scratch: Path, models: Path, results: Path) -> None:
    """Run one rank."""
    rank(scratch / "todo.json", models, results, scratch)


@app.command()
def run(
    out: Out = Path("runs/sweep_deepspeed"),
    ranks: Annotated[list[int] | None, typer.Option(help="Number of ranks; repeatable.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Try this key alone, again; repeatable.")] = None,
) -> None:
    """Try the variants that have no result yet."""
    out = out.absolute()
    write_models(out / "models")
    for world in ranks or [2, 3]:
        results = out / f"results-{world}.jsonl"
        wanted = [variant for variant in variants() if key is None or variant.key in key]
        done = {name_of(content): content for content in read_lines(results)} if key is None else {}
        known: dict[str, Variant] = {}
        todo = []
        for variant in wanted:
            same, refused = variant, ""
            try:
                same = known.setdefault(as_read(variant, out / "models", world), variant)
            except ConfigError as error:
                refused = str(error)
            except (ValueError, AssertionError, TypeError, KeyError):
                pass  # DeepSpeed refuses what we do not; the ranks will show it
            if refused or same is not variant:
                found = {"refused": refused} if refused else {"as": same.name}
                if done.get(variant.name) != {**asdict(variant), **found}:
                    append(results, variant, found)
            elif variant.name not in done or {"as", "refused"} & set(done[variant.name]):
                todo.append(variant)
        _try_all(todo, world, out)


def _try_all(todo: list[Variant], ranks: int, out: Path) -> None:
    """Tries variants, with a new group of ranks after each that fails."""
    results = out / f"results-{ranks}.jsonl"
    while todo:
        before = len(read_lines(results))
        failure = attempt(todo, ranks, out)
        tried = {name_of(content) for content in read_lines(results)[before:]}
        todo = [variant for variant in todo if variant.name not in tried]
        if failure and todo:
            failed = todo.pop(0)
            append(results, failed, {"failed": failure})
            print(f"{ranks} ranks, {failed.name}: {failure}", flush=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def verdict(found: dict[str, Any], reference: dict[str, Any], precision: str = "fp32") -> str:
    """Returns `works`, `refused: REASON` or `FAILS: REASON`.

    reference: result whose losses the variant should have.
    """
    if "refused" in found:
        return f"refused: {found['refused']}"
    if "failed" in found:
        return f"FAILS: {found['failed']}"
    if "losses" not in found:
        return "FAILS: not tried yet"
    if "losses" not in reference:
        return "FAILS: nothing to compare with"
    apart = [abs(a - b) for a, b in zip(found["losses"], reference["losses"], strict=True)]
    if not all(one <= TOLERANCES[precision] for one in apart):
        return f"FAILS: losses are {max(apart):.1e} apart"
    if wrong := found["not_as_live"]:
        return f"FAILS: {len(wrong)} saved tensors differ from the model, first {wrong[0]}"
    return "works" if found["resumed"] else "FAILS: a resumed run ends elsewhere"


@dataclass(frozen=True)
class Finding:
    """Result for one value of a key in one place."""

    base: str
    precision: str
    ranks: int
    words: str
    """Verdict."""


Findings = dict[tuple[str, str], list[Finding]]
"""Findings by key and value (as JSON)."""


def judge(results: dict[str, dict[str, Any]], ranks: int) -> Findings:
    """Returns the findings of the results of one number of ranks."""
    found: Findings = {}
    reference = results.get(Variant("", None, "0").name, {})
    for content in results.values():
        variant = variant_of(content)
        words = verdict(content, reference, variant.precision)
        said = found.setdefault((variant.key, json.dumps(variant.value)), [])
        said.append(Finding(variant.base, variant.precision, ranks, words))
    return found


@app.command()
def table(
    out: Out = Path("runs/sweep_deepspeed"),
    ranks: Annotated[list[int] | None, typer.Option(help="Number of ranks; repeatable.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the table into docs/configs.md.")] = False,
) -> None:
    """Print the table of the results, and fail if a variant neither works nor is refused."""
    found: Findings = {}
    wanted = {variant.name for variant in variants()}  # results of a variant that is no longer tried do not count
    for world in ranks or [2, 3]:
        results = read(out / f"results-{world}.jsonl")
        for key, said in judge({name: results[name] for name in results if name in wanted}, world).items():
            found.setdefault(key, []).extend(said)
    text = render(found)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    else:
        print(text)
    wrong = [(*key, one) for key, said in found.items() for one in said if one.words.startswith("FAILS")]
    for key, value, one in wrong:
        print(f"{key}={value} (stage {one.base}, {one.precision}, {one.ranks} ranks): {one.words}", file=sys.stderr)
    raise typer.Exit(1 if wrong else 0)


def render(found: Findings) -> str:
    """Returns the table of keys in Markdown."""
    lines = ["| key | works | refused |", "|---|---|---|"]
    for key, rule in KEYS.items():
        in_order = [json.dumps(value) for value in (*rule.tried, *rule.refused)]
        values = {value: found[key, value] for value in in_order if (key, value) in found}
        works, refused = [], []
        for value, said in values.items():
            good = [one for one in said if one.words == "works"]
            bad = [one for one in said if one.words != "works"]
            if good:
                works.append(f"`{value}`" + (f" ({_places_of(good)})" if bad else ""))
            for why, places in _by_reason(bad).items():
                where = f" with {_places_of(places)}" if good else ""
                refused.append(f"`{value}`{where}: {rule.why or why}")
        if not values:
            works = ["FAILS: not tried yet"]
        lines.append(f"| `{key}` | {', '.join(works)} | {'; '.join(dict.fromkeys(refused))} |")
    lines += [f"| `{key}` | | {why} |" for key, why in REFUSED.items()]
    return "\n".join(lines)


def _by_reason(bad: list[Finding]) -> dict[str, list[Finding]]:
    """Groups findings by their reason, which may name the stage, the precision or the number of ranks."""
    found: dict[str, list[Finding]] = {}
    for one in bad:
        why = one.words.removeprefix("refused: ").removeprefix("variant.json").lstrip(":, ").rstrip(".")
        same = next((said for said in found if _without_numbers(said) == _without_numbers(why)), why)
        found.setdefault(same, []).append(one)
    return {why.replace("|", "\\|"): said for why, said in found.items()}


def _without_numbers(words: str) -> str:
    return re.sub(r"\d+|bf16|fp16|fp32|bfloat16|float16|float32", "N", words)


def _places_of(findings: list[Finding]) -> str:
    """Returns where findings were made: stages, precisions, and the number of ranks if it matters."""
    stages = sorted({one.base for one in findings})
    precisions = sorted({one.precision for one in findings}, reverse=True)
    *most, last = stages
    words = f"stages {', '.join(most)} and {last}" if most else f"stage {last}"
    if len(stages) >= 4:
        words = "all stages"
    if precisions != ["fp32"]:
        words += f" in {' and '.join(precisions)}"
    ranks = {one.ranks for one in findings}
    return words if len(ranks) > 1 else f"{words} on {min(ranks)} ranks"


if __name__ == "__main__":
    app()
