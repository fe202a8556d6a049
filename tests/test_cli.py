"""Commands in odd surroundings: terminals without our characters, readers that have gone, streams that are closed or full."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from rerank_lab import cli
from tests.conftest import ROOT

COMMANDS = [f"rerank_lab.{name}" for name in ("eval", "report", "server", "replay", "cache")] + [
    f"rerank_kernels.{name}" for name in ("bench", "inspect", "tune")
]
SLOW = {"torch", "numpy", "pandas", "transformers", "matplotlib", "jinja2", "scipy", "triton", "httpx", "fastapi", "ir_measures", "safetensors", "bm25s"}
BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# A command like all of ours, without the seconds that importing torch takes.
COMMAND = """
import argparse, sys
from rerank_lab import cli
def main():
    p = argparse.ArgumentParser(description="− × … ≥ é")
    p.add_argument("text", nargs="?", default="−0.5 × 2 … é")
    p.add_argument("--times", type=int, default=1)
    options = p.parse_args()
    try:
        for _ in range(options.times):
            print(options.text)
    except OSError as error:
        print(f"a file of ours: {error}", file=sys.stderr)
        return 3
    print("a note", file=sys.stderr)
    return 0
sys.exit(cli.run(main))
"""
Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a line of bash; $c is the command."""
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        found = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "c": f"{sys.executable} {tmp_path / 'command.py'}", "PYTHONUTF8": "1"}
        return subprocess.run(["bash", "-c", line], env=found | environment, capture_output=True, check=False, timeout=60)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_characters_gets_others_that_mean_the_same(shell: Shell, encoding: str) -> None:
    done = shell("$c && $c --help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert text.startswith("-0.5 x 2 ... ?\n" if encoding == "ascii" else "-0.5 × 2 ... é\n") and ">=" in text
    assert shell("$c", **BARE).stdout == b"-0.5 x 2 ... ?\n"


def test_the_name_of_a_file_is_printed_as_it_was_given(shell: Shell) -> None:
    assert shell(r"$c $'\xff\xc3\xa9'", **BARE).stdout == b"\xff\xc3\xa9\n"
    assert shell(r"$c $'\xff\xc3\xa9'").stdout == b"\xff\xc3\xa9\n"


@pytest.mark.parametrize("arguments", ["", "--help", "--times 100000"])
def test_a_reader_that_has_gone_ends_the_command_quietly(shell: Shell, arguments: str) -> None:
    done = shell(f"$c {arguments} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == b"141\n" and done.stderr.replace(b"a note\n", b"") == b""
    if "times" in arguments:
        assert shell(f"$c {arguments} | head -n 1; exit ${{PIPESTATUS[0]}}").returncode == 141


@pytest.mark.parametrize("arguments", ["", "--help", "--times 100000"])
@pytest.mark.parametrize(("place", "reason"), [(">&-", b"Bad file descriptor"), (">/dev/full", b"No space left on device")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_nothing_is_a_failure_with_its_reason(shell: Shell, arguments: str, place: str, reason: bytes, unbuffered: str) -> None:
    done = shell(f"$c {arguments} {place}", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1 and done.stderr.replace(b"a note\n", b"") == b"rerank_lab: failed: stdout: " + reason + b"\n"


@pytest.mark.parametrize("place", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_closed_or_full_stderr_changes_nothing_else(shell: Shell, place: str) -> None:
    done = shell(f"$c {place}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "−0.5 × 2 … é\n".encode(), b"")
    wrong = shell(f"$c --unknown {place}")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, b"", b"")


def test_a_closed_stream_leaves_its_number_to_no_file(tmp_path: Path) -> None:
    code = f"from rerank_lab import cli; cli.run(lambda: print(open({str(tmp_path / 'x')!r}, 'w').fileno(), file=open({str(tmp_path / 'y')!r}, 'w')))"
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=ROOT, check=False)
    assert int((tmp_path / "y").read_text()) > 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_is_fit_for_ascii(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    codecs.register_error(cli.ERROR_HANDLER, cli.plain)
    module = f"{name}.__main__" if name.startswith("rerank_lab.") else name
    with pytest.raises(SystemExit) as end:
        import_module(module).main(["--help"])
    assert end.value.code == 0
    assert b"?" not in capsys.readouterr().out.encode("ascii", cli.ERROR_HANDLER)


def test_every_command_runs_so() -> None:
    places = [ROOT / folder / f"{name.replace('.', '/')}{end}.py" for name in COMMANDS for folder in ("", "kernels") for end in ("", "/__main__")]
    found = [place.read_text(encoding="utf-8") for place in places if place.is_file()]
    assert len(found) == len(COMMANDS) and all("sys.exit(cli.run(main" in text for text in found)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("arguments", ["--help", "--no-such-option"])
def test_help_and_wrong_flags_wait_for_no_library_that_is_slow_to_load(name: str, arguments: str) -> None:
    assert loaded(name, arguments) == (0 if arguments == "--help" else 2, [])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rerank_lab.eval", "--workers 2"),
        ("rerank_lab.eval", "--config no-such-file.toml"),
        ("rerank_lab.report", "--compare a b"),
        ("rerank_lab.server", "--no-auth --host 0.0.0.0"),
        ("rerank_kernels.bench", "--threads 0"),
    ],
)
def test_so_do_options_that_do_not_go_together(name: str, arguments: str) -> None:
    assert loaded(name, arguments) == (2, [])


def loaded(name: str, arguments: str) -> tuple[int, list[str]]:
    """A command's exit code, and the modules of SLOW that it has imported."""
    code = (
        "import runpy, sys\n"
        "del sys.argv[0]\n"  # runpy puts the module's own file in place of its name
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as end: print(end.code, *{{*sys.modules}} & {SLOW!r}, file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-c", code, name, *arguments.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    status, *found = done.stderr.splitlines()[-1].split()
    return int(status), found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rerank_lab.eval", "--list"),
        ("rerank_lab.report", "nowhere"),
        ("rerank_lab.server", "--no-auth"),
        ("rerank_lab.replay", "requests.jsonl http://127.0.0.1:1 http://127.0.0.1:1"),
        ("rerank_lab.cache", "info"),
        ("rerank_kernels.bench", "--quick"),
        ("rerank_kernels.tune", ""),
    ],
)
def test_ctrl_c_while_libraries_are_loaded_ends_a_command_without_a_traceback(name: str, arguments: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT}/kernels"}
    done = subprocess.run([sys.executable, "-m", name, *arguments.split()], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_the_default_command_does_so() -> None:
    line = f"{sys.executable} -m rerank_lab.eval --list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=os.environ | BARE, capture_output=True, check=False)
    assert done.returncode == 141 and done.stderr == b""


def test_characters_that_no_one_has_thought_of_are_question_marks() -> None:
    codecs.register_error(cli.ERROR_HANDLER, cli.plain)
    assert "漢 −1".encode("ascii", cli.ERROR_HANDLER) == b"? -1"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", cli.ERROR_HANDLER)
