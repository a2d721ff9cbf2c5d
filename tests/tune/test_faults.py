"""What a killed, interrupted or full machine does to a real `hasten tune`: nothing half written, and it goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from families import sd3_with_words
from hasten.bridge import folders

DRIVER = """
import sys
import torch
from hasten import tree
from hasten.cli.main import main
torch.set_num_threads(1)
tree.METHOD_ROOMS = ("cache", "guidance")  # nothing that compiles: a trial is to take a second
sys.argv = ["hasten", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folders.write(sd3_with_words(), folder)
    (folder / "prompts.txt").write_text("\n".join(f"prompt number {i} of a thing" for i in range(36)))
    return folder


def start(model: Path, out: Path, trials: int, most_bytes: int | None = None) -> subprocess.Popen[str]:
    def limited() -> None:
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    words = ["tune", str(model), "--prompts", str(model / "prompts.txt"), "--quality", "0", "--trials", str(trials)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *words, "--out", str(out)], text=True, preexec_fn=limited,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ended(out: Path) -> int:
    """Trials that the journal says have ended."""
    journal = out / "state" / "trials.journal"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return sum(json.loads(line).get("state") in (1, 2, 3) for line in lines if line.endswith("}"))


def wait(process: subprocess.Popen[str], out: Path, trials: int) -> None:
    deadline = time.monotonic() + 240
    while ended(out) < trials:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no trial ended in four minutes"
        time.sleep(0.1)


def whole(out: Path) -> None:
    """Every file that stands under its final name can be read."""
    for file in out.rglob("*"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as kept:
                assert set(kept.keys()) == {"a", "b", "fa", "fb"}
        elif file.suffix == ".json":
            json.loads(file.read_text())


def test_a_killed_and_then_interrupted_tune_goes_on_and_ends(model: Path, tmp_path: Path) -> None:
    first = start(model, tmp_path, 200)
    wait(first, tmp_path, 1)
    first.kill()
    first.communicate()
    before = ended(tmp_path)
    whole(tmp_path)

    second = start(model, tmp_path, 200)
    wait(second, tmp_path, before + 1)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 130, err
    assert err.strip().splitlines()[-1] == "hasten: interrupted; run the same command again to go on"
    before = ended(tmp_path)
    whole(tmp_path)

    third = start(model, tmp_path, before + 1)
    _, err = third.communicate(timeout=300)
    assert third.returncode == 0, err
    assert ended(tmp_path) == before + 1
    assert {"recipe.yaml", "report.json", "report.html", "contact-sheet.png"} <= {f.name for f in tmp_path.iterdir()}
    whole(tmp_path)


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half_written(model: Path, tmp_path: Path) -> None:
    process = start(model, tmp_path, 2, most_bytes=4096)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("hasten: ")
    assert "File too large" in last
    assert "Traceback" not in err
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == []
