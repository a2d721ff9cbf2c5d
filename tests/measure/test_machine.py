"""The machine is told, and its owner is not."""

import getpass
import json
import os
import platform
import socket

import torch

from hasten.measure.machine import _processor, machine

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx512_bf16 avx512_vnni amx_bf16
processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_reads_the_processor():
    model, flags = _processor(CPUINFO)
    assert model == "Intel(R) Xeon(R) Platinum 8488C"
    assert flags is not None
    assert {"amx_bf16", "avx512_vnni"} <= flags
    assert "amx_int8" not in flags
    assert _processor("Features\t: asimd bf16\n") == (None, frozenset({"asimd", "bf16"}))  # ARM
    assert _processor("") == (None, None)


def test_what_is_not_known_is_none(monkeypatch):
    monkeypatch.setattr("hasten.measure.machine._cpuinfo", lambda: "")
    assert set(machine()["instructions"].values()) == {None}
    assert machine()["cpu"]


def test_is_json_and_agrees_with_torch():
    found = json.loads(json.dumps(machine()))
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    if torch.backends.mkldnn.is_available() and found["instructions"]["avx512_vnni"] is not None:
        assert found["instructions"]["avx512_vnni"] == torch.cpu._is_vnni_supported()


def test_names_no_host_user_or_path():
    told = json.dumps(machine()).lower()
    for private in (socket.gethostname(), os.path.expanduser("~"), os.getcwd()):
        assert len(private) < 3 or private.lower() not in told
    assert f'"{getpass.getuser()}"' not in told
