"""build_data.Asker: real HTTP, the real openai client, a loopback server with planted faults."""
import json
import multiprocessing
import time

import pytest
from fake_openai import Running

import build_data as D
import model as M

KEY = "sk-planted-4711"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def options(url, *more):
    parser = M.Parser()
    D.add_api_options(parser)
    return parser.parse_args(["--model", "fake", "--base_url", url, *more])


def jobs(n):
    return [(f"item {i}", [{"role": "user", "content": f"- 黄芪的功效：补气{i}"}]) for i in range(n)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("transport", [[], ["--aiohttp"]])
def test_every_job_is_answered_once_whatever_the_server_does(tmp_path, transport):
    """Each fault of transport costs exactly one more request; what is on the file is never asked again."""
    with Running("--key", KEY, "--faults", '{"429": 0.05, "500": 0.1, "drop": 0.05, "hang": 0.05}') as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--concurrency", "32", "--timeout", "1", *transport))
        asker.ask(jobs(60))
        seen = server.stats()
        assert sorted(r["key"] for r in lines(tmp_path / "r.jsonl")) == sorted(k for k, _ in jobs(60)) and not asker.failed
        assert seen["requests"] == 60 + sum(seen["count"].values()) == asker.requests and sum(seen["count"].values()) > 5
        asker.ask(jobs(60))
        assert server.stats()["requests"] == seen["requests"]
        reply = asker.reply("item 3")
        assert reply["prompt_hash"] == D.prompt_hash(jobs(60)[3][1]) and "补气3" in reply["content"]
        assert reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 300} and reply["params"]["model"] == "fake"
    assert KEY not in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_refused_parameters_are_given_up(tmp_path):
    with Running("--refuse", "max_completion_tokens", "temperature", "response_format") as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--max_tokens", "77"))
        asker.ask(jobs(20))
        assert asker.params == {"max_tokens": 77} and len(asker.places) == 20
        assert lines(tmp_path / "r.jsonl")[0]["params"] == {"model": "fake", "max_tokens": 77}


@pytest.mark.parametrize("more, word", [(["--key", "sk-other"], "Incorrect API key"), (["--model", "other"], "does not exist")])
def test_what_no_request_can_mend_stops_at_once(tmp_path, more, word):
    with Running(*more) as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--concurrency", "4"))
        with pytest.raises(ValueError, match=word) as caught:
            asker.ask(jobs(50))
        assert server.stats()["requests"] <= 4 and KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_gone_is_not_asked_for_ever(tmp_path):
    asker = D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1", "--retries", "0", "--concurrency", "2"))
    with pytest.raises(ValueError, match="in a row without an answer"):
        asker.ask(jobs(1000))
    assert asker.requests < 20


def test_caps_hold(tmp_path):
    """No request leaves that could exceed max_cost (a reply costs 0.6 thousandths of a dollar here, at most 0.8)."""
    with Running() as server:
        asker = D.Asker(tmp_path / "a.jsonl", options(server.url, "--max_requests", "7"))
        asker.ask(jobs(50))
        assert server.stats()["requests"] == len(asker.places) == 7 and "max_requests" in asker.stop
        cap = options(server.url, "--max_cost", "0.01", "--price_in", "1", "--price_out", "2", "--max_tokens", "400")
        asker = D.Asker(tmp_path / "b.jsonl", cap)
        asker.ask(jobs(50))
        assert 12 <= len(asker.places) <= 16 and asker.spent == pytest.approx(0.0006 * len(asker.places), rel=0.05) and asker.spent <= 0.01
        asker.file.close()
        again = D.Asker(tmp_path / "b.jsonl", cap)
        again.ask(jobs(50))
        assert again.spent <= 0.01 and len(again.places) <= 16            # the cap is the file's, not the run's


def test_requests_that_time_out_count(tmp_path):
    """An endpoint may bill what it answers too late: as one request, and as dear as it could be (here 0.8 thousandths)."""
    with Running("--faults", '{"hang": 1}') as server:
        common = ("--timeout", "0.3", "--retries", "0", "--concurrency", "3")
        asker = D.Asker(tmp_path / "a.jsonl", options(server.url, "--max_requests", "5", *common))
        asker.ask(jobs(50))
        assert server.stats()["requests"] == asker.requests == 5 and "max_requests" in asker.stop
        prices = ("--max_cost", "0.004", "--price_in", "1", "--price_out", "2", "--max_tokens", "400")
        asker = D.Asker(tmp_path / "b.jsonl", options(server.url, *prices, *common))
        asker.ask(jobs(50))
        assert server.stats()["requests"] == 5 + 4 and "max_cost" in asker.stop and asker.spent == 0


def test_aiohttp_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="aiohttp is not installed: pip install"):
        D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:1/v1", "--aiohttp"))


def test_a_key_that_is_no_secret_stays_out_of_other_words(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "e")
    with Running("--model", "other") as server, pytest.raises(ValueError, match="The model `fake` does not exist"):
        D.Asker(tmp_path / "r.jsonl", options(server.url)).ask(jobs(1))


def test_requests_leave_evenly_spaced(tmp_path):
    with Running() as server:
        start = time.time()
        D.Asker(tmp_path / "a.jsonl", options(server.url, "--rpm", "600")).ask(jobs(11))
        assert 1.0 <= time.time() - start < 2.5
        start = time.time()                                               # 417 tokens each: one second of 25,000 a minute
        D.Asker(tmp_path / "b.jsonl", options(server.url, "--tpm", "25000", "--max_tokens", "400")).ask(jobs(2))
        assert 0.9 <= time.time() - start < 2.5


def test_two_processes_on_one_output_are_refused(tmp_path):
    asker = D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))
    with pytest.raises(ValueError, match="another process"):
        D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))
    asker.file.close()
    D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))


def test_half_a_line_goes_and_other_prompts_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    with Running() as server:
        D.Asker(path, options(server.url)).ask(jobs(5))
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])                                     # a crash in the middle of a write
        asker = D.Asker(path, options(server.url))
        assert len(asker.places) == 4
        asker.ask(jobs(5))
        assert server.stats()["requests"] == 6 and len(lines(path)) == 5
        with pytest.raises(ValueError, match="1 replies answer other prompts"):
            asker.ask(jobs(4) + [("item 4", [{"role": "user", "content": "?"}])])


def test_dry_run_asks_nothing_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    asker = D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1", "--dry_run", "--price_in", "1", "--price_out", "2"))
    asker.ask(jobs(100))
    out = capsys.readouterr().out
    assert "100 prompts, 100 to ask" in out and "204,800 out" in out and "0.41 dollars" in out and not list(tmp_path.iterdir())
    D.Asker(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1", "--dry_run")).ask(jobs(100))
    assert "0.00" not in (out := capsys.readouterr().out) and "--price_in" in out    # not known is not nothing


def test_batch_is_found_again_after_a_kill(tmp_path):
    """Killed while waiting, then run again: one batch at the server, every reply on the file, at half the price."""
    with Running("--batch_delay", "2") as server:
        def ask():
            prices = ("--price_in", "1", "--price_out", "1")
            asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1", *prices))
            asker.ask(jobs(30))
            return asker
        child = multiprocessing.get_context("fork").Process(target=ask)
        child.start()
        while server.stats()["batches"] == 0:
            assert child.is_alive()
            time.sleep(0.05)
        child.kill()
        child.join()
        (tmp_path / "r.batches.json").write_text('{"file-0": null}')      # as if killed before the id could be noted
        asker = ask()
        assert len(asker.places) == 30 and not asker.failed and asker.spent == pytest.approx(0.5e-6 * 30 * 311, rel=0.01)
        assert server.stats()["batches"] == 1 and set(server.stats()["answered"].values()) == {1}


def test_rows_a_batch_lost_are_named(tmp_path):
    with Running("--batch_delay", "0", "--faults", '{"batch_error": 0.3}') as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        asker.ask(jobs(40))
        assert len(asker.places) + len(asker.failed) == 40 and "expired" in next(iter(asker.failed.values()))


def test_a_batch_gives_up_refused_parameters(tmp_path):
    """Each refusal costs one more batch, of the rows that were refused; the next Asker's batch knows nothing of it."""
    with Running("--batch_delay", "0", "--refuse", "max_completion_tokens", "temperature") as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1", "--max_tokens", "77"))
        asker.ask(jobs(20))
        assert asker.params == {"max_tokens": 77, "response_format": {"type": "json_object"}} and not asker.failed
        assert {r["params"]["max_tokens"] for r in lines(tmp_path / "r.jsonl")} == {77} and len(asker.places) == 20
        assert server.stats()["batches"] == 3 and set(server.stats()["answered"].values()) == {1}
    with Running("--batch_delay", "0", "--refuse", "messages") as server:         # what cannot be left out ends at once
        asker = D.Asker(tmp_path / "m.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        asker.ask(jobs(20))
        assert len(asker.failed) == 20 and "messages" in asker.failed["item 0"] and server.stats()["batches"] == 1


def test_a_batch_that_fails_says_why(tmp_path):
    with Running("--model", "other") as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        asker.ask(jobs(3))
        assert len(asker.failed) == 3 and "failed" in asker.failed["item 0"] and "`fake` does not exist" in asker.failed["item 0"]


def test_batch_is_not_sent_above_its_cap(tmp_path):
    with Running() as server:
        asker = D.Asker(tmp_path / "r.jsonl", options(server.url, "--batch", "--max_cost", "0.01", "--price_in", "1", "--price_out", "1"))
        with pytest.raises(ValueError, match="max_cost"):
            asker.ask(jobs(40))
        asker = D.Asker(tmp_path / "n.jsonl", options(server.url, "--batch", "--max_requests", "39"))
        with pytest.raises(ValueError, match="max_requests"):
            asker.ask(jobs(40))
        assert server.stats()["batches"] == 0
