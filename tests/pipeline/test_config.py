"""The settings of an update: where they come from, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_schemas.dataset import DATASETS_FOLDER, load_spec
from data_schemas.errors import ConfigError, SpecError
from pipeline.config import UpdateConfig, load_config, require_embeddings, spec_of

SHIPPED = (DATASETS_FOLDER / "movielens.toml").read_text(encoding="utf-8")
assert "[settings" not in SHIPPED

Declare = Callable[[str], Path]


@pytest.fixture
def declare(tmp_path: Path) -> Declare:
    """Writes a data set with these settings of its own."""

    def write(own_settings: str) -> Path:
        path = tmp_path / "own.toml"
        path.write_text(f"{SHIPPED}\n{own_settings}", encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings_file(tmp_path: Path) -> Declare:
    """Writes a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_later_place_wins_setting_by_setting(
    declare: Declare, settings_file: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("batch_size", "micro_batch_size", "sparse_step_rows", "warmup_steps", "max_skipped_steps")
    dataset = declare("[settings.training]\n" + "".join(f"{name} = 11\n" for name in names[:4]))
    file = settings_file("[training]\n" + "".join(f"{name} = 22\n" for name in names[:3]))
    for name in names[:2]:
        monkeypatch.setenv(f"TIDEMARK_TRAINING__{name.upper()}", "33")
    training = load_config(file, [f"dataset={dataset}", f"training.{names[0]}=44"]).training
    assert [getattr(training, name) for name in names] == [44, 33, 22, 11, 3]


@pytest.mark.parametrize("place", ["file", "environment", "command line"])
def test_the_data_set_is_chosen_before_its_settings_are_read(
    place: str, declare: Declare, settings_file: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = declare("[settings.training]\nbatch_size = 77")
    monkeypatch.setenv("TIDEMARK_TRAINING__SEED", "5")
    match place:
        case "file":
            config = load_config(settings_file(f'dataset = "{dataset}"'))
        case "environment":
            monkeypatch.setenv("TIDEMARK_DATASET", str(dataset))
            config = load_config()
        case _:
            config = load_config(overrides=[f"dataset={dataset}"])
    assert (config.dataset, config.training.batch_size, config.training.seed) == (str(dataset), 77, 5)


def test_places_are_judged_together_and_not_one_by_one(declare: Declare) -> None:
    dataset = declare('[settings.training]\ndense_optimizer = "sgd"')
    assert load_config(overrides=[f"dataset={dataset}", "training.gradient_ema=0.9"]).training.gradient_ema == 0.9


def test_what_a_data_set_declares_for_itself_holds_for_it_alone() -> None:
    assert load_config(overrides=["dataset=brunch"]).training.batch_size == 1024
    assert load_config(overrides=["dataset=movielens"]).training == UpdateConfig.model_fields["training"].default


def test_settings_can_be_sent_to_another_process() -> None:
    config = load_config(overrides=["dataset=brunch", "training.batch_size=77"])
    assert type(config) is UpdateConfig
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301


def test_of_two_overrides_of_one_setting_the_last_wins() -> None:
    assert load_config(overrides=["budget.seconds=1", "budget.seconds = 2"]).budget.seconds == 2


def test_a_list_is_toml_on_the_command_line_and_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(overrides=["model.hidden=[32, 16]"]).model.hidden == (32, 16)
    monkeypatch.setenv("TIDEMARK_MODEL__HIDDEN", "[64, 8]")
    assert load_config().model.hidden == (64, 8)


def test_text_needs_no_quotes_on_the_command_line() -> None:
    config = load_config(overrides=["landing=s3://bucket/clicks", 'model_name="night"', "tracking.uri="])
    assert (config.landing, config.model_name, config.tracking.uri) == ("s3://bucket/clicks", "night", "")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["colour=red"], ["colour", "unknown setting"]),
        (["budget.minutes=5"], ["budget.minutes", "unknown setting"]),
        (["budget.seconds.x=5"], ["budget.seconds"]),
        (["budget..seconds=5"], ["budget.", "unknown setting"]),
        (["_env_file=elsewhere"], ["_env_file", "unknown setting"]),
        (["budget.seconds"], ["name=value", "'budget.seconds'"]),
        (["=5"], ["name=value", "'=5'"]),
        (["budget=5"], ["budget", "5"]),
        (["budget=5", "budget.seconds=6"], ["'budget.seconds=6'", "contradicts", "budget"]),
        (["budget.seconds=0"], ["budget.seconds", "greater than 0", "got 0"]),
        (["budget.seconds=inf"], ["budget.seconds", "finite", "got inf"]),
        (["budget.seconds=nan"], ["budget.seconds", "got nan"]),
        (["budget.seconds=soon"], ["budget.seconds", "number", "'soon'"]),
        (["budget.seconds=5\nlanding=x"], ["budget.seconds", "number"]),
        (["training.batch_size=1.5"], ["training.batch_size", "integer", "1.5"]),
        (["training.seed=-1"], ["training.seed", "greater than or equal to 0"]),
        (["training.precision=fp8"], ["training.precision", "'auto'", "'fp8'"]),
        (["sampling.negative_keep_rate=0"], ["sampling.negative_keep_rate", "greater than 0", "got 0"]),
        (["sampling.negative_keep_rate=1.5"], ["sampling.negative_keep_rate", "less than or equal to 1", "got 1.5"]),
        (
            ["sampling.allocation=given", 'sampling.given_keep_rates={"label=0" = 2.0}'],
            ["sampling.given_keep_rates.label=0", "less than or equal to 1", "got 2.0"],
        ),
        (["sampling.strata=['label', 'colour']"], ["sampling.strata", "'item_popularity'", "'colour'"]),
        (["sampling.allocation=given"], ["sampling", "given_keep_rates go together"]),
        (["sampling.replacement=true"], ["sampling", "needs draw 'fixed'"]),
        (["model.hidden=[]"], ["model.hidden", "at least 1"]),
        (["model_name=a/b"], ["model_name", "'a/b'"]),
        (["dataset=5"], ["dataset", "5"]),
        (["training.batch_size=0", "training.seed=-1"], ["training.batch_size", "training.seed"]),
    ],
)
def test_a_wrong_override_is_named_with_its_value(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TIDEMARK_BUDGE__SECONDS", "5", ["TIDEMARK_BUDGE__SECONDS", "TIDEMARK_BUDGET"]),
        ("TIDEMARK_BUDGET_SECONDS", "5", ["TIDEMARK_BUDGET_SECONDS"]),
        ("TIDEMARK_BUDGET__MINUTES", "5", ["budget.minutes", "unknown setting"]),
        ("TIDEMARK_BUDGET__SECONDS", "", ["budget.seconds", "''"]),
        ("TIDEMARK_BUDGET", "5 minutes", ["environment", "budget", "JSON"]),
        ("TIDEMARK_MODEL__HIDDEN", "128,64", ["environment", "JSON", "TIDEMARK_MODEL__HIDDEN='[128, 64]'"]),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budget = ", ["settings.toml", "not valid TOML"]),
        ("a = " + "[" * 5_000, ["settings.toml", "not valid TOML"]),
        ("[budget]\nminutes = 5", ["budget.minutes", "unknown setting"]),
        ("budget = 5", ["budget", "5"]),
        ("dataset = 5", ["dataset", "5"]),
    ],
)
def test_a_wrong_settings_file_is_refused(settings_file: Declare, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings_file(text))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for path in (tmp_path / "nowhere.toml", tmp_path, binary, "nul\0.toml", "x" * 5_000):
        with pytest.raises(ConfigError, match=r"cannot read the settings file|not valid TOML"):
            load_config(path)


def test_the_settings_of_a_data_set_are_checked_as_well(declare: Declare) -> None:
    with pytest.raises(ConfigError, match=r"training\.colour: unknown setting"):
        load_config(overrides=[f"dataset={declare('[settings.training]' + chr(10) + 'colour = 1')}"])


@pytest.mark.parametrize("dataset", ["nowhere", "nowhere.toml", "x" * 5_000 + ".toml"])
def test_an_unknown_data_set_is_a_wrong_declaration(dataset: str) -> None:
    with pytest.raises(SpecError, match=dataset[:50]):
        load_config(overrides=[f"dataset={dataset}"])


def test_a_linear_model_has_no_embeddings_and_the_others_need_one(tmp_path: Path) -> None:
    own = ["dataset=brunch", "model.kind=linear"]
    declared, linear = load_spec("brunch"), spec_of(load_config(overrides=own))
    assert [(feature.name, feature.embedding_dim) for feature in linear.categorical] == [
        ("user_id", 0), ("item_id", 0), ("author_id", 0),
    ]  # fmt: skip
    assert linear == declared.model_copy(update={"categorical": linear.categorical, "history": None})
    assert spec_of(load_config(overrides=own[:1])) == declared
    with pytest.raises(ConfigError, match=r"'linear' learns a declaration without embeddings, and \['user_id', 'item_id',"):
        require_embeddings("linear", declared)
    bare = (DATASETS_FOLDER / "criteo.toml").read_text(encoding="utf-8")
    bare = bare.replace("[[categorical]]\n", "[[categorical]]\nembedding_dim = 0\n")
    (tmp_path / "bare.toml").write_text(bare, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.kind = 'deepfm' needs embeddings.*set model\.kind = 'linear'"):
        spec_of(load_config(overrides=[f"dataset={tmp_path / 'bare.toml'}"]))


def test_smoothing_the_gradient_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_ema = 0\.9 with dense_optimizer = 'adam'.*use dense_optimizer 'adagrad'"):
        load_config(overrides=["training.gradient_ema=0.9"])
    for optimizer in ("lars", "lamb"):
        with pytest.raises(ConfigError, match=f"dense_optimizer = '{optimizer}' smooths the gradient twice"):
            load_config(overrides=["training.gradient_ema=0.9", f"training.dense_optimizer={optimizer}"])
    for optimizer in ("adagrad", "sgd"):
        once = load_config(overrides=["training.gradient_ema=0.9", f"training.dense_optimizer={optimizer}"])
        assert once.training.gradient_ema == 0.9


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().budget.seconds = 5  # type: ignore[misc]


NAMES = [
    *UpdateConfig.model_fields,
    *(
        f"{part}.{name}"
        for part in ("budget", "training", "model")
        for name in UpdateConfig.model_fields[part].default.model_dump()
    ),
]
VALUES = st.one_of(
    st.text(max_size=40),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["[1, 2]", "{x = 1}", "true", "1979-05-27", "''", "[", "inf", "1 # one", '"\\ud800"', "\ud800", "9" * 5_000]
    ),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(st.text(max_size=60), st.builds("{}={}".format, st.sampled_from(NAMES) | st.text(max_size=12), VALUES)),
        max_size=4,
    )
)
@example(["budget=" + "[" * 5_000])
@example([".".join(["a"] * 5_000) + "=1"])
@example(["__pydantic_self__=1"])
@example(["_env_file=x"])
def test_any_overrides_give_settings_or_an_error_of_ours(overrides: list[str]) -> None:
    try:
        config = load_config(overrides=overrides)
    except (ConfigError, SpecError):
        return
    assert isinstance(config, UpdateConfig)
