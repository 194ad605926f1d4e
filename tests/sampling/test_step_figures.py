"""How the benchmarks read a compiler's and a profiler's words about a decode step."""

import gzip
import json

import pytest

from benchmarks import decode_profile, decode_tpu, figures

TPU = """HloModule jit_advance
%layer (p: s32[]) -> s32[] {
  %a = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/decode/while/body/while/body/block/mlp/dot"}, backend_config={"estimated_cycles":"100"}
  %b = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/decode/while/body/while/body/block/attention/dot"}, backend_config={"estimated_cycles":"7"}
  %r = f32[2]{0} all-reduce-start(%b), to_apply=%sum
}
%more (p: s32[]) -> pred[] {
  %c = s32[]{:T(128)} constant(80)
  ROOT %less = pred[] compare(%p, %c), direction=LT
}
%step (p: s32[]) -> s32[] {
  %w = (s32[]) while(%p), condition=%more, body=%layer
  %h = f32[2]{0} fusion(%w), metadata={op_name="jit(f)/decode/while/body/head/dot"}, backend_config={"estimated_cycles":"50"}
}
%go_on (p: s32[]) -> pred[] {
  ROOT %less.1 = pred[] compare(%p, %p), direction=LT
}
ENTRY %main (p: s32[]) -> s32[] {
  %k = f32[9]{0} copy(%p), backend_config={"estimated_cycles":"999"}
  %s = (s32[]) while(%p), condition=%go_on, body=%step
}
"""


def test_a_step_counts_its_layers_and_nothing_around_the_steps():
    assert decode_tpu.cycles(TPU) == ({"mlp": 8000.0, "attention": 560.0, "head": 50.0}, 80)


@pytest.mark.parametrize(
    ("path", "part"),
    [("jit(f)/block/attention_out/dot", "attention_out"), ("jit(f)/block/attention/exp", "attention"), ("jit(f)/block/add", "block"), ("x", "other")],
)  # fmt: skip
def test_the_innermost_scope_counts(path, part):
    line = f'  %add.1 = f32[2] add(%a, %b), metadata={{op_name="{path}"}}'
    assert figures.scope_of(line) == part
    assert decode_profile.scopes_of(line) == {"add.1": part}


def test_a_trace_is_summed_by_scope(tmp_path):
    events = [
        {"ph": "X", "name": "dot.1", "dur": 2000}, {"ph": "X", "name": "dot.1", "dur": 1000}, {"ph": "X", "name": "add.2", "dur": 500},
        {"ph": "X", "name": "while.3", "dur": 9000}, {"ph": "X", "name": "python", "dur": 9000}, {"ph": "M", "name": "dot.1"},
    ]  # fmt: skip
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    scopes = {"dot.1": "mlp", "add.2": "block", "while.3": "other"}
    assert decode_profile.seconds_by_scope(tmp_path, scopes) == pytest.approx({"mlp": 3e-3, "block": 5e-4})
