"""Who judges: the model itself, a fixed model, an endpoint; with sampled and with expected scores."""

import dataclasses
import http.server
import json
import threading
from typing import ClassVar

import jax
import pytest
from etils import epath

from selfreward_jax import launch, presets
from selfreward_jax.config import from_config_dict
from selfreward_jax.data.chat import encode_text
from selfreward_jax.data.records import Judgment, Prompt, Response
from selfreward_jax.errors import UserError
from selfreward_jax.loaded import params_of
from selfreward_jax.run import read_parts, write_records
from selfreward_jax.stages import judgments, pairs, positives
from selfreward_jax.training import checkpoint


def opened(root, **judge):
    raw = presets.get("m2", "tiny")
    raw.judge.max_new_tokens = 8
    for name, value in judge.items():
        raw.judge[name] = value
    for mesh in (raw.mesh, raw.generation_mesh):
        mesh.data = mesh.fsdp = mesh.tensor = 2
    run = launch.open_run(from_config_dict(raw), epath.Path(root))
    return run, run.mesh


@pytest.fixture
def files(tmp_path):
    """Two prompts with two candidates each, as the stages before leave them."""
    write_records(epath.Path(tmp_path / "m2/prompts.jsonl"), [Prompt(f"p{i}", f"Name {i} seas.", "file") for i in (1, 2)])
    write_records(epath.Path(tmp_path / "m2/responses/part-00000-of-00001.jsonl"), [
        Response(f"p{i}", n, f"Sea {i} {n}." + " word" * 5 * n, (i, n, 9), (-1.0,) * 3, "stop")
        for i in (1, 2) for n in (0, 1)
    ])  # fmt: skip
    return tmp_path


def read(root) -> list[Judgment]:
    return read_parts(epath.Path(root) / "m2" / "judgments", Judgment)


def test_a_fixed_model_judges_as_the_model_itself_would_with_these_weights(files):
    run, mesh = opened(files)
    with jax.set_mesh(mesh):
        checkpoint.save_params(run.root / "m1" / "params", params_of(run, "m0"))
        judgments.make(run, "m2", "m1")
        own = read(files)
        for judge in ("random:tiny", "m1"):
            (epath.Path(files) / "m2" / "judgments").rmtree()
            fixed, _ = opened(files, model=judge)
            facts = judgments.make(fixed, "m2", "m7")  # a model that does not exist: it is not asked
            assert read(files) == own
    assert facts["judgments"] == 12 and sum(facts["unread"].values()) + facts["parsed"] == 12
    assert all((one.score is None) != (one.reason is None) for one in own)


def test_expected_scores_stand_beside_the_sampled_ones(files, monkeypatch):
    run, mesh = opened(files, score="expected")
    real = judgments.sample_parts

    def says_scores(run, model, how, requests, stage, folder, unit, to_records, stops):
        """The sampler's answers with a score put in their place: random weights state none."""

        def written(first, completions):
            texts = [[f"Fine.\nScore: {(i + k) % 6}" for k in range(len(some))] for i, some in enumerate(completions, first)]
            ids = [[(*encode_text(run.chat, text), run.chat.end_of_turn) for text in some] for some in texts]
            return to_records(first, [
                [dataclasses.replace(one, ids=new, finish_reason="stop") for one, new in zip(some, news, strict=True)]
                for some, news in zip(completions, ids, strict=True)
            ])  # fmt: skip

        return real(run, model, how, requests, stage, folder, unit, written)

    monkeypatch.setattr(judgments, "sample_parts", says_scores)
    with jax.set_mesh(mesh):
        checkpoint.save_params(run.root / "m1" / "params", params_of(run, "m0"))
        facts = judgments.make(run, "m2", "m1")
    made = read(files)
    assert [one.score for one in made] == [str((i + k) % 6) for i in range(4) for k in range(3)]
    assert all(one.expected is not None and 0 < float(one.expected) < 5 for one in made)
    assert facts["expected"]["candidates"] == 4 and facts["expected"]["sampled_distance"] > 0


class Server(http.server.BaseHTTPRequestHandler):
    """Gives the longer answer the higher score; every k-th choice one point less. Fails once."""

    asked: ClassVar[list[dict]] = []
    failures = 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Server.failures:
            Server.failures -= 1
            self.send_error(503)
            return
        Server.asked.append(body)
        response = body["messages"][0]["content"].split("<response>\n")[1].split("\n</response>")[0]
        score = 4 if "word" in response else 2
        choices = [
            {"index": k, "finish_reason": "stop", "message": {"content": f"So.\nScore: {score - (k == 2)}"}}
            for k in range(body["n"])
        ]
        answer = json.dumps({"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 3}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_judges_and_its_pairs_follow(files, url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-key-that-nobody-sees-again")
    monkeypatch.setattr(Server, "asked", [])
    monkeypatch.setattr(Server, "failures", 1)
    run, mesh = opened(files, model=url, endpoint_model="judge-1")
    with jax.set_mesh(mesh):
        facts = judgments.make(run, "m2", "m1")
        made = read(files)
        assert [one.score for one in made] == ["2", "2", "1", "4", "4", "3"] * 2
        assert facts["usage"] == {"requests": 5, "retries": 1, "prompt_tokens": 40, "completion_tokens": 12}
        assert {body["model"] for body in Server.asked} == {"judge-1"}
        assert judgments.make(run, "m2", "m1")["usage"]["requests"] == 0  # the part is there: nothing is paid twice
        found = pairs.make(run, "m2")
        assert found["pairs"] == 2
        rows = [json.loads(line) for line in (files / "m2" / "preferences.jsonl").read_text().splitlines()]
        assert [set(row) for row in rows] == [{"prompt", "chosen", "rejected"}] * 2
        assert all("word" in row["chosen"] and "word" not in row["rejected"] for row in rows)
        kept = "".join(path.read_text() for path in files.rglob("*.json*"))
        assert "nobody-sees" not in kept


def test_positives_are_the_answers_at_the_top_and_none_is_one_line(files, url, monkeypatch):
    monkeypatch.setattr(Server, "failures", 0)
    run, mesh = opened(files, model=url, endpoint_model="judge-1")
    with jax.set_mesh(mesh):
        judgments.make(run, "m2", "m1")
        with pytest.raises(UserError, match=r"no answer has a mean score of 5: \{'below 5': 4\}, highest means \{'11/3': 2"):
            positives.make(run, "m2")
        run.config = dataclasses.replace(run.config, aift=dataclasses.replace(run.config.aift, positive_score=3.5))
        facts = positives.make(run, "m2")
    assert facts["positives"] == 2 and facts["drops"] == {"below 3.5": 2}
