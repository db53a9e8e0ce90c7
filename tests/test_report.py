"""The tables of test results: made as they say, and not stale."""

from pathlib import Path

import pytest

from . import report

ROOT = Path(__file__).resolve().parents[1]
CURE = (
    "HINT: pytest tests/integration/test_features.py -k WHAT_IS_NEW --junit-xml=new.xml &&"
    " python -m tests.report new.xml --features recipes/results/features.md --readme README.md"
)

JUNIT = """<testsuites><testsuite>
  <testcase classname="tests.a" name="one[2]" time="1.5"><properties>
    <property name="feature" value="one" /><property name="group" value="G" />
    <property name="placement" value="2" /><property name="device" value="CPU" /></properties></testcase>
  <testcase classname="tests.a" name="one[1+1]" time="0.5"><properties>
    <property name="feature" value="one" /><property name="group" value="G" />
    <property name="placement" value="1+1" /><property name="device" value="CPU" /></properties>{end}</testcase>
  <testcase classname="tests.b" name="other" time="2"><skipped type="pytest.skip" message="no" /></testcase>
</testsuite></testsuites>"""
LINE = report.Line("G", "one", 2, ("2", "1+1"), "CPU")


def junit(folder, end=""):
    file = folder / "junit.xml"
    file.write_text(JUNIT.format(end=end))
    return file


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", "equal"),
        ("<failure message='no' />", "2: equal; 1+1: differs"),
        ("<error message='no' />", "2: equal; 1+1: differs"),
        ('<skipped type="pytest.xfail" />', "2: equal; 1+1: not yet"),
    ],
)
def test_a_feature_is_equal_only_where_all_its_tests_passed(tmp_path, end, status):
    assert report.features(report.read([junit(tmp_path, end)])) == {LINE: status}


def test_a_skipped_feature_has_no_status(tmp_path):
    lines = report.features(report.read([junit(tmp_path, '<skipped type="pytest.skip" />')]))
    assert lines == {report.Line("G", "one", 2, ("2",), "CPU"): "equal"}


def test_the_table_can_be_read_back():
    lines, runs = {LINE: "2: equal; 1+1: not yet"}, {"CPU": "today: on this", "GPU": "yesterday"}
    assert report.parse(report.table(lines, runs)) == (lines, runs)


def test_a_run_of_some_features_leaves_the_lines_of_the_others():
    gone, other = (report.Line("G", name, 3, ("3", "2+1"), "CPU") for name in ("gone", "other"))
    gpu = report.Line("G", "one", 2, ("2",), "GPU")
    old = {LINE: "not yet", gone: "equal", other: "equal", gpu: "equal"}
    assert report.merged(old, {LINE: "equal"}, {LINE, other}) == {LINE: "equal", other: "equal", gpu: "equal"}


def test_the_report_counts_and_names_failures(tmp_path):
    text = report.report(report.read([junit(tmp_path, "<failure />")]), "today")
    assert "| tests/a.py | 1 | 1 | 0 | 0 | 2 |" in text
    assert "| all | 1 | 1 | 0 | 1 | 4 |" in text
    assert "- `tests.a` one[1+1]" in text


def test_the_table_of_faults_has_the_tests_that_inject_one(tmp_path):
    file = tmp_path / "junit.xml"
    of = {"fault": "killed", "where": "SIGKILL in EST 1", "asserts": "Nothing is lost."}
    properties = "".join(f'<property name="{name}" value="{value}" />' for name, value in of.items())
    case = f'<testcase classname="tests.elastic.test_crash" name="a" time="3"><properties>{properties}</properties>'
    file.write_text(junit(tmp_path).read_text().replace("<testsuite>", f"<testsuite>{case}</testcase>", 1))
    text = report.faults(report.read([file]), "today")
    assert "1 cases. today." in text
    assert "| killed | SIGKILL in EST 1 | Nothing is lost. | passed | 3 | test_crash |" in text


def test_the_summary_replaces_only_what_is_between_its_marks():
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    made = report.with_summary(readme, {LINE: "equal", report.Line("G", "x", 2, ("2",), "CPU"): "differs"})
    assert made == f"a\n{report.BEGIN}\n| group | equal on CPU |\n|---|---|\n| G | 1 of 2 |\n{report.END}\nb\n"


@pytest.mark.matrix  # the table is renewed from runs of `make test-all`
def test_the_kept_table_has_the_features_that_are_tested():
    lines, _ = report.parse((ROOT / "recipes/results/features.md").read_text())
    kept, tested = {line for line in lines if line.device == "CPU"}, report.known_on_cpu()
    assert kept == tested, f"recipes/results/features.md lacks {tested - kept} or has {kept - tested} in vain. {CURE}"


def test_the_readme_has_the_summary_of_the_kept_table():
    lines, _ = report.parse((ROOT / "recipes/results/features.md").read_text())
    readme = (ROOT / "README.md").read_text()
    assert report.BEGIN in readme
    assert report.with_summary(readme, lines) == readme, CURE
