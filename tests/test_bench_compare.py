"""What make bench-compare makes of the times: slower, faster, the same, once more, and not compared."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "compare.py").exists():
    pytest.skip("not a source tree", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import compare  # noqa: E402


def judged(base, new):
    return compare.judge("pyrx", {"base": base, "new": new})


def test_both_quartiles_must_say_slower():
    base = [1.0, 1.0, 1.0, 1.0, 1.0]
    assert judged(base, [1.06, 1.08, 1.1, 1.2, 1.3])["verdict"] == "slower"
    # the median is slower, a quarter of the rounds is not
    assert judged(base, [1.0, 1.04, 1.2, 1.3, 1.4])["verdict"] == "same"
    assert judged(base, [0.7, 0.8, 0.9, 0.94, 1.2])["verdict"] == "faster"
    assert judged(base, [0.7, 0.8, 0.9, 0.97, 1.2])["verdict"] == "same"
    assert judged(base, [1.0, 1.04, 1.04, 1.04, 1.04])["verdict"] == "same"


def test_rounds_are_paired():
    """A machine that slows down in mid-run slows both down."""
    found = judged([1.0, 1.0, 5.0, 5.0], [1.0, 1.0, 5.0, 5.0])
    assert found["ratio"] == {"p25": 1.0, "median": 1.0, "p75": 1.0} and found["rounds"] == 4


def test_slower_is_slower_again():
    slow, fine = judged([1.0] * 4, [2.0] * 4), judged([1.0] * 4, [1.0] * 4)
    other = {**fine, "contender": "pyrx, out="}
    assert compare.confirmed({"case": [slow, other]}, {"case": [fine, slow | {"contender": "pyrx, out="}]}) == {
        "case": [fine, other]
    }
    twice = compare.confirmed({"case": [slow]}, {"case": [slow]})
    assert compare.verdicts(twice, "slower") == [("case", slow)]
    # the case did not come up again
    assert compare.confirmed({"case": [slow]}, {}) == {"case": [slow]}


def test_a_build_that_was_cut_short_is_made_again(tmp_path):
    package = tmp_path / "pyrx"
    package.mkdir()
    assert not compare.built(tmp_path)
    (package / "_build_info.json").write_text('{"extension": true}')
    assert not compare.built(tmp_path)
    (package / "_C.so").touch()
    assert compare.built(tmp_path)


def test_status():
    slow, fine = judged([1.0] * 4, [2.0] * 4), judged([1.0] * 4, [1.0] * 4)
    alone = {"base": [], "new": []}
    assert compare.status({"case": [fine]}, alone) == 0
    assert compare.status({"case": [slow]}, alone) == 1
    assert compare.status({"case": [fine]}, {"base": ["case fails"], "new": []}) == 0
    assert compare.status({"case": [fine]}, {"base": [], "new": ["case fails"]}) == 1
    assert compare.status({}, alone) == 1


class Planted:
    """A worker whose contenders take the times it is given."""

    def __init__(self, cases, ms):
        self.cases, self.ms, self.log, self.answers = cases, ms, [], [{"cases": list(cases), "broken": []}]

    def send(self, **message):
        self.log.append(message)
        if "run" in message:
            self.answers += [{"case": each, **self.cases[each]} for each in message["run"]]

    def receive(self):
        answer = self.answers.pop(0)
        self.at = answer.get("case")
        return answer

    def ask(self, **message):
        self.log.append(message)
        if message["do"] == "warm":
            names = self.cases[self.at]["contenders"]
            return {"contenders": {name: {"seconds": self.ms[name] / 1e3, "calls": 2} if name in self.ms else
                                   {"error": "TypeError: no such argument"} for name in names}}  # fmt: skip
        return {"ms": self.ms[message["name"]]}


def measured(monkeypatch, base, new, only=None):
    class Context:
        def __enter__(self):
            return {"base": base, "new": new}

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(compare, "workers", lambda trees, options: Context())
    return compare.measure({}, [], 1e-6, (5, 5), only)


def test_cases_of_one_tree_are_named(monkeypatch, capsys):
    both = {"contenders": ["pyrx"]}
    base = Planted({"a": both, "gone": both, "broken": {"error": "TypeError: no such argument"}}, {"pyrx": 1.0})
    more = {"contenders": ["pyrx", "pyrx, out="]}
    new = Planted({"a": more, "broken": both, "added": both}, {"pyrx": 2.0, "pyrx, out=": 2.0})
    found, alone = measured(monkeypatch, base, new)
    assert {case: [each["verdict"] for each in results] for case, results in found.items()} == {"a": ["slower"]}
    assert alone == {
        "base": ["added is absent", "a: pyrx, out=: is absent", "broken fails: TypeError: no such argument"],
        "new": ["gone is absent"],
    }
    assert "2.000 (2.000 to 2.000)" in capsys.readouterr().out
    # the one that was ready for the broken case is sent on, the other is not waited for
    assert new.log[-1] == {"do": "end"} and base.log[-1] == {"do": "end"}
    assert len([each for each in new.log if each == {"do": "end"}]) == 2


def test_contender_that_cannot_run_is_named(monkeypatch):
    """The new argument of an op is found when it is first called."""
    cases = {"a": {"contenders": ["pyrx", "pyrx, new argument"]}, "b": {"contenders": ["pyrx, new argument"]}}
    base, new = Planted(cases, {"pyrx": 1.0}), Planted(cases, {"pyrx": 1.0, "pyrx, new argument": 1.0})
    found, alone = measured(monkeypatch, base, new)
    assert {case: [each["contender"] for each in results] for case, results in found.items()} == {"a": ["pyrx"]}
    assert alone["base"] == [f"{case}: pyrx, new argument: TypeError: no such argument" for case in "ab"]
    assert alone["new"] == [] and new.log[-1] == {"do": "end"}


def test_trees_take_turns_with_the_same_calls(monkeypatch):
    base, new = (Planted({"a": {"contenders": ["pyrx"]}, "b": {"contenders": ["pyrx"]}}, {"pyrx": 1.0}) for _ in "ab")
    found, alone = measured(monkeypatch, base, new, only=["b"])
    assert list(found) == ["b"] and alone == {"base": [], "new": []}
    visits = [[each for each in one.log if each.get("do") == "visit"] for one in (base, new)]
    assert visits[0] == visits[1] and len(visits[0]) == 5
    assert found["b"][0]["verdict"] == "same"
