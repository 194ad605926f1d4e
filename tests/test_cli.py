"""Command lines: overrides, errors as lines with exit code 2, and what `main` refuses before it works."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from etils import epath

from selfreward_jax import cli, estimate, launch, presets, recipe
from selfreward_jax import main as mains
from selfreward_jax.config import flat, from_config_dict
from selfreward_jax.errors import UserError, spelled
from selfreward_jax.weights import fetch

ROOT = Path(__file__).parents[1]
TINY = "configs/m3.py:tiny"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(*overrides, file=TINY):
    return from_config_dict(cli.parse_config(file, overrides))


def lines_of(*overrides, file=TINY):
    with pytest.raises(UserError) as caught:
        parsed(*overrides, file=file)
    lines = caught.value.args
    assert all("\n" not in line for line in lines)
    return list(lines)


# Configs and overrides.


def test_overrides_of_every_type():
    made = parsed(
        "--config.target=m5",
        "--config.dpo.beta=0.2",
        "--config.sft.lr=1",
        "--config.sft.lr_end=1e-3",
        "--config.dpo.batch=8",
        "--config.eft.train_sets=-1",
        "--config.data.drop_synthetic=true",
        "--config.data.oasst=a file = with signs.jsonl",
        "--config.data.validation=",
    )
    assert (made.target, made.dpo.beta, made.sft.lr, made.sft.lr_end, made.dpo.batch) == ("m5", 0.2, 1.0, 1e-3, 8)
    assert type(made.sft.lr) is float
    assert made.eft.train_sets == -1
    assert made.data.drop_synthetic is True
    assert made.data.oasst == "a file = with signs.jsonl"
    assert made.data.validation == ""
    assert made.sft.epochs == presets.tiny().sft.epochs


def test_the_last_of_two_overrides_counts_and_no_override_changes_nothing():
    assert parsed("--config.seed=1", "--config.seed=2").seed == 2
    assert parsed() == presets.tiny()
    assert parsed(file="configs/m2.py").model.source == "meta-llama/Llama-2-70b-hf"
    assert parsed(file="configs/m2.py").target == "m2"


def test_every_field_can_be_given_on_the_command_line():
    now = flat(presets.tiny())
    assert flat(parsed(*(f"--config.{name}={value}" for name, value in now.items()))) == now


def test_all_mistakes_are_said_at_once_one_line_each():
    lines = lines_of(
        "--config.dpo.beta=much",
        "--config.dpo.betta=1",
        "--config.nogroup.x=1",
        "--config.target.x=1",
        "--config.dpo.batch=1.5",
        "--config.dpo.keep",
        "--config.data.drop_synthetic=maybe",
        "--config.model=demo",
        "--config.responses.n=1",  # not wrong in itself: a contradiction
        "--config.seed=3",
    )
    unknown = "no field of the config; `python -m selfreward_jax.main --fields` lists them"
    kind = "the value is of the wrong type ("
    expected = [
        ("--config.dpo.beta=much", kind),
        ("--config.dpo.betta=1", unknown),
        ("--config.nogroup.x=1", unknown),
        ("--config.target.x=1", unknown),
        ("--config.dpo.batch=1.5", kind),
        ("--config.dpo.keep", kind),
        ("--config.data.drop_synthetic=maybe", kind),
        ("--config.model=demo", "a group of fields; name one of them: attention, "),
        ("--config.responses.n=1", "a pair needs at least 2 candidates"),
    ]
    assert len(lines) == len(expected)
    for line, (field, says) in zip(lines, expected, strict=True):
        assert line.startswith(f"{field}: {says}"), line


def test_a_wrong_value_is_not_blamed_twice():
    # Were sft.lr taken from the preset, sft.lr_end would contradict it.
    assert len(lines_of("--config.sft.lr=high", "--config.sft.lr_end=0.5")) == 1


@pytest.mark.parametrize("file", ["configs/m9.py", "configs/m9.py:tiny", "configs", "README", ":tiny"])
def test_a_config_file_that_is_not_there(file):
    assert lines_of("--config.seed=1", file=file) == [
        f"--config={file}: no such config file; configs/m3.py:demo is one"
    ]


def test_an_unknown_preset():
    (line,) = lines_of(file="configs/m3.py:huge")
    assert line == "preset 'huge': no such preset; known are llama2_70b, llama2_7b, demo, demo_long, tiny"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\ndef get_config(:\n", "SyntaxError on line 2: "),
        ("import not_a_package\n", "ModuleNotFoundError on line 1: No module named 'not_a_package'"),
        ("def get_config(p=''):\n    raise RuntimeError('one\\ntwo')\n", "RuntimeError on line 2: one two"),
        ("def config(): pass\n", "it has no function get_config(preset)"),
        ("def get_config(p=''):\n    return {'seed': 1}\n", "get_config() gave a dict, a ConfigDict is needed"),
    ],
)
def test_a_config_file_with_a_mistake_is_one_line(tmp_path, text, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    (line,) = lines_of(file=str(file))
    assert line.startswith(f"--config={file}: {says}")


def test_a_config_file_of_the_user(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from selfreward_jax import presets\n"
        "def get_config(preset='tiny'):\n"
        "    config = presets.get('m1', preset)\n"
        "    config.seed = 7\n"
        "    return config\n"
    )
    made = parsed("--config.dpo.beta=0.5", file=str(file))
    assert (made.target, made.seed, made.dpo.beta, made.model.source) == ("m1", 7, 0.5, "random:tiny")
    assert parsed(file=f"{file}:demo").model.source == "demo"


def test_exit_codes(capsys):
    def user_error():
        raise UserError("one", "two\nthree")

    def interrupted():
        raise KeyboardInterrupt

    def fails():
        raise ValueError("a bug")

    assert cli.exit_code(lambda: None) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.exit_code(user_error) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\nerror: three\n"
    assert cli.exit_code(interrupted) == 130
    assert "start again to go on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a bug"):
        cli.exit_code(fails)  # a bug shows its traceback


@pytest.mark.parametrize("value", ["0", "abc", "", "-3", "1.5"])
def test_a_count_of_devices_that_jax_cannot_read_is_one_line(monkeypatch, capsys, value):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", value)
    assert cli.exit_code(lambda: pytest.fail("jax would end in a traceback")) == 2
    says = f"error: JAX_NUM_CPU_DEVICES={value}: a whole number from 1, or unset it for one device\n"
    assert capsys.readouterr().err == says
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    assert cli.exit_code(lambda: None) == 0


def test_options_are_named_as_the_command_spells_them():
    with (
        pytest.raises(UserError) as caught,
        spelled({"--config.model.source": "--model", "--config.data.ift": "--data"}),
    ):
        raise UserError(
            "--config.model.source=x: none", "--config.data.ift_examples=0: one", "give --config.data.ift=FILE"
        )
    assert caught.value.args == ("--model=x: none", "--config.data.ift_examples=0: one", "give --data=FILE")


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_compile_cache_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^--config.engine.cache={tmp_path}/{folder}: .*; take a folder that can be"):
        launch.use_compilation_cache(str(tmp_path / folder))


# What `main` gives to `launch`.


@pytest.mark.parametrize(
    ("argument", "root"),
    [
        ("", ROOT / "runs" / "m3-tiny"),
        ("--workdir=here/run", ROOT / "here" / "run"),
        ("--workdir=~/run", Path.home() / "run"),
        ("--workdir=gs://bucket/run", "gs://bucket/run"),
    ],
)
def test_the_workdir_is_absolute(monkeypatch, argument, root):
    """Orbax takes absolute paths only, and says so after the first training."""
    seen = []
    monkeypatch.setattr(launch, "start", lambda config, root, arguments: seen.append((config, root)))
    arguments, overrides = mains._arguments(
        [f"--config={TINY}", *([argument] if argument else []), "--config.seed=4"]
    )
    mains._run(arguments, overrides)
    ((config, found),) = seen
    assert str(found) == str(root)
    assert config.seed == 4


@pytest.mark.parametrize("argument", ["--nonsense", "--work=x", "stray", "--noconfig.seed"])
def test_an_unknown_argument_is_refused(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        mains._arguments([f"--config={TINY}", argument])
    assert caught.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"python -m selfreward_jax.main: error: unknown arguments ['{argument}']")
    )


def arguments(**changed):
    return Namespace(**{"stop_after": "", "dry_run": False, "resume": "strict", **changed})


@pytest.fixture
def _nothing_starts(monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing may be fetched, opened or written before the host is known to hold it")

    monkeypatch.setattr(launch, "open_source", never)
    monkeypatch.setattr(fetch, "hub", never)
    monkeypatch.setattr(recipe, "build", never)
    monkeypatch.setattr(launch.lock, "locked", never)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize("target", ["sft", "m2", "m3"])
def test_the_70b_preset_is_refused_before_any_download(monkeypatch, tmp_path, target):
    monkeypatch.setattr(estimate, "memory_here", lambda: 8 * 10**9)
    monkeypatch.setattr(estimate, "disk_here", lambda root: 100 * 10**9)
    config = from_config_dict(cli.parse_config(f"configs/{target}.py", []))
    with pytest.raises(UserError) as caught:
        launch.start(config, epath.Path(tmp_path / "run"), arguments())
    memory, disk = caught.value.args
    assert "needs 1,379.5 GB of device memory, here are 8.0 GB; use the preset :demo" in memory
    assert " GB needed on disk, 100.0 GB are free; " in disk
    assert ":demo" in disk
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_nothing_starts")
def test_a_stage_that_does_not_exist_lists_those_that_do(tmp_path):
    config = presets.tiny()
    with pytest.raises(UserError) as caught:
        launch.start(config, epath.Path(tmp_path / "run"), arguments(stop_after="m4/train"))
    (line,) = caught.value.args
    names = ", ".join(stage.name for stage in recipe.stages(config))
    assert line == f"--stop_after=m4/train: no such stage; they are {names}"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_store_that_refuses_is_one_line_before_anything_else(bucket, monkeypatch, dry_run):
    def refuse(what, path):
        raise OSError("no bucket or no permission")

    bucket.fault = refuse
    monkeypatch.setattr(launch, "check_inputs", lambda *_: pytest.fail("the store is asked first"))
    with pytest.raises(
        UserError, match=r"gs://nobucket/x: cannot be listed \(no bucket or no permission\); check the name"
    ):
        launch.start(presets.tiny(), epath.Path("gs://nobucket/x"), arguments(dry_run=dry_run))


KNOWN = "give a local path or gs://, s3://, az://, hf://"


def test_places_on_no_known_store_are_lines():
    with pytest.raises(UserError) as caught:
        cli.folder("foo://x")
    assert caught.value.args == (f"--workdir=foo://x: foo:// is no store that can be used; {KNOWN}",)
    with pytest.raises(UserError) as caught:
        parsed("--config.data.ift=https://a/b.jsonl", "--config.prompts.avoid=('file:///x', 'there.jsonl')")
    assert caught.value.args == (
        f"--config.data.ift=https://a/b.jsonl: https:// is no store that can be used; {KNOWN}",
        f"--config.prompts.avoid=file:///x: file:// is no store that can be used; {KNOWN}",
    )


# The command itself: a process each.


def main(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "selfreward_jax.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def test_main_lists_the_fields():
    done = main("--fields")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split("=")[0].removeprefix("--config.") for line in lines] == list(flat(presets.tiny()))
    assert "--config.dpo.beta=0.1  strength of the pull to the reference  [3.1.3]" in lines


def test_main_describes_a_run_without_beginning_it(tmp_path):
    done = main(f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--dry_run", "--config.responses.n=5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [stage.name for stage in recipe.stages(presets.tiny())]
    assert [line.split()[0] for line in lines] == [*names, "generations", "time", "bytes:"]
    assert lines[names.index("m2/responses")].split()[1:3] == ["40", "generations"]
    assert not (tmp_path / "run").exists()


def test_main_says_all_mistakes_of_a_command_line_and_exits_with_2(tmp_path):
    done = main(f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--config.dpo.bet=1", "--config.judge.k=0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --config.dpo.bet=1: no field of the config; `python -m selfreward_jax.main --fields` lists them",
        "error: --config.judge.k=0: at least 1",
    ]
    assert not (tmp_path / "run").exists()


def test_main_refuses_an_unknown_argument(tmp_path):
    done = main(f"--config={TINY}", "--dryrun")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "unknown arguments ['--dryrun']; config fields are --config.NAME=VALUE"
    )


def test_main_refuses_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    for named in ("run", "run/below/it"):
        done = main(f"--config={TINY}", f"--workdir={tmp_path / named}")
        assert done.returncode == 2
        says = f"{tmp_path / 'run'} is a file, a folder is needed; take another name"
        assert done.stderr == f"error: --workdir={tmp_path / named}: {says}\n"
    assert (tmp_path / "run").read_text() == "mine"
