import json

import pytest
import torch

from normkit.cli import main
from normkit.lab.bench.end_to_end import WORKLOADS

TINY = ["bench", "--norms", "bn,gn:2", "--batch-sizes", "2,4", "--repeats", "1", "--threads", "1"]


@pytest.fixture
def bench(tmp_path, capsys):
    """Run `normkit bench` on one small shape; returns exit code, standard output, errors."""
    shapes = tmp_path / "shapes.json"
    shapes.write_text("[[6, 5, 7]]")

    def run(*arguments, shapes=shapes):
        code = main([*TINY, "--shapes", str(shapes), *arguments])
        return code, *capsys.readouterr()

    return run


def test_it_prints_tables_and_writes_record_and_chart(bench, tmp_path):
    code, output, errors = bench("--out", str(tmp_path / "new" / "b.json"), "--verbose")
    assert code == 0
    for text in ("batch 4", "gn:2", "fwd+bwd", "torch", "tiny map", "Every shape", "4x6x5x7"):
        assert text in output
    assert "remaining" in errors
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["b.json", "b.svg"]


def test_json_is_all_that_the_standard_output_gets(bench):
    code, output, _ = bench("--json")
    result = json.loads(output)
    assert code == 0
    assert [(c["norm"], c["batch_size"]) for c in result["cells"]] == [
        ("bn", 2), ("bn", 4), ("gn:2", 2), ("gn:2", 4),
    ]  # fmt: skip
    assert result["targets"] == []  # they are stated for ResNet-50's shapes
    assert {"environment", "code_hash", "spec", "rows"} <= result.keys()


def test_a_record_is_printed_as_markdown_and_drawn_again(bench, capsys, tmp_path):
    path = tmp_path / "b.json"
    bench("--out", str(path))
    path.with_suffix(".svg").unlink()
    assert main(["bench", "--render", str(path)]) == 0
    assert "| `gn:2` | torch | 4 |" in capsys.readouterr().out
    assert path.with_suffix(".svg").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--norms", "bm"], "names norm 'bm'; the norms are: bn"),
        (["--batch-sizes", "two"], "--batch-sizes was given 'two'"),
        (["--shapes", "vgg"], "--shapes was given 'vgg'"),
        (["--dtype", "int8"], "--dtype was given 'int8'"),
        (["--memory-format", "nhwc"], "--memory-format was given 'nhwc'"),
        (["--against", "jax"], "--against was given 'jax'"),
        (["--device", "tpu"], "there is no device 'tpu' here"),
        (["--threads", "0"], "--threads was given 0"),
        (["--repeats", "0"], "--repeats was given 0"),
        (["--out", "/proc/normkit/b.json"], "/proc/normkit cannot be written to"),
        (["--render", "nowhere.json"], "nowhere.json cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gives_exit_code_2_and_a_way_out(bench, arguments, text):
    code, output, errors = bench(*arguments)
    assert (code, output) == (2, "")
    assert text in errors
    assert "Traceback" not in errors


def test_an_interrupt_leaves_no_half_file(bench, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("normkit.cli.bench.run_bench", interrupted)
    code, _, errors = bench("--out", str(tmp_path / "b.json"))
    assert code == 130
    assert "interrupted; no file is half written" in errors
    assert not list(tmp_path.glob("b.*"))


def test_a_gpu_that_is_not_there_is_refused(bench):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for way in ([], ["--end-to-end"]):
        code, _, errors = bench("--device", "cuda", *way)
        assert code == 2
        assert "there is no device 'cuda' here; choose auto or cpu" in errors


def test_networks_are_timed_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("normkit.cli.bench.workloads_for", lambda device: WORKLOADS[1:])
    path = tmp_path / "steps.json"
    arguments = ["bench", "--end-to-end", "--repeats", "1", "--out", str(path)]
    assert main(arguments) == 0
    assert "small-resnet" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == json.loads(path.read_text()).keys()
    assert result["results"][0]["workload"]["batch_size"] == 8


def test_fused_layers_and_networks_are_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("normkit.lab.bench.fused.WORKLOADS", ())
    shapes, path = tmp_path / "shapes.json", tmp_path / "fused.json"
    shapes.write_text("[[6, 5, 7]]")
    arguments = ["bench", "--fused", "--repeats", "1", "--shapes", str(shapes)]
    arguments += ["--batch-sizes", "2", "--out", str(path)]
    assert main(arguments) == 0
    assert "norm, sum and ReLU" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == json.loads(path.read_text()).keys()
    assert [row["residual"] for row in result["layers"]] == [False, True]
