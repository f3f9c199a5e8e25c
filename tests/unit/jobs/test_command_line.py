"""Help, examples, completion and docs/cli.md: the command line's documentation matches the settings."""

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command_line import docs
from jobs.command_line.arguments import SHELLS
from jobs.command_line.command import command_parser
from jobs.command_line.flags import settings_of
from jobs.command_line.parser import Parser
from jobs.command_line.verbs import VERBS
from pipeline import VERSION
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.settings.loading import SourceSettings
from tests.support.project import ROOT

EXAMPLES = [example for verb in VERBS.values() for example in verb.examples]


def parsed(command: str) -> argparse.Namespace:
    parser, _ = command_parser(VERBS)
    return parser.parse_args(shlex.split(command, comments=True))


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    return command_parser(VERBS)[1]


def test_docs_cli_md_is_up_to_date() -> None:
    assert docs.FILE.read_text(encoding="utf-8") == docs.page(), "run `python -m jobs.command_line.docs`"


def test_check_of_the_page_fails_when_it_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "FILE", tmp_path / "cli.md")
    assert docs.main(["--check"]) == 1
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_explained_in_a_sentence(verb: str, parsers: dict[str, Parser]) -> None:
    for action in parsers[verb]._actions:
        shown = (action.help or "") % vars(action)
        sentence = shown.partition(" [default: ")[0]
        assert action.dest == "help" or (sentence[0].isupper() and sentence.endswith(".")), shown


@pytest.mark.parametrize(
    "expected",
    [
        "--metric {weights,activations}",
        "--centroid-bits {4,6,8}",
        "Number of windows of the calibration text. [default: 128]",
        "[default: selected]",
        "method and bit budget:",
        "calibration:",
        "workers and cluster:",
        "examples:",
    ],
)
def test_help_shows_choices_defaults_groups_and_examples(expected: str, parsers: dict[str, Parser]) -> None:
    assert expected in " ".join(parsers["compress"].format_help().split())


@pytest.mark.parametrize("example", [example.partition(" > ")[0] for example in EXAMPLES])
def test_examples_can_be_called(example: str) -> None:
    assert parsed(example).verb in VERBS


@pytest.mark.parametrize("example", [one for one in EXAMPLES if one.startswith("compress") and "--config" not in one])
def test_settings_of_the_examples_are_valid(example: str) -> None:
    kinds = (CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings, SourceSettings)
    settings = settings_of(parsed(example), *kinds)
    assert [type(settings[kind]) for kind in kinds] == list(kinds)


def test_flags_that_are_not_given_leave_no_trace() -> None:
    given = vars(parsed("compress MODEL OUTPUT --bits 3"))
    assert given.keys() & CompressSettings.model_fields.keys() == {"bits"}


def test_a_misspelt_flag_gets_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "MODEL", "OUTPUT", "--cluters", "3"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert "--clusters" in error
    assert "swsc compress --help" in error


def test_ambiguous_and_unknown_flags_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "MODEL", "OUTPUT", "--bit", "3", "--projektors", "q,k"])
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    given, _, similar = error.partition("similar: ")
    assert "--bit 3 --projektors q,k" in given
    assert all(flag in similar for flag in ("--bits", "--bits-over", "--projectors"))


def test_an_unambiguous_abbreviation_is_accepted() -> None:
    assert parsed("compress MODEL OUTPUT --proj q --bits 3").projectors == "q"


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The only line on standard error of a command that is refused."""
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_config_file_of_the_other_kind_is_refused_with_the_verb_that_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many = str(ROOT / "configs" / "paper-qk-3bit.yaml"), str(ROOT / "configs" / "best-qk.yaml")
    line = refusal(capsys, "sweep", one, "--out", str(tmp_path / "out"))
    assert f"swsc compress MODEL OUTPUT --config {one}" in line
    assert "granularity" not in line  # no list of keys
    for command in (["compress", "MODEL", str(tmp_path / "out")], ["plan", "MODEL"]):
        line = refusal(capsys, *command, "--config", many)
        assert f"swsc sweep {many} --out" in line
        assert "granularity" not in line


@pytest.mark.parametrize("verb", ["sweep", "compress"])
def test_known_keys_are_listed_once(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("bitz: 3\nclusterz: 4\n")
    argv = [str(config), "--out", "out"] if verb == "sweep" else ["MODEL", "OUTPUT", "--config", str(config)]
    line = refusal(capsys, verb, *argv)
    assert all(key in line for key in ("bitz", "clusterz"))
    assert line.count("calibration_windows") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"swsc {VERSION}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_has_every_verb_flag_and_choice(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in [*VERBS, "segment-size", "data-free", "task-deadline"]:
        assert word in script


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("swsc comp", {"compress", "completion"}),
        ("swsc compress m o --segm", {"--segment-size"}),
        ("swsc compress m o --preset da", {"data-free"}),
        ("swsc completion ", set(SHELLS)),
    ],
)
def test_bash_completes(typed: str, completed: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "swsc").write_text(capsys.readouterr().out)
    words = typed.split(" ")
    script = (
        f"source {tmp_path}/swsc; COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1};"
        ' $(complete -p swsc | sed "s/.*-F \\([^ ]*\\).*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert {word.strip() for word in done.stdout.split("\n")} - {""} == completed, done.stderr
