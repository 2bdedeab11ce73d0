"""The command line as a whole: what is imported when, and how bad arguments are told."""

from __future__ import annotations

import ast
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_sd.cli import main as cli
from gguf_sd.cli.main import main
from gguf_sd.cli.progress import progress_bar
from gguf_sd.cli.terminal import printable

HEAVY = ("torch", "transformers", "tokenizers", "PIL", "numpy", "gguf", "safetensors", "tqdm", "triton")


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    assert main(["convert", str(tiny_pipeline()), "-o", str(path), "--type", "q8_0", "--quiet"]) == 0
    return path


def imported(arguments: list[str], folder: Path) -> tuple[int, list[str]]:
    """The exit code of a command in a fresh interpreter, and the modules that it left imported."""
    code = f"import sys; from gguf_sd.cli.main import main; code = main({arguments!r}); "
    code += f"print(chr(10) + repr((code, sorted(set({(*HEAVY, 'torch._dynamo', 'sympy')!r}) & set(sys.modules)))))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "GGUF_SD_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: tuple[int, list[str]] = ast.literal_eval(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["inspect", "{model}"], 0),
        (["inspect", "{model}", "--json", "--tensors"], 0),
        (["inspect", "{folder}"], 0),
        (["inspect", "missing.gguf"], 2),
        (["generate", "--steps", "x"], 2),
        (["generate", "missing.gguf", "-p", "a"], 2),
        (["convert", "missing.safetensors", "-o", "x.gguf"], 2),
        (["nonsense"], 2),
        ([], 2),
    ],
)
def test_nothing_heavy_is_imported(
    model: Path, tiny_pipeline: Callable[..., Path], tmp_path: Path, arguments: list[str], code: int
) -> None:
    filled = [argument.format(model=model, folder=tiny_pipeline()) for argument in arguments]
    assert imported(filled, tmp_path) == (code, [])


def test_painting_on_a_cpu_imports_no_compiler_and_no_transformers(model: Path, tmp_path: Path) -> None:
    size = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--quiet"]
    code, found = imported(["generate", str(model), "-p", "a cat", "-o", str(tmp_path / "out.png"), *size], tmp_path)
    assert code == 0
    assert not {"transformers", "triton", "sympy", "torch._dynamo", "gguf"} & set(found)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--type", "q9_0"],
        ["--sampler", "nope"],
        ["--schedule", "nope", "--sampler", "euler"],
        ["--steps", "0"],
        ["--guidance", "nan"],
        ["--seed", str(2**64)],
        ["--init-image", "missing.png"],
        ["--from", "missing.png"],
        ["--strength", "2"],
        ["-o", "x.jpg"],
        ["-o", "missing/x.png"],
    ],
)
def test_wrong_settings_are_refused_without_torch(model: Path, tmp_path: Path, wrong: list[str]) -> None:
    code, found = imported(["generate", str(model), "-p", "a cat", *wrong], tmp_path)
    assert code == 2
    assert "torch" not in found


def test_a_wrong_type_is_refused_before_converting(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    source = str(tiny_pipeline())
    assert imported(["convert", source, "-o", "x.gguf", "--type", "q9_0"], tmp_path) == (2, [])
    assert imported(["generate", source, "-p", "a cat", "--type", "q9_0"], tmp_path) == (2, [])
    taken = tmp_path / "taken.gguf"
    taken.touch()
    assert imported(["convert", source, "-o", str(taken)], tmp_path) == (2, [])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_summary_is_the_commands_own(name: str) -> None:
    """Commands are listed without importing them: what is listed must be what they say."""

    class Recorder:
        def add_parser(self, name: str, **settings: object) -> None:
            assert (name, settings["help"]) == (expected, cli.COMMANDS[expected])
            raise StopIteration

    expected = name
    with pytest.raises(StopIteration):
        importlib.import_module(f"gguf_sd.cli.{name}").add_parser(Recorder())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--steps", "x"], "--steps takes a whole number, got 'x'"),
        (["generate", "--guidance", "much"], "--guidance takes a number, got 'much'"),
        (["generate", "--steps"], "--steps takes a value"),
        (["generate", "none.gguf", "--init", "a.png"], "none.gguf does not exist"),  # short for both of its names
        (["generate", "none.gguf", "--clip", "2"], "ambiguous option: --clip could match --clip-skip, --clip-l"),
        (["inspect", "a", "--tensor-list"], "unknown argument --tensor-list; see gguf-sd inspect --help"),
        (["convert"], "SOURCE and --output must be given; see gguf-sd convert --help"),
        (["genrate"], "no command 'genrate', did you mean generate; choose from "),
        ([], "give a command: "),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gguf-sd: {message}")
    assert captured.err.count("\n") == 1


def test_python_dash_m_is_the_command() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "gguf_sd", "--version"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gguf-sd ")


def test_errors_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "\x1b[2Jmodel.gguf")]) == 2
    assert "\x1b" not in (error := capsys.readouterr().err)
    assert "\\x1b[2Jmodel.gguf" in error
    assert printable("a\x07b\u202ec\nd") == "a\\x07b\\u202ec\nd"
    assert printable("a\nb\tdög", newlines=False) == "a\\nb\\tdög"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, quiet, shown in ((io.StringIO(), False, False), (Terminal(), False, True), (Terminal(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(2, quiet, unit="step") as bar:
            bar.update()
        assert bool(stream.getvalue()) is shown


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks /proc whether torch is being imported")
@pytest.mark.parametrize("painting", [False, True])
def test_interrupting_ends_within_a_second(model: Path, tmp_path: Path, painting: bool) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "gguf_sd", "generate", str(model), "-p", "a cat", "-o", str(tmp_path / "o.png")]
    command += ["--steps", "20", "--count", "99", "--width", "32", "--height", "32", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where these tests run in the background
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(tmp_path.glob("o*.png")) if painting else "libtorch" in maps.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert time.monotonic() - sent < 5, "one second on a quiet machine"
