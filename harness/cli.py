"""The command line: overrides in, records and a summary out.

Hydra composes the configuration; help, wrong names and the closing summary of a sweep are ours, because Hydra's are
not made for someone who mistyped a method's name.

Exit status: 0 all finished or already recorded; 1 something failed; 2 the request itself was wrong; 130 ended by
Ctrl-C, 143 by a scheduler's SIGTERM.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness import launching, stacks
from harness.errors import ConfigError
from harness.records import RunRecord
from harness.redaction import redact
from harness.run import CONF, Outcome, Paths, Timing, describe, make, run

GROUPS = {  # the order in which help lists them
    "method": "how the model is made cheaper",
    "model": "what is compressed",
    "hardware": "what it runs on",
    "engine": "what runs the compressed model",
    "evaluation": "which numbers are measured",
    "probe": "one more of them: +probe@evaluation.probes.NAME=NAME",
    "corpus": "text to calibrate on and to evaluate on",
    "calibration": "how much text a method may calibrate on",
    "training": "how long methods that train a student train",
    "student": "what learns from the model: student@method.student=NAME",
    "teacher": "how the model's predictions reach a student: teacher@method.teacher=NAME",
    "examples": "texts that students train on: examples@method.examples=NAME",
    "grid": "numbers that weights are rounded to: grid@method.grid=NAME",
    "inputs": "how the inputs of linears are quantized: inputs@method.inputs=NAME",
    "problems": "questions with right answers that students are taught on and asked",
    "text_teacher": "who answers questions for students that learn from words",
    "draft": "where speculative decoding gets its guesses: draft@method.draft=NAME",
    "tracker": "where records go besides the results folder",
    "experiment": "ready-made sweeps",
}
PLAIN_KEYS = ("bits", "sparsity", "seed", "force", "timing", "paths", "steps")
USAGE = """\
Compare LLM inference optimizations: one protocol, one record per run.

    python -m harness method=gptq bits=3                  one run, compared with the dense model
    python -m harness -m method=awq,gptq bits=3,4         a sweep: every combination
    python -m harness 'method=[sparsegpt,gptq]' bits=4    one method after the other, on the same model
    python -m harness experiment=table_1                  a ready-made sweep
    python -m harness.tables table_1                      the table, from records only
    python -m harness.advise max_perplexity_increase=5%   what to use, and why nothing else
    python -m harness.show results/records/….json         everything behind one row
    python -m harness.verify results/records/….json       run a record again and compare

Change any value with key=value (method.grid.group_size=32, calibration.samples=64, paths.results=DIR, force=true);
of a method in a stack, with steps.gptq.method.grid.group_size=32.
A sweep runs on several GPUs with hydra/launcher=parallel, on a cluster with hydra/launcher=slurm; timing=later does all
but the timing, for many runs at once (docs/sweeps.md).
Show the whole configuration with --cfg job, Hydra's own options with --hydra-help.
"""


def main() -> None:
    """Entry of `python -m harness`."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
        print(help_text())
        return
    problem = check_names(arguments) or launching.missing(arguments)
    if not problem:
        try:
            overrides = stacks.register(arguments)
            if not _sweeps(arguments) and (several := _of_several_values(overrides)):
                again = shlex.join(["python", "-m", "harness", "-m", *arguments])
                raise ConfigError(f"{several}: several values make a sweep, which -m asks for: {again}")
            sys.argv[1:] = sweepable(overrides)
            if _sweeps(arguments):
                _check_first_job(sys.argv[1:])
            _check_results_folder(arguments)
        except ConfigError as error:
            problem = str(error)
    if problem:
        _refuse(problem)
    signal.signal(signal.SIGTERM, _terminated)
    from hydra.errors import HydraException

    own_words = not _sweeps(arguments) and "HYDRA_FULL_ERROR" not in os.environ  # a sweep's end is told by its summary
    try:
        import hydra

        os.environ["HARNESS_PROCESS"] = str(os.getpid())
        if own_words:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors of composing come here instead of being printed
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job)()
    except HydraException as error:
        if not own_words:
            raise
        _refuse(_explained(error, overrides))
    except SystemExit:
        from harness.sweep import close_cut_short, was_cut_short

        if not was_cut_short():
            raise
        sys.exit(close_cut_short() or 1)
    except KeyboardInterrupt as interrupt:
        status = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        print("\ninterrupted: finished work is kept; the same command goes on from there", file=sys.stderr, flush=True)
        sys.exit(status)


def _refuse(problem: str) -> NoReturn:
    print(redact(problem), file=sys.stderr)
    sys.exit(2)


def _terminated(number: int, _frame: Any) -> None:
    """A scheduler that takes the machine back is answered as Ctrl-C is: stages are ended, what is finished is kept."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some send it more than once
    raise KeyboardInterrupt(number)


def help_text() -> str:
    """Every choice of every group with its first line, read from the configuration files."""
    lines = [USAGE]
    for group, purpose in GROUPS.items():
        lines.append(f"{group}=   ({purpose})")
        names = options(group)
        width = max(len(name) for name in names) + 2
        lines += [f"  {name:<{width}}{one_line(group, name)}" for name in names]
        lines.append("")
    return "\n".join(lines)


def options(group: str) -> list[str]:
    """Names that a group knows: its files."""
    return sorted(file.relative_to(CONF / group).with_suffix("").as_posix() for file in (CONF / group).glob("*.yaml"))


def one_line(group: str, name: str) -> str:
    """The first comment of a configuration file, packages aside."""
    for line in (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


def check_names(arguments: Sequence[str]) -> str:
    """What is wrong with the names in the overrides, with the valid ones and the nearest; empty when nothing is.

    Values that sweep by a function, such as glob(*), are left to Hydra.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            if (name := key.lstrip("-")) in (*GROUPS, *PLAIN_KEYS):
                return f"{key}: written without dashes, as {name}={value or 'VALUE'}"
            continue
        if before.startswith("-") and before not in ("-m", "--multirun"):  # what the option is set to: --cfg job
            continue
        if not equals:
            if argument.startswith("~"):
                continue
            group = next((group for group in GROUPS if argument in options(group)), None)
            return f"{argument!r} is no KEY=VALUE." + (f" Did you mean {group}={argument}?" if group else "")
        key = key.lstrip("+~")
        group, _, _package = key.partition("@")
        first = group.partition(".")[0]
        if first not in GROUPS and first not in PLAIN_KEYS and not first.startswith("hydra") and first != "card":
            return unknown("option", first, [*GROUPS, *PLAIN_KEYS])
        if group not in GROUPS or "(" in value or "$" in value:
            continue
        place = re.search(rf"\+?{group}@[\w.]+", GROUPS[group])
        if place and group == key:
            return f"{argument}: say what it is of, as in {place[0]}={value}"
        valid = options(group)
        for name in re.split(r"[,+]" if group == "method" else ",", re.sub(r"[\[\]]", "", value)):
            name = name.strip().strip("'\"")
            if name not in valid and name not in ("null", ""):
                return unknown(group, name, valid)
    return ""


def _check_results_folder(arguments: Sequence[str]) -> None:
    """Raises ConfigError where results cannot be written: Hydra's own folder is the first thing below."""
    if any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments):
        return  # nothing is run
    named = [value for key, _, value in (argument.partition("=") for argument in arguments) if key == "paths.results"]
    folder = Path(named[-1].strip("'\"") if named else "results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"paths.results={folder}: {error.strerror}; name a folder that can be written") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"paths.results={folder}: no permission to write there; name another folder")


def _sweeps(arguments: Sequence[str]) -> bool:
    """Whether these arguments ask for a sweep."""
    return any(
        argument in ("-m", "--multirun", "hydra.mode=MULTIRUN") or argument.startswith("experiment=")
        for argument in arguments
    )


def _of_several_values(overrides: Sequence[str]) -> str:
    """The first override that Hydra would sweep over; empty when each has one value.

    Raises ConfigError for text that is no override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        if text.startswith("-") or "=" not in text:
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            key, _, value = text.partition("=")
            quoted = f"{key}='{value}'"
            raise ConfigError(
                f"{text}: cannot be read; a value with brackets, commas, = or quotes needs quotes of its own: "
                f'"{quoted}"'
            ) from error
        if override.is_sweep_override():
            return text
    return ""


def _check_first_job(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a key that the first job of a sweep has no place for: Hydra ends there, in its words."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    first = []
    try:
        for override in parser.parse_overrides([text for text in overrides if "=" in text and text[0] != "-"]):
            line = override.input_line
            if override.is_sweep_override():
                line = f"{line.partition('=')[0]}={next(override.sweep_string_iterator())}"
            first.append(line)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides=first)
    except HydraException as error:
        if re.search(r"Could not override '[\w.]+'", str(error)):
            raise ConfigError(_explained(error, first)) from error


def _explained(error: Exception, overrides: Sequence[str]) -> str:
    """What Hydra could not compose; of a name that no value has, the nearest one and those that there are."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import DictConfig

    found = re.search(r"Could not override '([\w.@/]+)'", str(error))
    if found is None:
        return str(error)
    key = found[1]
    if "@" in key:
        method = next((text for text in overrides if text.startswith("method=")), "the default method")
        return f"{key}: {method} has no such part; --cfg job shows what it has"
    others = [text for text in overrides if "=" in text and text.partition("=")[0] != key and text[0] not in "-~"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = compose("config", overrides=others)
    except HydraException:
        return str(error)
    place = ""
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return f"unknown option {key!r}: {place.rstrip('.')} is one value and has no parts"
        if name not in node:
            break
        node, place = node[name], f"{place}{name}."
    valid = [f"{place}{known}" for known in node if not str(known).startswith("_")]
    return unknown("option", place + name, valid) + _where_it_is_known(place.rstrip("."), name)


def _where_it_is_known(group: str, name: str) -> str:
    """The choices of a group whose files have a value of this name; empty for none."""
    known = [
        option
        for option in (options(group) if group in GROUPS else [])
        if re.search(rf"^ *{name}:", (CONF / group / f"{option}.yaml").read_text(encoding="utf-8"), flags=re.M)
    ]
    return f"\n{group}.{name} is known to {group}={', '.join(known)}" if known else ""


def sweepable(arguments: list[str]) -> list[str]:
    """Overrides of a sweep, those of a method's own values as ones that every composition accepts.

    Before a sweep Hydra composes the configuration of no job at all, with the default method, whose configuration has
    no such value. A value that a method of the sweep does not know is refused when its job is built.
    """
    if not _sweeps(arguments):
        return arguments
    return [f"++{argument}" if re.match(r"method\.[\w.]+=", argument) else argument for argument in arguments]


def unknown(what: str, name: str, valid: list[str]) -> str:
    """A message for a name that is not known."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown {what} {name!r}.{hint}\nValid: {', '.join(valid)}"


def resolve(cfg: Any) -> tuple[dict[str, Any], Paths, bool, Timing]:
    """Hydra's configuration as plain values, the folders, whether to run again, and when to time: what `run` takes."""
    from omegaconf import OmegaConf

    from harness.wheels import default_cache

    config = OmegaConf.to_container(stacks.flatten(cfg), resolve=True)
    paths = config.pop("paths")
    force, timing = config.pop("force"), config.pop("timing")
    if not isinstance(force, bool):  # "no" is a string here, and true
        raise ConfigError(f"force={force}: must be true or false")
    if not isinstance(config["seed"], int) or isinstance(config["seed"], bool) or config["seed"] < 0:
        raise ConfigError(f"seed={config['seed']}: must be a whole number, 0 or more")
    config["model"].setdefault("name", f"local-{Path(config['model'].get('path') or '').stem}")
    cache = Path(paths["cache"]) if paths["cache"] else default_cache()
    return config, Paths(Path(paths["results"]).absolute(), cache.absolute()), force, timing


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], Paths, bool, Timing]:
    """One run's configuration from its overrides, without Hydra's command line, as `resolve` returns it.

    Raises ConfigError for a name or a value that no file knows.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    problem = check_names(overrides)
    if problem:
        raise ConfigError(problem)
    overrides = stacks.register(overrides)
    if several := _of_several_values(overrides):
        raise ConfigError(f"{several}: one run has one value; call it for each")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=[*overrides, "hydra.mode=RUN"])
        return resolve(cfg)
    except HydraException as error:
        raise ConfigError(_explained(error, overrides)) from error


def _job(cfg: Any) -> None:
    """One composed configuration, run to its end. In a sweep the outcome goes to a file, for the summary."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from harness.sweep import begin, remember

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    group = f"sweep {folder.parent.name}" if sweeping else None
    try:
        config, paths, force, timing = resolve(cfg)
        tracker = make(config["tracker"], "tracker", {"group": group})
        if sweeping:
            begin(config, paths, describe(config), folder)
            launching.settle()
            launching.share_devices(hydra_config.launcher._target_, config["hardware"]["device"], folder.parent)
    except (OmegaConfBaseException, ConfigError) as error:
        outcome = Outcome("refused", "configuration", str(error))
    else:

        def track(record: RunRecord) -> None:
            place = tracker.log(record, paths.results)
            if place:
                _say(f"  tracked: {place}")

        outcome = run(config, paths, force, timing, say=_say, track=track)
    _report(outcome)
    if sweeping:
        try:
            remember(outcome, folder)
        except OSError as error:  # without it the summary and the exit status would be wrong
            print(f"could not write to {folder}: {error.strerror}; the sweep ends here", file=sys.stderr, flush=True)
            sys.exit(1)
        return
    if outcome.status in ("refused", "failed"):
        sys.exit(2 if outcome.status == "refused" else 1)
    print(_table([outcome]))


def _say(line: str) -> None:
    print(line, flush=True)


def _report(outcome: Outcome) -> None:
    if outcome.status in ("refused", "failed"):
        print(redact(f"{outcome.title}: {outcome.status}: {outcome.reason}"), file=sys.stderr, flush=True)
    else:
        what = "already recorded" if outcome.status == "skipped" else "finished"
        _say(f"{outcome.title}: {outcome.reason if outcome.path is None else f'{what}, {outcome.path}'}")


def _table(outcomes: list[Outcome]) -> str:
    from harness.sweep import table_of

    return table_of([path for outcome in outcomes for path in (outcome.baseline, outcome.path) if path is not None])
