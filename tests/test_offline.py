"""Nothing is sent anywhere: without any network all goes as it does with one, and nobody tries to reach one."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import toy_records, write_jsonl

pytestmark = pytest.mark.slow

# The libraries' own switches are left out on purpose: nothing may depend on them.
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def life(place, models, adapters, *prefix) -> dict[str, object]:
    """What the commands say, with whatever is different every time left out."""
    place.mkdir()
    corpus = write_jsonl(place / "toy.jsonl", toy_records(24))
    db = place / "db"
    commands = {
        "init": ["init", db, "--model", models["llama"], "--adapter", adapters["llama"], "--width", 64],
        "ingest": ["ingest", db, corpus, "--token-gradients", "--token-width", 16],
        "index": ["index", db],
        "query": [
            "query",
            db,
            "--prompt",
            "Say 5",
            "--generation",
            "blue 35",
            "--tokens",
            "--html",
            place / "page.html",
            "--json",
        ],
        "verify": ["verify", db],
        "purge": ["delete", db, "--where", "stars = 1", "--purge"],
    }
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    said: dict[str, object] = {}
    for name, arguments in commands.items():
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "rapidin_vdb", *map(str, arguments)],
            capture_output=True, text=True, timeout=300, env=environment, cwd=place,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = re.sub(
            r"[0-9.,]+ (s|samples/s|tokens/s)\b", "", (done.stdout + done.stderr).replace(str(place), "")
        )
        if name == "query":
            said[name] = json.loads(done.stdout)["results"]
    return said


def works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_without_a_network_all_is_the_same(tmp_path, models, adapters, tally):
    if not works("unshare", "--net", "true"):
        pytest.skip("the network cannot be cut off here (that takes root)")
    assert life(tmp_path / "cut", models, adapters, "unshare", "--net") == life(tmp_path / "with", models, adapters)
    tally("no network", "`unshare --net`; six commands", 6, "the same words and numbers as with one")


def test_nobody_tries_to_reach_a_network(tmp_path, models, adapters, tally):
    """By what the system is asked for, the libraries' own code included."""
    if not works("strace", "-f", "-o", os.devnull, "true"):
        pytest.skip("no strace here, or it may not trace")
    trace = ["strace", "-f", "-A", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(tmp_path / "trace")]
    code = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), 0.1)\nexcept OSError:\n    pass"
    subprocess.run([*trace, sys.executable, "-c", code], check=True)
    away = re.compile(r"AF_INET6?, .*?(?:inet_addr\(\"(?!127\.)|inet_pton\(AF_INET6, \"(?!::1))")
    assert away.search((tmp_path / "trace").read_text()), "else nothing is seen"
    (tmp_path / "trace").write_text("")
    life(tmp_path / "life", models, adapters, *trace)
    found = (tmp_path / "trace").read_text()
    assert not away.search(found), [line for line in found.splitlines() if away.search(line)][:5]
    tally(
        "something calls home",
        "`strace` of connect and send, six commands",
        6,
        "nobody tries to reach anything but this machine",
    )
