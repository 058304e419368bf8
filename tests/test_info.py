"""python -m pyrx.info"""

import json
import subprocess
import sys

import torch

import pyrx
from pyrx import _backends, _extension, info


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "pyrx.info", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json():
    found = json.loads(run("--json"))
    assert found["versions"]["pyrx"] == pyrx.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["build"]["loaded"] == (_extension.module is not None)
    assert found["build"]["error"] == _extension.error
    assert found["build"]["record"] == _extension.record
    assert found["machine"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert "failed" not in json.dumps(found["machine"])
    assert set(found["ops"]) == set(_backends.OPS)


def test_json_tells_the_reasons_that_the_backends_give():
    for op, backends in json.loads(run("--json"))["ops"].items():
        assert tuple(backends) == _backends.BACKENDS
        for backend, told in backends.items():
            assert told["reasons"] == _backends.reasons(op, backend, told["device"])
            assert told["serves"] is not bool(told["reasons"])
        assert backends["reference"]["serves"]


def test_text():
    text = run()
    for part in ("versions", "build", "machine", *_backends.OPS, *_backends.BACKENDS, torch.__version__):
        assert part in text, text
    for reason in _backends.reasons(_backends.OPS[0], "cuda", info._device_of("cuda")):
        assert reason in text, text


def test_a_broken_probe_hides_nothing_else(monkeypatch):
    def broken():
        raise OSError("no such file")

    monkeypatch.setattr(info, "_processor", broken)
    monkeypatch.setattr(info, "_ops", broken)
    found = info.collect()
    assert found["machine"]["cpu"] == found["ops"] == "failed: OSError: no such file"
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert "no such file" in info.render(found)


def test_unbuilt(monkeypatch):
    monkeypatch.setattr(_extension, "module", None)
    monkeypatch.setattr(_extension, "record", None)
    monkeypatch.setattr(_extension, "error", "it was never built")
    assert "not loaded: it was never built" in info.render(info.collect())


def test_table_groups_the_reasons():
    no = {"serves": False, "reasons": ["no such thing"]}
    yes = {"serves": True, "reasons": []}
    backends = {"reference": yes, "cpu": yes, "cuda": no, "triton": yes}
    text = "\n".join(info._table({"a": backends, "b": backends | {"triton": no}}))
    assert "  cuda: no such thing\n" in text + "\n" and "  triton: no such thing (b)" in text
