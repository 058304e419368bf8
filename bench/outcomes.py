"""Reads the result files and answers questions about them: which case, how many times as fast."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
STEADY = 1.5

Case = dict[str, Any]
File = dict[str, Any]


def load(folder: Path) -> list[File]:
    found = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        if file.get("schema") == SCHEMA:
            found.append(file)
        else:
            print(f"{path.name} has schema {file.get('schema')}, not {SCHEMA}: left out", file=sys.stderr)
    return found


def whole(file: File) -> list[Case]:
    """The cases that are not points of a sweep."""
    return [case for case in file["cases"] if "grows" not in case]


def medians(case: Case) -> dict[str, float]:
    return {each["name"]: each["ms"]["median"] for each in case["contenders"]}


def title(case: Case) -> str:
    """The op, and its method where it has several."""
    params = case["params"]
    return f"{params['op']}, {params['method']}" if "method" in params else params["op"]


def case_name(params: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, list) else str(value)

    hidden = ("op", "p", "dtype", "method")
    sizes = [f"{k} {shown(v)}" if len(k) == 1 else named(k, shown(v)) for k, v in params.items() if k not in hidden]
    return ", ".join([*sizes, params["dtype"]] if "dtype" in params else sizes)


def named(key: str, value: str) -> str:
    """A flag by its name; a size or a choice by itself."""
    if value in ("True", "False"):
        return key if value == "True" else f"no {key}"
    return f"{key} {value}" if value.replace(".", "").isdigit() else value


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value: float) -> str:
    """A ratio in two digits, three from 100 on."""
    return f"{value:.2g}" if value < 100 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def comparison(case: Case, contender: str, measure: str) -> dict[str, Any] | None:
    """The comparison of a pyrx contender with the best peer ("speed"), with its floor, or of those two ("limit")."""
    for each in case["comparisons"]:
        if each["of"] == contender and each["measure"] == measure and (measure != "speed" or each.get("best_peer")):
            return each
    return None


def steady(case: Case) -> bool:
    """Whether the machine had nothing else to do: on shared cores threads wait for each other, and times multiply."""
    found = [each["ms"] for each in case["contenders"] if each["kind"] in ("pyrx", "floor")]
    return all(ms["median"] <= STEADY * ms["min"] for ms in found)


@dataclass
class Results:
    """The files, asked about one device."""

    files: Sequence[File]
    device: str = "cpu"

    def of_row(self, row: str) -> list[File]:
        return [file for file in self.files if file["row"] == row and file["device"] == self.device]

    def cases(self, row: str, **params: Any) -> list[Case]:
        """Those of the row with these parameters; None: without the parameter."""
        found = [case for file in self.of_row(row) for case in whole(file)]
        return [case for case in found if all(case["params"].get(k) == v for k, v in params.items())]

    def case(self, row: str, **params: Any) -> Case:
        found = self.cases(row, **params)
        if len(found) != 1:
            raise LookupError(f"{row}, {self.device}: expected one case with {params}, got {len(found)}")
        return found[0]

    def ms(self, case: Case, contender: str = "pyrx") -> float:
        found = medians(case)
        if contender not in found:
            raise LookupError(f"{case['params']}: no time of {contender!r}, only of {', '.join(found)}")
        return found[contender]

    def speed(self, case: Case, contender: str = "pyrx", against: str = "best peer") -> float:
        """How many times as fast as `against`."""
        if against == "best peer":
            best = comparison(case, contender, "speed")
            if best is None:
                raise LookupError(f"{case['params']}: {contender!r} was compared with no peer")
            against = best["against"]
        return self.ms(case, against) / self.ms(case, contender)

    def over_floor(self, case: Case, contender: str = "pyrx") -> float:
        found = comparison(case, contender, "floor")
        if found is None:
            raise LookupError(f"{case['params']}: {contender!r} has no floor")
        return self.ms(case, contender) / self.ms(case, found["against"])
