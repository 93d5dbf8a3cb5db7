"""Every option of every group composes and can be built; methods differ in nothing but themselves."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness import run, stacks
from harness.cli import GROUPS, check_names, one_line, options, resolve, sweepable
from harness.errors import ConfigError
from harness.run import CONF, make

METHODS = options("method")
COMPRESSING = [name for name in METHODS if name != "dense"]


def configuration(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, "hydra.mode=RUN"], return_hydra_config=False)


def resolved(*overrides: str) -> dict:
    return resolve(configuration(*overrides))[0]


@pytest.mark.parametrize("group", list(GROUPS))
def test_every_option_says_what_it_is_in_one_line(group):
    assert options(group)
    for name in options(group):
        assert 10 < len(one_line(group, name)) < 160, name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_and_builds(method):
    config = resolved(f"method={method}")
    parts = run.build(config)
    assert hasattr(parts.method, "compress")
    assert config["card"]["name"] == method
    assert {"title", "taxonomy", "paper", "bits", "calibrates", "departures", "version"} <= set(config["card"])


@pytest.mark.parametrize("method", [m for m in METHODS if "/grid@" in (CONF / "method" / f"{m}.yaml").read_text()])
def test_a_row_has_the_bits_of_its_grids_also_where_they_were_changed(method):
    text = (CONF / "method" / f"{method}.yaml").read_text()
    place = "method.inner" if "/grid@method.inner." in text else "method"
    others = [f"inputs@{place}.inputs=none"] if "/inputs@" in text else []
    card = resolved(f"method={method}", "bits=6", f"grid@{place}.grid=int_tensor", *others)["card"]
    assert (card["bits"], card.get("activation_bits")) == (6, None)


@pytest.mark.parametrize("probe", options("probe"))
def test_any_probe_can_be_added_to_an_evaluation(probe):
    added = f"+probe@evaluation.probes.added={probe}"
    assert check_names([added]) == ""
    if probe in ("problems", "tasks", "load"):  # need questions of the configuration around them, or another engine
        return
    assert run.build(resolved("evaluation=smoke", added)).probes


@pytest.mark.parametrize("model", [name for name in options("model") if name != "local"])
def test_every_model_composes_and_builds(model):
    section = resolved(f"model={model}")["model"]
    assert make(section, "model").name == section["name"] == model


@pytest.mark.parametrize("random_model", [name for name in options("model") if name.startswith("random-")])
def test_random_models_have_a_shape_that_transformers_knows(random_model):
    from transformers import AutoConfig

    section = resolved(f"model={random_model}")["model"]
    config = AutoConfig.for_model(section["architecture"], **section["shape"])
    for field, value in section["shape"].items():
        assert getattr(config, field) == value, field


@pytest.mark.parametrize("hardware", options("hardware"))
def test_every_hardware_composes(hardware):
    section = resolved(f"hardware={hardware}")["hardware"]
    assert make(section, "hardware", {"_target_": "harness.environment.Hardware"}).name == hardware


@pytest.mark.parametrize("evaluation", options("evaluation"))
def test_every_evaluation_builds_probes(evaluation):
    engine = "vllm" if evaluation == "served" else "transformers"  # the one that it is for
    parts = run.build(resolved(f"engine={engine}", f"evaluation={evaluation}"))
    assert {probe.stage for probe in parts.probes} <= {"evaluate", "time"}


@pytest.mark.parametrize("engine", options("engine"))
def test_every_engine_composes_and_builds(engine):
    assert run.build(resolved(f"engine={engine}")).engine.name == engine


@pytest.mark.parametrize("corpus", [name for name in options("corpus") if not name.startswith("text")])
def test_every_corpus_builds(corpus):
    assert run.build(resolved(f"corpus={corpus}")).corpus.name == corpus


def test_a_text_file_of_the_user_s_builds(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one\n\ntwo", encoding="utf-8")
    corpus = run.build(resolved("corpus=text", f"corpus.path={file}")).corpus
    assert corpus.calibration.documents("calibration") == ["one", "two"]
    paths = [f"corpus.{side}.path={file}" for side in ("calibration", "evaluation")]
    assert run.build(resolved("corpus=text-pair", *paths)).corpus.evaluation.documents("evaluation") == ["one\n\ntwo"]


@pytest.mark.parametrize("calibration", options("calibration"))
def test_every_calibration_builds(calibration):
    config = resolved(f"calibration={calibration}")
    assert run.build(config).corpus.samples == config["calibration"]["samples"]


@pytest.mark.parametrize("grid", options("grid"))
def test_every_grid_composes_into_a_method(grid):
    config = resolved("method=rtn", f"grid@method.grid={grid}", "bits=3")
    fixed = {"nf4": 4, "fp4": 4, "e2m1": 4, "int8": 8, "e4m3": 8}
    assert config["card"]["bits"] == fixed.get(grid.partition("_")[0], 3)
    run.build(config)


@pytest.mark.parametrize("inputs", options("inputs"))
def test_every_input_grid_composes_into_a_method(inputs):
    config = resolved("method=rtn", f"inputs@method.inputs={inputs}", "bits=3")
    built = make({**config["method"]["inputs"]}, "inputs")
    assert config["card"]["activation_bits"] == (None if inputs == "none" else built.bits)
    assert config["card"]["bits"] == 3


@pytest.mark.parametrize("tracker", options("tracker"))
def test_every_tracker_builds(tracker):
    assert hasattr(make(resolved(f"tracker={tracker}")["tracker"], "tracker"), "log")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_and_sweeps_over_known_names(experiment):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    params = OmegaConf.to_container(cfg.hydra.sweeper.params) if cfg.hydra.sweeper.params else {}
    assert cfg.hydra.mode.name == "MULTIRUN"
    names = str(params.get("method", ""))
    if "(" not in names:
        assert set(names.split(",")) <= set(METHODS)


def test_changing_the_method_changes_nothing_else():
    """Equal terms: calibration, text, evaluation, seed and grid come from shared configuration.

    What questions are asked, and of whom, is part of some methods: they bring their own unless told otherwise.
    """
    first = resolved("method=rtn", "bits=3")
    common = first["method"]["grid"]
    for config in (resolved(f"method={name}", "bits=3") for name in COMPRESSING):
        for section in set(first) - {"method", "card", "problems", "text_teacher"}:
            assert config[section] == first[section], (config["card"]["name"], section)
        grid = config["method"].get("grid")
        if grid and not config["card"]["departures"]:
            assert grid.get("group_size", 64) == common["group_size"], config["card"]["name"]
            assert grid == common or grid["_target_"] != common["_target_"], config["card"]["name"]


def test_the_shared_grid_is_the_same_for_all_integer_methods():
    grids = [resolved(f"method={name}")["method"].get("grid") for name in ("rtn", "gptq", "awq")]
    assert grids[0] == grids[1] == grids[2]


def test_a_sweep_axis_that_a_method_does_not_read_is_one_run():
    three, four = (resolved("method=dense", f"bits={bits}") for bits in (3, 4))
    assert run.identity(three) == run.identity(four)


def test_what_calibrates_depends_on_the_calibration_and_what_does_not_does_not():
    def digest(method, samples):
        return run.digest_of(run.identity(resolved(f"method={method}", f"calibration.samples={samples}")))

    assert digest("rtn", 4) == digest("rtn", 8)
    assert digest("dense", 4) == digest("dense", 8)
    assert digest("gptq", 4) != digest("gptq", 8)


def test_changing_the_evaluation_does_not_compress_again():
    quick, smoke = (run.identity(resolved("method=gptq", f"evaluation={name}")) for name in ("quick", "smoke"))
    assert quick != smoke
    assert run.compression_identity(quick) == run.compression_identity(smoke)


def test_changing_one_calibration_value_does():
    few, many = (run.identity(resolved("method=gptq", f"calibration.samples={n}")) for n in (4, 8))
    assert run.compression_identity(few) != run.compression_identity(many)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=rtn", "bits=9"], r"bits.*9.*2"),
        (["method=rtn", "bits=three"], "bits"),
        (["method=gptq", "method.damping=-1"], "damping"),
        (["method=gptq", "+method.dampling=1"], "dampling"),
        (["calibration.samples=0"], r"samples=0"),
        (["hardware.scoring_dtype=int3"], "scoring_dtype=int3"),
        (["corpus=text", "corpus.path=/nowhere.txt"], "nowhere.txt"),
        (["model=local", "model.path=/nowhere"], "nowhere"),
        (["hardware=h100"], "CUDA"),
    ],
)
def test_bad_values_are_refused_by_build_with_the_value_in_the_message(overrides, message):
    import torch

    if overrides == ["hardware=h100"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=message):
        run.build(resolved(*overrides))


# ------------------------------------------------------------------------------------------------------- stacks


def stacked(*overrides: str) -> dict:
    return resolved(*stacks.register(overrides))


def test_a_stack_is_its_methods_in_order():
    for order in (["sparsegpt", "gptq"], ["gptq", "sparsegpt"]):
        config = stacked(f"method=[{','.join(order)}]", "bits=3", "sparsity=0.3")
        alone = [resolved(f"method={name}", "bits=3", "sparsity=0.3") for name in order]
        assert config["method"]["steps"] == [one["method"] for one in alone]
        assert config["card"]["name"] == "+".join(order)
        assert config["card"]["bits"] == 3
        assert run.build(config).method.names == order


def test_one_step_of_a_stack_can_be_changed():
    config = stacked("method=[wanda,gptq]", "steps.gptq.method.grid.group_size=32", "steps.wanda.method.scope=layer")
    assert config["method"]["steps"][1]["grid"]["group_size"] == 32
    assert config["method"]["steps"][0]["scope"] == "layer"
    swapped = stacked("method=[wanda,rtn]", "grid@steps.rtn.method.grid=nf4", "bits=8")
    assert swapped["method"]["steps"][1]["grid"]["kind"] == "nf4"
    assert swapped["card"]["bits"] == 4  # the references of a step are to its own method


def test_stacks_sweep_beside_methods():
    written = stacks.register(["-m", "method=[wanda, gptq],rtn,[magnitude,rtn,kv_cache]", "bits=3,4"])
    assert written == ["-m", "method=wanda+gptq,rtn,magnitude+rtn+kv_cache", "bits=3,4"]
    three = resolved("method=magnitude+rtn+kv_cache", "bits=8")
    assert [three["card"][key] for key in ("bits", "activation_bits", "key_value_bits")] == [8, None, 8]


@pytest.mark.parametrize("wrong", ["[gptq,gptq]", "[dense,gptq]"])
def test_stacks_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match="stands once in a stack"):
        stacks.register([f"method={wrong}"])


def test_a_wrong_name_in_a_stack_is_named():
    assert "unknown method 'gptqq'. Did you mean gptq?" in check_names(["method=[wanda,gptqq]"])


def test_a_value_of_a_method_can_be_set_for_a_whole_sweep():
    """Hydra first composes the default method with it, which has no such value."""
    swept = ["-m", "method=rtn,gptq", "method.grid.group_size=32", "bits=3"]
    for method in ("dense", "rtn", "gptq"):
        own = [f"method={method}", *sweepable(swept)[2:]]
        config = resolved(*own)
        assert config["method"]["grid"]["group_size"] == 32
        if method != "dense":
            run.build(config)
    assert sweepable(swept[1:]) == swept[1:]  # one run: a wrong name is Hydra's to refuse
    with pytest.raises(ConfigError, match="dampling"):
        run.build(resolved("method=gptq", *sweepable(["-m", "method.dampling=1"])[1:]))


# ------------------------------------------------------------------------------------------- students of words


@pytest.mark.parametrize("problems", options("problems"))
def test_all_problems_compose_and_build_or_say_that_they_need_a_file(problems):
    config = resolved(f"problems={problems}")["problems"]
    if config.get("path") == "" and not config.get("repository"):
        with pytest.raises(ConfigError, match="path=FILE"):
            make(config, "problems")
    else:
        assert hasattr(make(config, "problems"), "read")


@pytest.mark.parametrize("teacher", options("text_teacher"))
def test_every_teacher_of_words_composes_and_builds_or_says_what_it_needs(teacher):
    config = resolved(f"text_teacher={teacher}")["text_teacher"]
    if teacher.startswith("recorded") or teacher == "endpoint":
        with pytest.raises(ConfigError, match=r"text_teacher\.(path=FILE|model=NAME)"):
            make(config, "text_teacher")
    else:
        assert hasattr(make(config, "text_teacher"), "opened")


def test_students_are_asked_as_they_are_taught_and_so_is_what_they_are_compared_with():
    config = resolved("method=step_by_step", "evaluation=answers")
    probe = config["evaluation"]["probes"]["answers"]
    assert probe["decoding"] == config["method"]["decoding"]
    assert probe["problems"] == config["method"]["problems"] == config["problems"]
    twin = run.dense_twin(config)
    assert twin["evaluation"]["probes"]["answers"] == probe
    assert resolved("method=dense", "evaluation=answers")["evaluation"]["probes"]["answers"]["decoding"] is None


def test_a_student_that_is_quantized_is_still_asked_as_it_was_taught():
    config = stacked("method=[step_by_step,rtn]", "evaluation=answers")
    taught = resolved("method=step_by_step")["method"]["decoding"]
    assert config["evaluation"]["probes"]["answers"]["decoding"] == config["method"]["decoding"] == taught
    assert run.build(config).method.decoding.new_tokens == 64


def test_a_folder_of_tasks_is_named_by_what_is_in_it(tmp_path):
    file = tmp_path / "arc_easy" / "test.jsonl"
    file.parent.mkdir()
    digests = []
    for text in ("{}", "{}\n{}"):
        file.write_text(text)
        settings = ["evaluation=quick", "evaluation.probes.tasks.tasks=[arc_easy]"]
        config = resolved("method=rtn", *settings, f"evaluation.probes.tasks.data={tmp_path}")
        digests.append(run.digest_of(run.identity(config)))
    assert digests[0] != digests[1]


def test_files_of_questions_are_named_by_content(tmp_path):
    digests = []
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"question": "What?", "answer": "' + text + '"}')
        settings = ["problems=file", f"problems.path={path}", f"problems.test_path={path}"]
        digests.append(run.digest_of(run.identity(resolved("method=step_by_step", "evaluation=answers", *settings))))
    assert digests[0] == digests[1] != digests[2]
