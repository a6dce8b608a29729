"""The fi_cuda command with the real compiler and no GPU: what it prints, what it leaves, its exit codes."""

import os
import re
import subprocess
import sys
import time

import pytest
from fi_core.settings import settings
from fi_cuda.cache import CUBIN, Artifact, ArtifactCache, Resources
from fi_cuda.cli import main
from fi_cuda.command_line import shortened
from fi_cuda.compile import default_cache
from fi_cuda.shipped import shipped_specs
from fi_cuda.source import CompileTarget, KernelSource

pytestmark = pytest.mark.timeout(120)

STEM = "merge_states"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FI_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    yield default_cache()
    settings.cache_clear()


@pytest.fixture
def built(cache, capsys):
    assert main(["build", STEM, "--jobs", "2"]) == 0
    capsys.readouterr()
    return cache


def source():
    return next(spec.source() for spec in shipped_specs() if spec.stem == STEM)


def num_shipped():
    return sum(spec.stem == STEM for spec in shipped_specs())


def made_by_hand(stem="scale_rows", compiler="(12, 9)"):
    text = f'extern "C" __global__ void fi_{stem}() {{}}\n'
    return Artifact(
        stem, "0" * 40, f"fi_{stem}", "sm_80", (), compiler, text, Resources(8, 64, 0, 4, 12), 0.5, b"\x7fELF"
    )


def test_build_compiles_into_the_cache_and_then_reads(cache, capsys):
    assert main(["build", STEM, "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(rf"^{STEM}-\w{{12}} .* s  nvrtc$", out, re.MULTILINE)) == num_shipped() == len(cache.names())
    assert f"{num_shipped()} of {num_shipped()} kernels are ready for sm_90a" in out
    assert main(["build", STEM]) == 0
    again = capsys.readouterr().out
    assert "nvrtc" not in again and again.count("  cache\n") == num_shipped()


def test_build_for_another_arch(cache, capsys):
    assert main(["build", STEM, "--arch", "sm_80"]) == 0
    assert {cache.find(name).arch for name in cache.names()} == {"sm_80"}


def test_compile_errors_are_shortened_and_the_rest_is_built(cache, capsys, monkeypatch):
    class Broken:
        def source(self):
            text = 'extern "C" __global__ void fi_broken() {\n' + "".join(f"undeclared_{i};\n" for i in range(38)) + "}"
            return KernelSource("broken", "fi_broken", text, ())

    whole = next(spec for spec in shipped_specs() if spec.stem == STEM)
    monkeypatch.setattr("fi_cuda.shipped.shipped_specs", lambda: [Broken(), whole, Broken()])
    assert main(["build"]) == 1
    captured = capsys.readouterr()
    assert "CompileError: broken for sm_90a does not compile" in captured.err
    assert captured.err.count('"undeclared_0" is undefined') == 1 and "more lines" in captured.err
    assert captured.err.count("\n") < 25 and "\0" not in captured.err
    assert "1 of 3 kernels are ready" in captured.out
    assert len(cache.names()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "no_such_kernel"], f"STEM: expected one of .*{STEM}.*, got no_such_kernel"),
        (["build", "--arch", "sm_9"], "--arch: expected an architecture, such as sm_90a, got sm_9"),
        (["build", "--jobs", "-1"], "--jobs: expected a whole number, at least 1, got -1"),
        (["show", "no_such_kernel"], r"NAME\|STEM: expected an intact artifact of .*, got no_such_kernel"),
        (["explain", "no_such_kernel"], r"NAME\|STEM: expected a shipped kernel .*, got no_such_kernel"),
        (["explain", STEM, "--arch", "90"], "--arch: expected an architecture"),
        (["prune", "--older-than", "soon"], "--older-than: expected a whole number and s, m, h or d"),
    ],
)
def test_wrong_argument_is_named(cache, capsys, arguments, message):
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_prune_takes_an_age_or_all(cache):
    with pytest.raises(SystemExit) as caught:
        main(["prune", "--all", "--older-than", "3d"])
    assert caught.value.code == 2


def test_list_shows_resources_age_and_damage(cache, capsys):
    whole, broken = made_by_hand(), made_by_hand("broken_rows")
    for made in (whole, broken):
        cache.find_or_make(made.name, lambda made=made: made)
    (cache.root / broken.name / CUBIN).write_bytes(b"other")
    old = time.time() - 3 * 86400 - 60
    os.utime(cache.root / whole.name, (old, old))
    assert main(["list"]) == 0
    header, first, second, last = capsys.readouterr().out.splitlines()
    names = re.split(r"\s{2,}", header)
    assert names == ["name", "arch", "registers", "shared", "spills", "bytes", "age", "compile"]
    assert re.split(r"\s{2,}", first)[:2] == [broken.name, "damaged"]
    assert re.split(r"\s{2,}", second) == [whole.name, "sm_80", "8", "64", "16", "4", "3 d", "0.50 s"]
    assert last == f"2 artifacts in {cache.root}"


def test_list_of_no_cache(cache, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == f"0 artifacts in {cache.root}\n"


def test_show_prints_resources_and_source(built, capsys):
    name = built.names()[0]
    artifact = built.find(name)
    assert main(["show", name[:-8]]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}\n")
    assert f"{artifact.resources.num_registers} registers a thread" in out
    assert "spills: 0 bytes stored, 0 loaded" in out
    for line in artifact.text.splitlines():
        assert f"  | {line}".rstrip() in out
    assert main(["show", STEM]) == 0
    assert capsys.readouterr().out.count(f"{STEM}-") == num_shipped()


def test_explain_tells_the_parts_of_the_key_and_what_a_build_does(built, capsys):
    name = next(item for item in built.names() if built.find(item).text == source().text)
    assert main(["explain", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}\n  arch sm_90a, flags none, compiler NVRTC (")
    for header in source().headers():
        assert re.search(rf"^  [0-9a-f]{{16}}  {re.escape(header)}$", out, re.MULTILINE)
    assert out.endswith("in the cache: a build reads it\n")
    (built.root / name / CUBIN).write_bytes(b"")
    assert main(["explain", name]) == 0
    assert "damaged in the cache: a build compiles it again" in capsys.readouterr().out
    built.prune(-1e9)
    assert main(["explain", STEM]) == 0
    out = capsys.readouterr().out
    assert out.count("nor anything of the same text: a build compiles it") == num_shipped()


@pytest.mark.parametrize(
    ("compiler", "right_key", "reason"),
    [
        ("(12, 9)", True, "is of compiler (12, 9)"),
        ("(12, 9)", False, "is of other headers and compiler (12, 9)"),
        (None, False, "is of other headers"),
    ],
)
def test_explain_tells_why_a_near_match_is_not_used(built, capsys, compiler, right_key, reason):
    found = next(item for item in map(built.find, built.names()) if item.text == source().text)
    built.prune(-1e9)
    fields = {**vars(found), "compiler": compiler or found.compiler, "key": "0" * 40}
    if right_key:
        fields["key"] = source().key(CompileTarget(), compiler)
    near = Artifact(**fields)
    built.find_or_make(near.name, lambda: near)
    assert main(["explain", found.name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{found.name}\n")
    assert f"{near.name} {reason}\n" in out


def test_explain_of_a_kernel_whose_headers_are_elsewhere(cache, capsys):
    text = '#include "acme/scale.cuh"\nextern "C" __global__ void fi_scale_rows() {}\n'
    made = Artifact(**{**vars(made_by_hand()), "text": text})
    cache.find_or_make(made.name, lambda: made)
    assert main(["explain", made.name]) == 0
    assert f'{made.name}: cannot be compared: scale_rows: header "acme/scale.cuh" is in none' in capsys.readouterr().out


def test_prune_removes_by_age(cache, capsys):
    for stem in ("new_rows", "old_rows"):
        cache.find_or_make(made_by_hand(stem).name, lambda stem=stem: made_by_hand(stem))
    old = time.time() - 7200
    os.utime(cache.root / made_by_hand("old_rows").name, (old, old))
    assert main(["prune"]) == 0
    assert len(cache.names()) == 2
    assert main(["prune", "--older-than", "1h"]) == 0
    assert cache.names() == [made_by_hand("new_rows").name]
    capsys.readouterr()
    assert main(["prune", "--all"]) == 0
    assert capsys.readouterr().out == f"{made_by_hand('new_rows').name}\n1 removed, 0 kept in {cache.root}\n"
    assert cache.names() == []


def test_errors_of_the_cache_are_said_and_fail(cache, capsys):
    cache.root.mkdir()
    cache.root.chmod(0o777)
    assert main(["build", STEM]) == 1
    assert "CacheError" in capsys.readouterr().err
    cache.root.chmod(0o700)
    cache.root.rmdir()
    cache.root.write_text("a file")
    assert main(["build", STEM]) == 1
    assert f"cache folder {cache.root}" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(cache):
    for number in range(3):
        made = Artifact(**{**vars(made_by_hand()), "key": f"{number}" * 40})
        ArtifactCache(cache.root).find_or_make(made.name, lambda made=made: made)
    script = "import sys, time; time.sleep(0.1); from fi_cuda.cli import main; sys.exit(main(['list']))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_shortened_keeps_the_head_and_drops_the_compilers_nul():
    assert shortened("one\ntwo") == "one\ntwo"
    assert shortened("a\nb\nc\nd", max_lines=2) == "a\nb\n... and 2 more lines"
    assert shortened("one\0\n") == "one"
    assert shortened("x" * 10, max_columns=4) == "xxxx ..."
