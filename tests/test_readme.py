"""The README is true: every command in it runs, every command is in it, and its options exist."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from test_cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("rapidin-vdb ")]


def test_every_command_is_in_the_readme():
    assert {line.split()[1] for line in commands()} | {"demo"} == set(COMMANDS)
    assert blocks("bash")[0].split()[0] == "scripts/demo"


def test_every_option_in_the_readme_exists():
    from typer.main import get_command

    from rapidin_vdb.cli.main import app

    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
    }
    for line in commands():
        assert set(re.findall(r" (--[a-z-]+)", line)) <= known[line.split()[1]], line


@pytest.mark.slow
def test_the_tour_runs(tmp_path, demonstration):
    """In the order of the README, as a reader would, and the Python after it."""
    program = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}

    def run(command: str) -> str:
        if " serve " in command:
            return visited(command)
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    def visited(command: str) -> str:
        """A server answers until it is interrupted."""
        command = re.sub(r"--port \d+", "--port 0", command)
        server = subprocess.Popen(command.split(), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        with server.stderr:
            try:
                address = server.stderr.readline().split(" on ")[1].split()[0]
                with urllib.request.urlopen(address + "/health", timeout=60) as answer:
                    assert b'"status":"ready"' in answer.read()
                server.send_signal(signal.SIGINT)
                assert server.wait(60) in (0, 130) and "Traceback" not in server.stderr.read()
            finally:
                server.kill()
                server.wait()
        return ""

    shutil.copytree(demonstration[-1], tmp_path / "demo")
    outputs = [run(command) for command in commands()]
    first_query = next(out for out, command in zip(outputs, commands(), strict=True) if " query " in command)
    assert first_query.splitlines()[0] == "query: 10 of 1,100 samples"
    assert first_query.count("Howdy!") >= 9, "the poison"
    assert len((tmp_path / "rankings.jsonl").read_text().splitlines()) >= 15
    (code,) = blocks("python")
    (tmp_path / "tour.py").write_text(code)
    said = run(f"{sys.executable} tour.py").splitlines()
    assert len(said) == 6 and "Which colour is snow?" in said[0] and said[5].startswith("[('")
