"""Questions with right answers, through lm-evaluation-harness, from the hub or from local files."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.json_lines import json_rows
from harness.records import Measurement
from harness.sanity import AT_CHANCE

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.task import ConfigurableTask

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

BUILT_IN = Path(__file__).parents[1] / "tasks"
METRICS = {"acc": "accuracy", "exact_match": "accuracy", "acc_norm": "accuracy_norm"}  # lm-eval's name: ours
TEMPLATES_KEPT = 1024
ARMS = ["task", "filter", "metric", "doc_id", "on"]  # what identifies an outcome in both arms


@dataclass(frozen=True)
class Tasks:
    """Accuracy on lm-eval tasks, every question's outcome kept.

    tasks: names of built-in (`wikipedia_cloze`) or packaged lm-eval tasks and groups.
    limit: a seeded sample of so many questions per task, the same for every model; None asks all.
    data: a folder of `<task>/<split>.jsonl` with the rows that the packaged task reads (or its processed form),
        instead of the hub; nothing then touches the network.
    batch: questions scored or answered at once.
    few_shot: worked examples before each question; None takes the task's own number.
    chat_template: put the question as a user's message into the model's chat template.
    """

    tasks: list[str]
    limit: int | None = 200
    data: str | None = None
    batch: int = 16
    few_shot: int | None = None
    chat_template: bool = False

    stage: ClassVar[Stage] = "evaluate"
    compares: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"hidden states"})

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks: name at least one, e.g. tasks=[wikipedia_cloze]")
        for field, least in (("limit", 1), ("batch", 1), ("few_shot", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(f"tasks {field}={value}: must be at least {least}")
        for name in self.tasks:
            path = definition_of(name)
            if self.data is not None and path.parent.parent != BUILT_IN:
                _local_files(Path(self.data), name)

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Accuracy per task and, against the dense run, flips and the paired difference."""
        if self.chat_template and not lm.tokenizer.chat_template:
            raise RunError("chat_template=true, but this model's tokenizer has no chat template; set it to false")
        tasks: dict[str, ConfigurableTask] = {}
        about: dict[str, str] = {}
        with _quiet():
            for name in self.tasks:
                for task, source in self._load(name, context):
                    tasks[task.config.task] = task
                    about[task.config.task] = self._describe(task, source, context.seed)
            outcomes = self._outcomes(lm, context, tasks, about)
        context.samples.mkdir(parents=True, exist_ok=True)
        outcomes.to_parquet(context.samples / self._outcomes_file, index=False)
        dense = None if context.reference is None else _dense(context.reference / self._outcomes_file)
        generator = np.random.default_rng(context.seed)
        for (metric, on), ours in outcomes.groupby(["metric", "on"], sort=False):
            both = None if dense is None else _paired(ours, dense)
            arms = [ours["correct"]] if both is None else [both["correct"], both["correct_dense"]]
            yield accuracy(metric, ours["correct"].to_numpy(), on, _guessed(ours["chance"].mean(), *arms))
            if both is not None:
                yield from against(metric, both, on, generator)

    @property
    def _outcomes_file(self) -> str:
        """Outcomes of two sets of tasks, or of one asked in two ways, may lie side by side."""
        shots = "" if self.few_shot is None else f"-{self.few_shot}shot"
        return f"tasks-{'-'.join(self.tasks)}{shots}{'-chat' if self.chat_template else ''}.parquet"

    def _load(self, name: str, context: Context) -> Iterator[tuple[ConfigurableTask, str]]:
        """The task, or every task of a group, with a word on where its questions come from."""
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        definition = definition_of(name)
        folder = None if self.data is None else Path(self.data)
        if definition.parent.parent == BUILT_IN:
            folder = _built_in_data(name, context)
        config = load_yaml(definition)
        if folder is None and "group" not in config:
            yield ConfigurableTask(config=self._own(config)), ""
        elif folder is None:
            loaded = TaskManager().load([name])  # reads every packaged task: ten seconds that only groups cost
            for task in loaded["tasks"].values():
                if self.few_shot is not None and task.config.num_fewshot != 0:  # as in `_own`
                    task.set_config("num_fewshot", self.few_shot)
                yield task, ""
        else:
            files = _local_files(folder, name)
            yield ConfigurableTask(config=self._own(_localised(config, files))), f", file {_digest(files)}"

    def _own(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration without what only an index of tasks reads, and with our number of examples."""
        own = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
        fixed_at_zero = config.get("num_fewshot") == 0  # the task cannot take examples
        if self.few_shot is not None and not fixed_at_zero:
            own["num_fewshot"] = self.few_shot
        own.setdefault("num_fewshot", 0)
        if own["num_fewshot"] and "custom_dataset" in own and own.get("fewshot_split") is None:
            raise RunError(
                f"{config['task']} wants {own['num_fewshot']} worked examples and {self.data} has no "
                f"{config['task']}/train.jsonl to take them from; add it or set few_shot=0"
            )
        return own

    def _describe(self, task: ConfigurableTask, source: str, seed: int) -> str:
        total = len(task.eval_docs)
        asked = f"{total} questions"
        if self.limit is not None and self.limit < total:
            asked = f"{self.limit} of {total} questions (sample {seed})"
        template = ", chat template" if self.chat_template else ""
        shots = task.config.num_fewshot or 0
        return f"{task.config.task} v{task.VERSION}, {shots}-shot{template}, {asked}{source}"

    def _outcomes(
        self, lm: LanguageModel, context: Context, tasks: dict[str, ConfigurableTask], about: dict[str, str]
    ) -> pd.DataFrame:
        """One row per question and metric: task, filter, metric, doc_id, on (its protocol), correct (0 or 1), chance.

        chance: of guessing right among the choices; none (NaN) where the answer is written.
        """
        import pandas as pd
        from lm_eval.evaluator import evaluate

        from harness.engines.lm_eval import EngineLM

        for task in tasks.values():
            task.set_fewshot_seed(context.seed)
        chosen = {name: self._sample(name, len(task.eval_docs), context.seed) for name, task in tasks.items()}
        found = evaluate(
            EngineLM(lm, self.batch, context.progress),
            {"tasks": tasks},
            samples=chosen,
            bootstrap_iters=0,  # our own intervals; theirs would seed and draw from global generators
            apply_chat_template=self.chat_template,
            fewshot_as_multiturn=self.chat_template,
        )["samples"]
        rows = [
            (
                name,
                sample["filter"],
                METRICS[metric],
                sample["doc_id"],
                about[name] + ("" if sample["filter"] == "none" else f", {sample['filter']}"),
                _right_or_wrong(sample[metric], name, metric),
                1 / len(sample["arguments"]) if tasks[name].OUTPUT_TYPE == "multiple_choice" else float("nan"),
            )
            for name, samples in found.items()
            for sample in samples
            for metric in METRICS
            if metric in sample["metrics"]
        ]
        for name in tasks.keys() - {row[0] for row in rows}:
            raise RunError(f"{name} marks no question right or wrong (needs one of {', '.join(METRICS)}); leave it out")
        return pd.DataFrame(rows, columns=[*ARMS, "correct", "chance"]).sort_values(
            ["task", "filter", "metric", "doc_id"], kind="stable", ignore_index=True
        )

    def _sample(self, name: str, count: int, seed: int) -> list[int]:
        """Which questions are asked: ascending indices, drawn by task name and seed alone."""
        if self.limit is None or self.limit >= count:
            return list(range(count))
        key = int.from_bytes(hashlib.sha256(f"{name}|{seed}".encode()).digest()[:8], "big")
        return sorted(np.random.default_rng(key).choice(count, self.limit, replace=False).tolist())


# ---- definitions and data


def definition_of(name: str) -> Path:
    """The YAML that defines a task or group, found by its text: indexing all of lm-eval's takes ten seconds.

    Raises ConfigError with the nearest names for one that does not exist.
    """
    built_in = BUILT_IN / name / f"{name}.yaml"
    if built_in.is_file():
        return built_in
    package = importlib.util.find_spec("lm_eval")
    if package is None:
        raise ConfigError("tasks need the package lm-eval: pip install lm-eval")
    files = _yaml_files(Path(package.submodule_search_locations[0], "tasks"))
    names = {built.name for built in BUILT_IN.iterdir() if built.is_dir()}
    for path in sorted(files, key=lambda path: path.stem != name):  # nearly always the one that is named like it
        defined = _defined_in(path)
        if name in defined:
            return path
        names |= defined
    near = difflib.get_close_matches(name, sorted(names), n=3)
    raise ConfigError(f"unknown task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


@cache
def _yaml_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


def _defined_in(path: Path) -> set[str]:
    """Tasks and groups that a YAML file defines."""
    pattern = rb"^(?:task|group):[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*(?:#.*)?$"
    return {match.decode() for match in re.findall(pattern, path.read_bytes(), re.MULTILINE)}


def _local_files(folder: Path, name: str) -> dict[str, Path]:
    """The JSON Lines files of a task by split; ConfigError where there is none."""
    files = {path.stem: path for path in sorted((folder / name).glob("*.jsonl"))}
    if not files:
        raise ConfigError(f"tasks data={folder}: no {name}/<split>.jsonl there; add it or drop data to use the hub")
    return files


def _digest(files: dict[str, Path]) -> str:
    content = hashlib.sha256()
    for split in sorted(files):
        content.update(files[split].read_bytes())
    return content.hexdigest()[:8]


def _localised(config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """A task's configuration that reads local files; splits that have no file are dropped."""
    local = dict(config)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if local.get(key) not in files:
            local[key] = None
    if not (local["validation_split"] or local["test_split"]):
        wanted = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
        raise RunError(
            f"{config['task']} asks questions of the split {' or '.join(wanted)}; "
            f"the folder has {', '.join(files)}.jsonl"
        )
    local["fewshot_split"] = local["fewshot_split"] or local["training_split"]
    process = local.pop("process_docs", None)
    local["custom_dataset"] = lambda **_: {split: _processed(_rows(path), process) for split, path in files.items()}
    return local


def _rows(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(json_rows(path)))


def _processed(rows: Any, process: Callable[[Any], Any] | None) -> Any:
    """Rows as the task's `process_docs` leaves them; files that hold them so already lack the published fields."""
    try:
        return rows if process is None else process(rows)
    except KeyError:
        return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of lm-eval and datasets: progress is ours to show. Templates are compiled once.

    lm-eval compiles a task's few templates anew for every question, most of the time that it takes beside the model.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from tqdm import tqdm

    logger, templates = logging.getLogger("lm_eval"), lm_eval.utils.env
    level, bar, shown = logger.level, lm_eval.api.task.tqdm, not datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.utils.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    templates.from_string = lru_cache(TEMPLATES_KEPT)(templates.from_string)
    try:
        yield
    finally:
        del templates.from_string  # the class's own is back
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if shown:
            datasets.utils.enable_progress_bars()


def _built_in_data(name: str, context: Context) -> Path:
    """The folder with the questions of the built-in task, made from the embedded text when they are not there."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    from harness.corpus import WikipediaSample
    from harness.records import write_text_atomically

    make = _import_func_in_yml("utils.questions", BUILT_IN / name)
    folder = context.cache / "tasks"
    lines = [json.dumps(row, ensure_ascii=False) for row in make(WikipediaSample().documents("evaluation"))]
    write_text_atomically("\n".join(lines) + "\n", folder / name / "test.jsonl")
    return folder


# ---- outcomes


def _right_or_wrong(outcome: Any, task: str, metric: str) -> int:
    """1 or 0. Raises RunError for a share, which some tasks give under the name of a metric that is right or wrong."""
    if outcome not in (0, 1):
        raise RunError(
            f"{task} gives a question {metric}={outcome:.3g}, which is neither right nor wrong: intervals and tests "
            "here are of right answers; leave it out (of truthfulqa, truthfulqa_mc1 is right or wrong)"
        )
    return int(outcome)


def _dense(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        raise RunError(f"{path.name}: the dense run kept no outcomes; run it again (method=dense force=true)")
    return pd.read_parquet(path)


def _paired(ours: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """Both arms' outcomes of the same questions: columns correct, correct_dense."""
    known = [name for name in ARMS if name in dense]  # outcomes of an older version name no protocol
    both = ours.merge(dense[[*known, "correct"]], on=known, how="left", suffixes=("", "_dense"))
    if both["correct_dense"].isna().any():
        raise RunError(
            f"the dense run was asked other questions of {ours['task'].iloc[0]}, or in another way; run it again "
            "(method=dense force=true), and ask the same tasks in one probe alone where several differ in data or limit"
        )
    return both


def _guessed(chance: float, ours: pd.Series, dense: pd.Series | None = None) -> str:
    """For an arm whose interval reaches down to what guessing gives: collapsed, if the dense one's does not."""
    low, *others = (statistics.wilson_interval(int(arm.sum()), len(arm))[0] for arm in (ours, dense) if arm is not None)
    if not low <= chance:
        return ""
    return f"{'collapsed' if others and others[0] > chance else AT_CHANCE} ({100 * chance:.0f} %)"


def accuracy(metric: str, correct: np.ndarray, on: str, note: str = "") -> Measurement:
    """The share of right answers, outcomes 0 or 1 [N], with its Wilson interval."""
    interval = statistics.wilson_interval(int(correct.sum()), len(correct))
    return Measurement(metric, float(correct.mean()), "share", on, "higher", interval, note)


def against(metric: str, both: pd.DataFrame, on: str, generator: np.random.Generator) -> Iterator[Measurement]:
    """Flips and the difference in accuracy from the dense run, on the same questions."""
    ours, dense = both["correct"].to_numpy() == 1, both["correct_dense"].to_numpy() == 1
    norm = "_norm" if metric.endswith("_norm") else ""
    flips, gained, lost = int((ours != dense).sum()), int((ours & ~dense).sum()), int((dense & ~ours).sum())
    note = f"McNemar p = {statistics.mcnemar(gained, lost):.3g}; {gained} gained, {lost} lost"
    interval = statistics.wilson_interval(flips, len(both))
    yield Measurement(f"flips{norm}", flips / len(both), "share", on, "lower", interval)
    difference = (gained - lost) / len(both)
    interval = statistics.paired_difference_interval(ours, dense, 1, generator)
    yield Measurement(f"accuracy{norm}_difference", difference, "share", on, "higher", interval, note)
