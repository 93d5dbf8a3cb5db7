"""The order of one run, and nothing else.

    configuration → already recorded? → build (every configuration error) → dense baseline, where a probe compares
    → compress → evaluate → time → record → tracker

Data moves one way: no method sees a probe, no probe sees a method, tables see only records. Finished stages are kept
under a digest of what they depend on, so a killed sweep goes on where it stopped, and changing the evaluation does
not compress again. Of all runs that share a results folder one at a time is timed on each device.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from harness import claims, environment, launching, sanity, stages, together
from harness.engines.choice import DEFAULT, check_probes, hardware_with, is_default, places_of
from harness.errors import ConfigError, RunError
from harness.evaluation import kept_measurements
from harness.records import (
    SCHEMA,
    Failure,
    Measurement,
    RunRecord,
    measurement_from_json,
    read_record,
    remove_drafts,
    write_json_atomically,
    write_record,
)

if TYPE_CHECKING:
    from harness.corpus import Corpus
    from harness.engines.choice import EngineChoice
    from harness.evaluation import Probe, Stage
    from harness.layer_errors import LayerErrors
    from harness.method import LanguageModel, Method
    from harness.models import ModelSource

Timing = Literal["now", "later"]

ROOT = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (ROOT / "conf", ROOT / "harness" / "conf") if (folder / "config.yaml").is_file())
DIGEST_LENGTH = 12
PROTOCOL = 1  # raised when the same configuration would give other numbers than before, so that none is reused
LONGEST_NAME = 180  # bytes; file systems hold 255, and names of drafts are longer
STAGE_REPORT = "stage.json"
VERSIONS = "versions.json"
OTHERS_STATISTICS = "another run had gathered the statistics, and its peak is theirs"
UNTIMED = "not timed yet; the same command without timing=later times it and writes the record"
_WAY_OUT = "finished work is kept; free space, or put results elsewhere with paths.results=DIR, and run again"


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes. Everything it leaves is below `results`; `cache` holds downloads."""

    results: Path
    cache: Path

    @property
    def scratch(self) -> Path:
        """Artifacts, half-finished evaluations, logs, offline W&B: may be deleted between runs."""
        return self.results / "scratch"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. "skipped": a finished record was there; "refused": the configuration cannot be run.

    "untimed": all that need not be alone on the device is done and kept, no record is written yet; `record` says what
    was measured until then.
    """

    status: Literal["finished", "skipped", "untimed", "failed", "refused"]
    title: str
    reason: str = ""
    record: RunRecord | None = None
    path: Path | None = None
    baseline: Path | None = None


@dataclass(frozen=True)
class Parts:
    """A configuration made into objects: cheap to build, nothing loaded."""

    method: Method
    model: ModelSource
    corpus: Corpus
    hardware: environment.Hardware
    engine: EngineChoice
    probes: list[Probe]


def run(
    config: dict[str, Any],
    paths: Paths,
    force: bool = False,
    timing: Timing = "now",
    say: Callable[[str], None] = print,
    track: Callable[[RunRecord], None] | None = None,
) -> Outcome:
    """Compress and measure as the resolved configuration says; leave a record.

    force: run again although a finished record is there (artifact and measurements are made anew).
    timing: "later" leaves out the stage that times, and with it the record; a run without it does only that stage.
    track: called with every record that this call writes, the dense baseline's included.
    Failures of a stage become a record with status "failed"; configuration errors leave none.
    Of several processes that a launcher started, the one with rank 0 does all this; the others train along.
    """
    title = describe(config)
    beside = environment.process_rank() > 0
    if beside and not _trains(config["method"]):
        return Outcome("skipped", title, "nothing to train; the process of rank 0 does it all")
    try:
        with together.turn(digest_of(config)) if _trained_together(config) else nullcontext():
            return _along(config, paths, title) if beside else _run(config, paths, title, force, timing, say, track)
    except ConfigError as error:
        return Outcome("refused", title, str(error))


def _run(
    config: dict[str, Any],
    paths: Paths,
    title: str,
    force: bool,
    timing: Timing,
    say: Callable[[str], None],
    track: Callable[[RunRecord], None] | None,
) -> Outcome:
    try:
        if timing not in get_args(Timing):
            raise ConfigError(f"timing={timing}: choose one of {', '.join(get_args(Timing))}")
        wanted = identity(config)
        digest = digest_of(wanted)
        path = record_path(wanted, digest, paths)
        recorded = None if force else _recorded(config, path, paths)
        if recorded is not None:
            return recorded
        stages.warm_up()
        parts = build(config)
        getattr(parts.method, "check_available", lambda: None)()  # another project's library, before weights load
        parts.engine.check_available()
        compared = _baseline_needed(config, parts)
    except ValueError as error:
        return Outcome("failed", title, str(error))
    reference = None
    if compared:
        reference = run(dense_twin(config), paths, force=False, timing=timing, say=say, track=track)
        if reference.status not in ("finished", "skipped", "untimed"):
            return Outcome("failed", title, f"its dense baseline failed: {reference.reason}")
        distrust = sanity.distrusted(reference.record.measurements)
        if distrust:
            return Outcome("failed", title, f"its dense baseline cannot be a reference: {distrust} ({reference.path})")
        if reference.status == "finished":
            say(f"  {reference.title}: finished, {reference.path}")
    try:
        with claims.claimed(paths.scratch / "claims" / digest, say, title):
            recorded = None if force else _recorded(config, path, paths)  # by another sweep that was waited for
            if recorded is not None:
                return recorded
            remove_drafts(path.parent, path.name)
            remove_drafts(paths.scratch / "measurements" / digest)
            say(f"{title}: compressing and measuring ({digest})")
            wait = timing == "later" and any(probe.stage == "time" for probe in parts.probes)
            measured: tuple[Stage, ...] = ("evaluate",) if wait else ("evaluate", "time")
            record = _measure(config, wanted, digest, parts, paths, reference, force, measured, say)
            if wait and record.failure is None:
                return Outcome("untimed", title, UNTIMED, record)
            write_record(record, path)
    except OSError as error:
        return Outcome("failed", title, f"could not write below {paths.results}: {error.strerror or error}; {_WAY_OUT}")
    if track is not None:
        track(record)
    status = "finished" if record.status == "finished" else "failed"
    reason = record.failure.reason if record.failure else ""
    return Outcome(status, title, reason, record, path, reference.path if reference else None)


def _recorded(config: dict[str, Any], path: Path, paths: Paths) -> Outcome | None:
    """The outcome of a run whose finished record is there. Raises ValueError for a file that is no record."""
    if not path.exists():
        return None
    record = read_record(path)
    if record.status != "finished":
        return None
    baseline = _baseline_path(config, paths) if record.baseline else None
    return Outcome("skipped", describe(config), "already recorded", record, path, baseline)


def _along(config: dict[str, Any], paths: Paths, title: str) -> Outcome:
    """Train with the process of rank 0, which alone measures and writes; nothing of this one is kept."""
    try:
        stages.warm_up()
        called = together.await_call(digest_of(config))
        if not called:
            return Outcome("skipped", title, "not trained; the process of rank 0 says why")
        parts = build(config)
        artifact = paths.scratch / "artifacts" / digest_of(compression_identity(identity(config)))
        stages.run_stage(
            "compress",
            compress,
            {"config": config, "cache": str(paths.cache), "artifact": str(artifact), "called": called},
            seconds_limit=parts.hardware.compress_seconds_limit,
            threads=parts.hardware.thread_count,
            log=paths.scratch / "logs" / f"rank-{environment.process_rank()}.txt",
        )
    except (RunError, stages.StageFailure) as failure:
        return Outcome("failed", title, str(failure))
    return Outcome("skipped", title, "trained along; the process of rank 0 writes the record")


def rerun(record: RunRecord, results: Path, cache: Path | None = None) -> RunRecord:
    """Run a record's configuration again into another results folder, its baseline included.

    Raises RunError when that fails, or when several processes trained it: they need a folder that all of them know.
    """
    from harness.wheels import default_cache

    count = record.environment.get("training_processes", 1)
    if max(count, environment.training_processes()) > 1:
        raise RunError(
            f"{record.id} was trained by {count} processes together, which decides what a step reads: run its command "
            f"again by accelerate launch --num_processes {count}, into another folder, and compare"
        )
    outcome = run(record.config, Paths(results, cache or default_cache()), force=True)
    if outcome.record is None or outcome.status not in ("finished", "skipped"):
        raise RunError(f"running {record.id} again failed: {outcome.reason}")
    return outcome.record


def lost(config: dict[str, Any], paths: Paths, reason: str) -> tuple[Path, RunRecord]:
    """Where the record of a run belongs, and the one to leave there when its process ends without a word."""
    wanted = identity(config)
    digest = digest_of(wanted)
    record = RunRecord(
        id=digest,
        status="failed",
        card=config["card"],
        model=config["model"]["name"],
        bits=config["card"].get("bits"),
        config={key: config[key] for key in ("bits", "sparsity", "seed") if key in config} | _sections(config),
        environment={"machine": environment.machine(), "versions": environment.versions()},
        failure=Failure("worker", reason),
        command=shlex.join(["python", "-m", "harness", *sys.argv[1:]]),
        started=_now(),
    )
    return record_path(wanted, digest, paths), record


def build(config: dict[str, Any]) -> Parts:
    """Make every part of the configuration. Raises ConfigError for whatever is wrong with it."""
    hardware = make(config["hardware"], "hardware", {"_target_": "harness.environment.Hardware"})
    hardware.check_device()
    probes = {name: make(probe, f"evaluation.probes.{name}") for name, probe in config["evaluation"]["probes"].items()}
    if not probes:
        raise ConfigError("evaluation has no probes: choose evaluation=quick, or name one")
    engine = make(config.get("engine", {}), "engine", DEFAULT)
    engine.check_hardware(hardware)
    check_probes(engine, probes)
    texts = {key: value for key, value in config["corpus"].items() if key != "path"}  # corpus.path is for its texts
    corpus = make({"_target_": "harness.corpus.Corpus", **texts, **config["calibration"]}, "corpus and calibration")
    return Parts(
        method=make(config["method"], "method"),
        model=make(config["model"], "model"),
        corpus=corpus,
        hardware=hardware,
        engine=engine,
        probes=list(probes.values()),
    )


def make(section: dict[str, Any], where: str, defaults: dict[str, Any] | None = None) -> Any:
    """Instantiate one section of the configuration (`_target_` and its values).

    Raises ConfigError naming the section, also for a value that the class does not know.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate({**(defaults or {}), **section}, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            if isinstance(cause, TypeError | ValueError | ImportError):
                raise ConfigError(f"{where}: {_plain(cause)}") from error
            cause = cause.__cause__
        raise ConfigError(f"{where}: {error}") from error


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides the numbers.

    The root values `bits` and `sparsity` are not in it: a method that does not read them is one run however they are
    swept. A method that does not calibrate does not depend on calibration settings; one that trains on as much of the
    calibration text as its own settings say (`calibrates: text`) depends on the text, not on the settings.
    """
    kept = {key: config[key] for key in ("card", "hardware", "seed")}
    corpus = _by_content(config["corpus"])
    for section in ("model", "method", "evaluation"):
        kept[section] = _by_content(config[section])
    kept["hardware"] = environment.telling(config["hardware"])
    kept["calibration"] = config["calibration"]
    calibrates = config["card"].get("calibrates", True)
    if not calibrates:
        corpus.pop("calibration", None)
    if calibrates is not True:
        kept["calibration"] = None
    kept["corpus"] = corpus
    kept["card"] = {key: config["card"].get(key) for key in ("name", "version")}
    kept["protocol"] = PROTOCOL
    kept["machine"] = environment.machine_fingerprint()
    if not is_default(config.get("engine")):
        kept["engine"] = config["engine"]
    if not _trains(config["method"]):
        kept["hardware"].pop("sharded", None)
    elif environment.training_processes() > 1:
        kept["processes"] = environment.training_processes()  # each reads texts of its own in every step
    if _trains(config["method"]) and kept["hardware"].get("scoring_dtype") != "float32":
        kept["trained_in"] = "float32"  # it once was that type; such a run is not this one
    return kept


def _trains(section: Any) -> bool:
    if isinstance(section, list):
        return any(map(_trains, section))
    return isinstance(section, dict) and ("training" in section or any(map(_trains, section.values())))


def _trained_together(config: dict[str, Any]) -> bool:
    return _trains(config["method"]) and environment.training_processes() > 1


def _by_content(section: dict[str, Any]) -> dict[str, Any]:
    """A section with what it reads named by content instead of by place: files may move, and may change."""
    kept = {}
    for key, value in section.items():
        if isinstance(value, dict):
            kept[key] = _by_content(value)
        elif (key in ("path", "data") or key.endswith("_path")) and value and Path(value).exists():
            kept[key] = _file_state(Path(value))
        elif key not in ("cache", "note", "anchors"):  # none of them changes a number
            kept[key] = value
    return kept


def _file_state(path: Path) -> Any:
    """A small file by its hash; the files of a folder, which may be huge, by name, size and time of change."""
    from harness.wheels import file_sha256

    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def compression_identity(wanted: dict[str, Any]) -> dict[str, Any]:
    """What a compressed model depends on: everything but the evaluation."""
    own = {key: wanted[key] for key in ("card", "method", "processes", "trained_in") if key in wanted}
    if wanted["hardware"].get("sharded"):
        own["sharded"] = True  # the same weights to rounding, not the same
    return calibration_identity(wanted) | own


def calibration_identity(wanted: dict[str, Any]) -> dict[str, Any]:
    """What the calibration text says about the uncompressed model depends on: the same for every method and width."""
    kept = {key: wanted[key] for key in ("model", "calibration", "seed", "machine")}
    kept["protocol"] = PROTOCOL
    kept["text"] = wanted["corpus"].get("calibration")
    kept["arithmetic"] = {key: wanted["hardware"].get(key) for key in ("device", "scoring_dtype", "threads")}
    return kept


def digest_of(value: Any) -> str:
    """Twelve hexadecimal digits that name a configuration."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def record_path(wanted: dict[str, Any], digest: str, paths: Paths) -> Path:
    """Where the record of a configuration lies."""
    engine = [wanted["engine"]["name"]] if "engine" in wanted else []
    hardware = environment.label(wanted["hardware"])
    name = "-".join([wanted["card"]["name"], *_variant(wanted["method"]), *engine, hardware, digest])
    return paths.results / "records" / _safe(wanted["model"]["name"]) / f"{_safe(name)}.json"


def describe(config: dict[str, Any]) -> str:
    """A run in a few words: "GPTQ, 3 bits, on smollm2-135m-gguf", and the engine where it is not the default."""
    card = config["card"]
    bits = f", {card['bits']} bits" if card.get("bits") is not None else ""
    engine = "" if is_default(config.get("engine")) else f", in {config['engine']['name']}"
    return f"{card['title']}{bits}, on {config['model']['name']}{engine}"


def dense_twin(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with no compression: what every other run is compared with."""
    from omegaconf import OmegaConf

    dense = OmegaConf.to_container(OmegaConf.load(CONF / "method" / "dense.yaml"), resolve=True)
    return {**config, "card": dense["card"], "method": dense["method"]}


def is_dense(config: dict[str, Any]) -> bool:
    """True for the uncompressed baseline."""
    return config["card"]["name"] == "dense"


def _baseline_needed(config: dict[str, Any], parts: Parts) -> bool:
    return not is_dense(config) and any(probe.compares for probe in parts.probes)


def _baseline_path(config: dict[str, Any], paths: Paths) -> Path:
    wanted = identity(dense_twin(config))
    return record_path(wanted, digest_of(wanted), paths)


def _measure(
    config: dict[str, Any],
    wanted: dict[str, Any],
    digest: str,
    parts: Parts,
    paths: Paths,
    reference: Outcome | None,
    force: bool,
    measured: Sequence[Stage],
    say: Callable[[str], None],
) -> RunRecord:
    """Run the stages; a stage that fails makes the record a failed one.

    measured: the stages that probes run in; one of which everything is kept already costs no process.
    """
    artifact = paths.scratch / "artifacts" / digest_of(compression_identity(wanted))
    samples = paths.results / "samples" / _safe(config["model"]["name"]) / digest
    kept = paths.scratch / "measurements" / digest
    log = paths.scratch / "logs" / digest
    if force:
        for folder in (kept, samples):
            shutil.rmtree(folder, ignore_errors=True)
    record = RunRecord(
        id=digest,
        status="failed",
        card=config["card"],
        model=config["model"]["name"],
        bits=config["card"].get("bits"),
        config={key: config[key] for key in ("bits", "sparsity", "seed") if key in config} | _sections(config),
        environment=_environment(hardware_with(parts.engine, parts.hardware), parts.engine),
        baseline=reference.record.id if reference and reference.record else None,
        samples=str(samples.relative_to(paths.results)),
        command=shlex.join(["python", "-m", "harness", *sys.argv[1:]]),
        started=_now(),
    )
    shared = {"config": config, "cache": str(paths.cache), "artifact": str(artifact)}
    statistics = paths.scratch / "statistics" / digest_of(calibration_identity(wanted))
    measurements: list[Measurement] = []
    readers = paths.scratch / "claims" / f"{artifact.name}.readers"
    reading = ExitStack()
    try:
        with claims.claimed(paths.scratch / "claims" / artifact.name, say, "compress"):  # one model, many evaluations
            if force:
                _forget(artifact, readers, say)
            reading.enter_context(claims.claimed(readers / digest, say, describe(config)))
            report = _compress({**shared, "statistics": str(statistics)}, artifact, parts.hardware, log, say)
        record = replace(record, cost=report["cost"], artifact=report["artifact"], curves=report["curves"])
        record = replace(record, **report.get("layers", {}))
        record.environment.update(report["origin"])
        if report.get("versions", record.environment["versions"]) != record.environment["versions"]:
            record.environment["versions_compressing"] = report["versions"]  # kept from before an upgrade
        measurements += _cost_measurements(report["cost"])
        _forget_other_versions(kept, record.environment, say)
        folders = {"samples": str(samples), "kept": str(kept)}
        folders["reference"] = str(paths.results / reference.record.samples) if reference and reference.record else None
        for stage in measured:
            found = kept_measurements(parts.probes, stage, kept)
            if found is None:
                places = places_of(parts.engine, parts.hardware)
                with _alone_on_the_devices(places, paths, say) if stage == "time" else nullcontext():
                    result = stages.run_stage(
                        stage,
                        evaluate,
                        {**shared, **folders, "stage": stage},
                        seconds_limit=parts.hardware.evaluate_seconds_limit,
                        threads=parts.hardware.thread_count,
                        log=log / f"{stage}.txt",
                    )
                say(f"  {stage}: {result.seconds:.0f} s")
                found = [measurement_from_json(m) for m in result.value]
            elif found:
                say(f"  {stage}: already done")
            measurements += found
        if is_dense(config):
            excerpts = [f"{p.name}, {p.windows} windows" for p in parts.probes if getattr(p, "windows", None)]
            measurements = sanity.check_anchors(measurements, parts.model.anchors, excerpts)
        elif reference and reference.record:
            seconds = report["cost"]["compress_seconds"]
            measurements += sanity.break_even(seconds, measurements, reference.record.measurements)
    except stages.StageFailure as failure:
        reported = Failure(stage=failure.stage, reason=failure.reason)
        return replace(record, measurements=measurements, failure=reported, finished=_now())
    finally:
        reading.close()
    return replace(record, status="finished", measurements=measurements, finished=_now())


def _forget_other_versions(kept: Path, made_with: dict[str, Any], say: Callable[[str], None]) -> None:
    """Forget what probes kept that ran with other packages or wrote for another schema: a record is of one of each.

    Without a word on versions nothing is trusted either: forgetting may have been cut short after that word was gone.
    """
    file = kept / VERSIONS
    now = {key: made_with[key] for key in ("versions", "engine_versions") if key in made_with} | {"schema": SCHEMA}
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) == now:
        return
    if kept.exists() and any(kept.iterdir()):
        say("  what was measured before is of other versions of packages or of this harness, and measured again")
        shutil.rmtree(kept)
    write_json_atomically(now, file)


@contextmanager
def _alone_on_the_devices(places: Sequence[str], paths: Paths, say: Callable[[str], None]) -> Iterator[None]:
    """Held by one run at a time of all that share this results folder and one of these devices."""
    with ExitStack() as held:
        for device in sorted(launching.own_device(place) for place in places):  # all in one order
            name = _safe(f"timing-{socket.gethostname()}-{device}")
            held.enter_context(claims.claimed(paths.scratch / "claims" / name, say, f"time on {device}"))
        yield


def _forget(artifact: Path, readers: Path, say: Callable[[str], None]) -> None:
    """Delete a compressed model once no other run reads it; none begins to meanwhile, because its claim is ours."""
    for reader in sorted(readers.iterdir()) if readers.exists() else []:
        with claims.claimed(reader, say, f"a run that reads {artifact.name}"):
            pass
    for folder in (artifact, artifact.with_name(artifact.name + ".work")):
        shutil.rmtree(folder, ignore_errors=True)


def _compress(
    shared: dict[str, Any], artifact: Path, hardware: environment.Hardware, log: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The report of the compress stage, from an earlier run where there is one."""
    kept = artifact / STAGE_REPORT
    if kept.exists():
        say("  compress: already done")
        return json.loads(kept.read_text(encoding="utf-8"))
    for left in artifact.parent.glob(f"{artifact.name}.*.partial"):  # by a process that was killed: the claim is ours
        shutil.rmtree(left, ignore_errors=True)
    remove_drafts(artifact)
    if _trained_together(shared["config"]):
        shared = {**shared, "called": together.call_others(digest_of(shared["config"]))}
    result = stages.run_stage(
        "compress",
        compress,
        shared,
        seconds_limit=hardware.compress_seconds_limit,
        threads=hardware.thread_count,
        log=log / "compress.txt",
    )
    report = result.value
    write_json_atomically(report, kept)
    say(f"  compress: {result.seconds:.0f} s")
    return report


def compress(
    config: dict[str, Any], cache: str, artifact: str, statistics: str = "", called: str = ""
) -> dict[str, Any]:
    """The compress stage, in a child process: load, compress, save; what it cost and where the model came from.

    called: where processes that train together meet.
    """
    import torch

    from harness import artifact as artifacts
    from harness.method import Bench, TrainingLog
    from harness.progress import TerminalProgress

    quiet_libraries()
    parts, folder = build(config), Path(artifact)
    parts.hardware.make_current()
    device, dtype = parts.hardware.device, getattr(torch, parts.hardware.scoring_dtype)
    on_gpu = device.startswith("cuda")
    by_block = on_gpu and getattr(parts.method, "computes_block_by_block", False)
    on_host = by_block and not getattr(parts.model, "drawn_on_device", False)
    if device == "cuda" and environment.training_processes() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # of several that train together, each has its own
    base, origin = parts.model.load(Path(cache), "cpu" if on_host else device, dtype)
    if by_block:
        base.module.to("cpu")
    scratch = folder.with_name(folder.name + ".work")
    scratch.mkdir(parents=True, exist_ok=True)
    beside = environment.process_rank() > 0  # trains along and writes nothing, see _along
    learned = TrainingLog(None if beside else scratch / "curves.jsonl")
    generator = torch.Generator().manual_seed(config["seed"])
    bench = Bench(
        parts.corpus,
        generator,
        scratch,
        TerminalProgress(),
        learned,
        Path(statistics) if statistics else None,
        Path(cache),
        device if by_block else None,
        parts.hardware.sharded,
    )
    if called:
        together.meet(called, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    watch = environment.ForeignLoad(parts.hardware.thread_count)
    started, started_cpu = time.perf_counter(), time.process_time()
    compressed = parts.method.compress(base, bench)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    # who train together are no foreign load, and not this process's children
    foreign_load = "" if environment.training_processes() > 1 else watch.note()
    provenance = parts.corpus.provenance(base.tokenizer)
    if beside:
        return {}
    artifacts.save(compressed, folder)
    hashes = artifacts.file_hashes(folder)
    shutil.rmtree(scratch, ignore_errors=True)  # only now: a killed run goes on from what it left there
    peak_device = torch.cuda.max_memory_allocated() if on_gpu else None
    peak_host = environment.peak_resident_bytes()
    layers = _layer_errors(config, parts, Path(cache), compressed)  # after the peaks: it loads the original again
    calibrates = config["card"].get("calibrates", True)
    cost = {
        # a dense model was not compressed: an empty cell, not a zero
        # what it would have cost alone: neither statistics of a sweep nor a kill must make a row look cheaper
        "compress_seconds": None if is_dense(config) else seconds + learned.spared_seconds + learned.earlier_seconds,
        "compress_cpu_seconds": None if is_dense(config) else cpu_seconds,
        "foreign_load": foreign_load or None,
        "peak_device_bytes": peak_device,
        "peak_host_bytes": peak_host,
        "calibration_tokens": parts.corpus.samples * parts.corpus.window if calibrates is True else 0,
        "training_tokens": learned.tokens,
        "spared_seconds": learned.spared_seconds,
        "counts": dict(learned.counts),
    }
    if not calibrates:
        provenance.pop("calibration")
    return {
        "cost": cost,
        "artifact": {
            "path": folder.name,
            "bytes": artifacts.stored_bytes(folder),
            "sha256": artifacts.sha256(folder, hashes),
        },
        "files": hashes,
        "versions": environment.versions(),
        "origin": {
            "model_origin": origin,
            "text": provenance,
            **({"no_layer_errors": layers.absent} if layers.absent else {}),
        },
        "curves": learned.thinned(),
        "layers": {"layer_errors": layers.weights, "layer_output_errors": layers.outputs},
    }


def _layer_errors(config: dict[str, Any], parts: Parts, cache: Path, compressed: LanguageModel) -> LayerErrors:
    """What compressing did to each linear; without the memory for a second model the reason instead, and no failure."""
    import torch

    from harness.layer_errors import LayerErrors, layer_errors, passage_tokens

    if is_dense(config):
        return LayerErrors()
    try:
        dtype = getattr(torch, parts.hardware.scoring_dtype)
        original, _ = parts.model.load(cache, parts.hardware.device, dtype)
        tokens = passage_tokens(original.tokenizer, parts.hardware.device)
        return layer_errors(compressed.module, original.module, tokens, compressed.storage_dtype)
    except (RunError, ConfigError, MemoryError, torch.OutOfMemoryError) as error:
        return LayerErrors(absent=f"not measured: {type(error).__name__}: {error}")


def evaluate(
    config: dict[str, Any], cache: str, artifact: str, samples: str, kept: str, reference: str | None, stage: str
) -> list[dict[str, Any]]:
    """The evaluate and time stages (each runs in a child process): load the artifact, run the probes of this stage."""
    from harness import artifact as artifacts
    from harness.evaluation import Context, run_probes
    from harness.progress import TerminalProgress

    quiet_libraries()
    parts, folder = build(config), Path(artifact)
    hardware = hardware_with(parts.engine, parts.hardware)
    # what is loaded must be what was compressed, whatever happened to the disk since
    report = json.loads((folder / STAGE_REPORT).read_text(encoding="utf-8"))
    if "files" in report:  # every file that decides a number: configuration and tokenizer, too
        changed = artifacts.changed_file(folder, report["files"])
    else:  # made by an older version
        changed = "" if artifacts.sha256(folder) == report["artifact"]["sha256"] else "a file"
    if changed:
        raise RunError(f"{folder}: {changed} changed after it was written (its hash differs); delete it and run again")
    context = Context(
        corpus=parts.corpus,
        hardware=hardware,
        artifact=folder,
        samples=Path(samples),
        reference=Path(reference) if reference else None,
        cache=Path(cache),
        seed=config["seed"],
        progress=TerminalProgress(),
    )
    mode = "scoring" if stage == "evaluate" else "decoding"
    with parts.engine.running(folder, hardware, mode, Path(kept) / f"{parts.engine.name}-{stage}.txt") as lm:
        return [asdict(m) for m in run_probes(parts.probes, lm, context, stage, Path(kept))]


def quiet_libraries() -> None:
    """Third-party notices that tell a user nothing about their run stay out of the terminal."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _cost_measurements(cost: dict[str, Any]) -> list[Measurement]:
    """What compressing took, as numbers of the record; none for a dense model.

    Seconds that others disturbed say so. The peak of a run that took over statistics would make it look cheaper than
    the one that gathered them, so it has none.
    """
    if cost["compress_seconds"] is None:
        return []
    on = f"{cost['calibration_tokens']} calibration tokens" if cost["calibration_tokens"] else "no calibration"
    found = []
    if cost.get("training_tokens"):
        on += f", {cost['training_tokens']} tokens of training"
        found.append(Measurement("training_tokens", cost["training_tokens"], "tokens", "while compressing", "lower"))
    counts = cost.get("counts") or {}
    if "teacher tokens" in counts:
        asked = f"{counts['teacher prompts']} prompts of {counts['teacher prompt tokens']} tokens"
        found.append(Measurement("teacher_tokens", counts["teacher tokens"], "tokens", asked, "lower"))
    where = "peak_device_bytes" if cost.get("peak_device_bytes") is not None else "peak_host_bytes"
    if cost.get(where) is not None:
        memory = "device memory" if where == "peak_device_bytes" else "the process, libraries included"
        spared = bool(cost.get("spared_seconds"))
        peak, note = (None, OTHERS_STATISTICS) if spared else (cost[where], "")
        found.append(Measurement("peak_compress_bytes", peak, "bytes", memory, "lower", note=note))
    disturbed = cost.get("foreign_load") or ""
    return [Measurement("compress_seconds", cost["compress_seconds"], "s", on, "lower", note=disturbed), *found]


def _environment(hardware: environment.Hardware, engine: EngineChoice) -> dict[str, Any]:
    outside, several = engine.versions(), environment.training_processes()
    return {
        **({"training_processes": several} if several > 1 else {}),
        **({"engine_versions": outside} if outside else {}),
        "machine": environment.machine(),
        "threads": hardware.thread_count,
        "scoring_dtype": hardware.scoring_dtype,
        "decoding_dtype": hardware.resolved_decoding_dtype(),
        "versions": environment.versions(),
        "source": environment.commit(ROOT),
        "load_average_before": environment.load_average(),
    }


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    sections = ["card", "method", "model", "hardware", "corpus", "calibration", "evaluation"]
    if not is_default(config.get("engine")):
        sections.append("engine")
    return {section: config[section] for section in sections}


def _variant(method: dict[str, Any]) -> list[str]:
    if "steps" in method:
        return [word for step in method["steps"] for word in _variant(step)]
    grid = method.get("grid") or (method.get("inner") or {}).get("grid") or {}
    bits, sparsity = grid.get("bits", method.get("bits")), {**(method.get("pruner") or {}), **method}.get("sparsity")
    words = [f"w{bits}"] if bits is not None else []
    return [*words, f"s{sparsity}".replace(":", "of")] if sparsity is not None else words


def _safe(name: str) -> str:
    """A name that stays inside its folder, and that every file system can hold: the end of a long one is kept."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(name))
    while len(plain.encode()) > LONGEST_NAME:
        plain = plain[1:]
    return plain.lstrip(".") or "_"


def _plain(error: BaseException) -> str:
    """Python's wording of a wrong keyword, without its method."""
    return str(error).replace(".__init__() got an unexpected keyword argument", " has no option")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Callable(types.ModuleType):
    """This module: `from harness import run` gives it, and scripts call it."""

    def __call__(self, *overrides: str) -> RunRecord | None:
        """One run, said as on the command line: run("method=gptq", "bits=3"); its record.

        A finished record is returned at once; None for timing=later, which leaves none, and in processes that only
        train along. In a script the call belongs below `if __name__ == "__main__":`, because stages run in processes
        that import the script. Raises ConfigError for what cannot be run, RunError for what failed.
        """
        from harness.cli import composed

        outcome = run(*composed(overrides))
        if outcome.status == "refused":
            raise ConfigError(outcome.reason)
        if outcome.status == "failed":
            raise RunError(f"{outcome.title}: {outcome.reason}")
        return None if outcome.status == "untimed" else outcome.record


sys.modules[__name__].__class__ = _Callable
