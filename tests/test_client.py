"""build_data.Client: real HTTP, the real openai client, a loopback server with planted faults."""

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import random
import resource
import socket
import threading
import time
import zlib
from types import SimpleNamespace

import build_data as D
import generate as G
import model as M

import pytest
from fake_openai import Connection, Running, Scripted, Server, completion
from scripted import listening

KEY = "sk-planted-4711"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def options(url, *more):
    parser = M.Parser()
    parser.add_settings(D.Api)
    given = parser.parse_args(["--model", "fake", "--output", "o", "--base_url", url, *more])
    return D.Api(**vars(given))


def jobs(n):
    return {f"item {i}": [{"role": "user", "content": f"- 黄芪的功效：补气{i}"}] for i in range(n)}


def ask(client, jobs):
    """Ask, and raise what a run ends with."""
    client.ask(jobs)
    client.end()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_job_is_answered_once_whatever_the_server_does(tmp_path):
    """Each fault of transport costs exactly one more request; what is on the file is never asked
    again."""
    with Running(
        "--key", KEY, "--faults", '{"429": 0.05, "500": 0.1, "drop": 0.05, "hang": 0.05}'
    ) as server:
        client = D.Client(
            tmp_path / "r.jsonl", options(server.url, "--concurrency", "32", "--timeout", "1")
        )
        client.ask(jobs(60))
        seen = server.stats()
        assert (
            sorted(r["key"] for r in lines(tmp_path / "r.jsonl")) == sorted(jobs(60))
            and not client.failed
        )
        assert (
            seen["requests"] == 60 + sum(seen["count"].values()) == client.requests
            and sum(seen["count"].values()) > 5
        )
        client.ask(jobs(60))
        assert server.stats()["requests"] == seen["requests"]
        reply = client.replies.get("item 3")
        assert (
            reply["prompt_hash"] == D.prompt_hash(jobs(60)["item 3"])
            and "补气3" in reply["content"]
        )
        assert (
            reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 300}
            and reply["params"]["model"] == "fake"
        )
    assert KEY not in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_refused_parameters_are_given_up(tmp_path):
    with Running("--refuse", "max_completion_tokens", "temperature", "response_format") as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--max_tokens", "77"))
        client.ask(jobs(20))
        assert client.params == {"model": "fake", "max_tokens": 77} and len(client.replies) == 20
        assert lines(tmp_path / "r.jsonl")[0]["params"] == {"model": "fake", "max_tokens": 77}


@pytest.mark.parametrize(
    "more, word",
    [(["--key", "sk-other"], "Incorrect API key"), (["--model", "other"], "does not exist")],
)
def test_what_no_request_can_mend_stops_at_once(tmp_path, more, word):
    with Running(*more) as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--concurrency", "4"))
        with pytest.raises(ValueError, match=word) as caught:
            ask(client, jobs(50))
        assert (
            server.stats()["requests"] <= 4
            and KEY not in str(caught.value)
            and "\n" not in str(caught.value)
        )


def test_a_server_that_is_gone_is_not_asked_for_ever(tmp_path):
    client = D.Client(
        tmp_path / "r.jsonl",
        options("http://127.0.0.1:9/v1", "--retries", "0", "--concurrency", "2"),
    )
    with pytest.raises(ValueError, match="in a row without an answer"):
        ask(client, jobs(1000))
    assert client.requests < 20


def test_caps_hold(tmp_path):
    """No request leaves that could exceed max_cost (a reply costs 0.6 thousandths of a dollar here,
    at most 0.8)."""
    with Running() as server:
        client = D.Client(tmp_path / "a.jsonl", options(server.url, "--max_requests", "7"))
        client.ask(jobs(50))
        assert server.stats()["requests"] == len(client.replies) == 7 and "max_requests" in str(
            client.stop
        )
        cap = options(
            server.url,
            "--max_cost",
            "0.01",
            "--price_in",
            "1",
            "--price_out",
            "2",
            "--max_tokens",
            "400",
        )
        client = D.Client(tmp_path / "b.jsonl", cap)
        client.ask(jobs(50))
        assert (
            11 <= len(client.replies) <= 16
            and client.spent == pytest.approx(0.0006 * len(client.replies), rel=0.05)
            and client.spent <= 0.01
        )
        client.replies.file.close()
        again = D.Client(tmp_path / "b.jsonl", cap)
        again.ask(jobs(50))
        assert (
            again.spent <= 0.01 and len(again.replies) <= 16
        )  # the cap is the file's, not the run's


def test_requests_that_time_out_count(tmp_path):
    """An endpoint may bill what it answers too late: as one request, and as dear as it could be
    (here 0.8 thousandths)."""
    with Running("--faults", '{"hang": 1}') as server:
        common = ("--timeout", "1", "--retries", "0", "--concurrency", "3")
        client = D.Client(tmp_path / "a.jsonl", options(server.url, "--max_requests", "5", *common))
        client.ask(jobs(50))
        assert server.stats()["requests"] == client.requests == 5 and "max_requests" in str(
            client.stop
        )
        prices = (
            "--max_cost",
            "0.004",
            "--price_in",
            "1",
            "--price_out",
            "2",
            "--max_tokens",
            "400",
        )
        client = D.Client(tmp_path / "b.jsonl", options(server.url, *prices, *common))
        client.ask(jobs(50))
        assert (
            server.stats()["requests"] == 5 + 4
            and "max_cost" in str(client.stop)
            and client.spent == 0
        )


def test_a_key_that_is_no_secret_stays_out_of_other_words(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "e")
    with (
        Running("--model", "other") as server,
        pytest.raises(ValueError, match="The model `fake` does not exist"),
    ):
        ask(D.Client(tmp_path / "r.jsonl", options(server.url)), jobs(1))


def test_two_processes_on_one_output_are_refused(tmp_path):
    client = D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))
    with pytest.raises(ValueError, match="another process"):
        D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))
    client.replies.file.close()
    D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))


def test_half_a_line_goes_and_other_prompts_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    with Running() as server:
        D.Client(path, options(server.url)).ask(jobs(5))
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])  # a crash in the middle of a write
        client = D.Client(path, options(server.url))
        assert len(client.replies) == 4
        client.ask(jobs(5))
        assert server.stats()["requests"] == 6 and len(lines(path)) == 5
        with pytest.raises(ValueError, match="r.jsonl: the reply to item 4"):
            client.ask(jobs(4) | {"item 4": [{"role": "user", "content": "?"}]})


def test_dry_run_asks_nothing_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    client = D.Client(
        tmp_path / "r.jsonl",
        options("http://127.0.0.1:9/v1", "--dry_run", "--price_in", "1", "--price_out", "2"),
    )
    client.ask(jobs(100))
    out = capsys.readouterr().out
    assert (
        "100 prompts, 100 to ask" in out
        and "204,800 out" in out
        and "0.42 dollars" in out
        and not list(tmp_path.iterdir())
    )
    D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1", "--dry_run")).ask(jobs(100))
    assert (
        "0.00" not in (out := capsys.readouterr().out) and "--price_in" in out
    )  # not known is not nothing


def test_batch_is_found_again_after_a_kill(tmp_path):
    """Killed while waiting, then run again with another temperature: one batch at the server, every
    reply on the file with the parameters it was sent, at half the price; which it keeps when a
    later run asks one by one."""
    prices = ("--price_in", "1", "--price_out", "1")
    with Running("--batch_delay", "2") as server:

        def run(temperature):
            client = D.Client(
                tmp_path / "r.jsonl",
                options(
                    server.url, "--batch", "--poll", "0.1", "--temperature", temperature, *prices
                ),
            )
            client.ask(jobs(30))
            return client

        child = multiprocessing.get_context("fork").Process(target=run, args=("1",))
        child.start()
        while server.stats()["batches"] == 0:
            assert child.is_alive()
            time.sleep(0.05)
        child.kill()
        child.join()
        note = json.loads((tmp_path / "r.batches.json").read_text())
        (tmp_path / "r.batches.json").write_text(
            json.dumps({**note, "batch": None})
        )  # as if killed before the id could be noted
        client = run("0.2")
        assert (
            len(client.replies) == 30
            and not client.failed
            and client.spent == pytest.approx(0.5e-6 * 30 * 311, rel=0.01)
        )
        assert server.stats()["batches"] == 1 and set(server.stats()["answered"].values()) == {1}
        assert {reply["params"]["temperature"] for reply in lines(tmp_path / "r.jsonl")} == {1.0}
        client.replies.file.close()
        later = D.Client(tmp_path / "r.jsonl", options(server.url, *prices))
        later.ask(jobs(31))
        assert later.spent == pytest.approx(1e-6 * (0.5 * 30 + 1) * 311, rel=0.01)
        later.replies.file.close()
        assert D.Client(
            tmp_path / "r.jsonl", options(server.url, "--batch", *prices)
        ).spent == pytest.approx(later.spent)


def test_a_batch_whose_making_was_not_heard_of_is_found_by_its_file(tmp_path):
    """The endpoint makes it and hangs up: the client does not make another, the same command ends
    well with the one."""
    with Running("--batch_delay", "0", "--lose_batch") as server:
        for error in ("run the same command to go on", ""):
            client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
            if error:
                with pytest.raises(ValueError, match=error):
                    ask(client, jobs(5))
            else:
                ask(client, jobs(5))
            client.replies.file.close()
            assert server.stats()["batches"] == 1
        assert len(client.replies) == 5 and set(server.stats()["answered"].values()) == {1}


def test_a_batch_that_is_gone_is_named_with_its_note(tmp_path):
    note = tmp_path / "r.batches.json"
    with Running("--batch_delay", "0") as server:
        M.write_json(note, {"file": "file-9", "batch": "batch_9", "params": {"temperature": 1.0}})
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        with pytest.raises(ValueError, match="batch_9.* delete r.batches.json"):
            ask(client, jobs(3))
        client.replies.file.close()
        note.unlink()
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        ask(client, jobs(3))
        assert len(client.replies) == 3


@pytest.mark.parametrize("note", [{"file-1": "batch_1", "params": {}}, {}, {"file": "file-1"}])
def test_a_note_of_another_form_is_one_line_and_makes_no_batch(tmp_path, note):
    path = tmp_path / "r.batches.json"
    M.write_json(path, note)
    with Running("--batch_delay", "0") as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        with pytest.raises(ValueError, match="r.batches.json is no note of a batch.*wanted file"):
            ask(client, jobs(3))
        assert server.stats()["batches"] == 0 and json.loads(path.read_text()) == note


def test_rows_a_batch_lost_are_named(tmp_path):
    with Running("--batch_delay", "0", "--faults", '{"batch_error": 0.3}') as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        client.ask(jobs(40))
        assert len(client.replies) + len(client.failed) == 40 and "expired" in next(
            iter(client.failed.values())
        )


def test_a_batch_gives_up_refused_parameters(tmp_path):
    """Each refusal costs one more batch, of the rows that were refused; the next client's batch
    knows nothing of it."""
    with Running(
        "--batch_delay", "0", "--refuse", "max_completion_tokens", "temperature"
    ) as server:
        client = D.Client(
            tmp_path / "r.jsonl",
            options(server.url, "--batch", "--poll", "0.1", "--max_tokens", "77"),
        )
        client.ask(jobs(20))
        assert (
            client.params
            == {"model": "fake", "max_tokens": 77, "response_format": {"type": "json_object"}}
            and not client.failed
        )
        assert {r["params"]["max_tokens"] for r in lines(tmp_path / "r.jsonl")} == {77} and len(
            client.replies
        ) == 20
        assert server.stats()["batches"] == 3 and set(server.stats()["answered"].values()) == {1}
    with Running(
        "--batch_delay", "0", "--refuse", "messages"
    ) as server:  # what cannot be left out ends at once
        client = D.Client(tmp_path / "m.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        client.ask(jobs(20))
        assert (
            len(client.failed) == 20
            and "messages" in client.failed["item 0"]
            and server.stats()["batches"] == 1
        )


def test_a_batch_that_fails_says_why(tmp_path):
    with Running("--model", "other") as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--batch", "--poll", "0.1"))
        client.ask(jobs(3))
        assert not client.replies and not (tmp_path / "r.batches.json").exists()
        with pytest.raises(ValueError, match="batch_0 failed.* `fake` does not exist"):
            client.end()


def test_a_batch_counts_its_requests(tmp_path):
    with Running() as server:
        client = D.Client(
            tmp_path / "r.jsonl",
            options(server.url, "--batch", "--max_requests", "20", "--poll", "0"),
        )
        client.ask(jobs(15))
        assert client.requests == 15 and len(client.replies) == 15
        with pytest.raises(ValueError, match="max_requests"):
            ask(client, jobs(25))
        assert server.stats()["batches"] == 1


@pytest.mark.parametrize(
    "url, proxy",
    [("http://127.0.0.1:PORT/v1", ""), ("http://127.0.0.1:9/v1", "socks5://127.0.0.1:1080")],
)
def test_an_address_that_is_none_is_one_line(tmp_path, monkeypatch, url, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ValueError, match="base_url"):
        ask(D.Client(tmp_path / "r.jsonl", options(url)), jobs(1))


def test_batch_is_not_sent_above_its_cap(tmp_path):
    with Running() as server:
        client = D.Client(
            tmp_path / "r.jsonl",
            options(
                server.url, "--batch", "--max_cost", "0.01", "--price_in", "1", "--price_out", "1"
            ),
        )
        with pytest.raises(ValueError, match="max_cost"):
            ask(client, jobs(40))
        client = D.Client(
            tmp_path / "n.jsonl", options(server.url, "--batch", "--max_requests", "39")
        )
        with pytest.raises(ValueError, match="max_requests"):
            ask(client, jobs(40))
        assert server.stats()["batches"] == 0


REFUSED = (
    400,
    {
        "error": {
            "message": "Input data may contain inappropriate content.",
            "type": "data_inspection_failed",
            "param": None,
        }
    },
)
PRICES = ("--price_in", "1", "--price_out", "2")


def run_scripted(tmp_path, reply, *more, count=12):
    """(client after its run, number of requests, what the run ended with) against a scripted
    endpoint."""
    with Scripted(reply) as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, *more))
        client.ask(jobs(count))
        return client, len(server.bodies), client.stop


def test_a_prompt_that_is_refused_is_an_answer(tmp_path):
    """Ten in a row at the front are no dead endpoint; only they are asked again, and that ends well
    too."""

    def reply(prompt, *_):
        return REFUSED if int(prompt.split("补气")[1]) < 10 else "{}"

    for requests in (12, 10):
        client, seen, stop = run_scripted(tmp_path, reply, "--concurrency", "2")
        assert (len(client.replies), seen, stop, len(client.failed)) == (2, requests, None, 10)
        client.replies.file.close()


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_holds_for_every_request_stops_at_the_first(tmp_path, status):
    client, seen, stop = run_scripted(
        tmp_path,
        lambda *_: (status, {"error": {"message": "Insufficient Balance"}}),
        "--concurrency",
        "1",
    )
    assert seen == 1 and "Insufficient Balance" in str(stop)


PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "嗯"}]},
    {"type": "text", "text": "甲"},
    {"type": "text", "text": "乙"},
]
USED = {"prompt_tokens": 100, "completion_tokens": 300}


@pytest.mark.parametrize(
    "said, content, spent, reserved",
    [
        (PARTS, "甲乙", 0.0007, False),
        (
            (200, completion("{}", {"prompt_tokens": "100", "completion_tokens": "300"})),
            "{}",
            0.0007,
            False,
        ),
        (
            (200, completion("{}", {"prompt_tokens": None, "completion_tokens": "many"})),
            "{}",
            0,
            True,
        ),
        ((200, completion("{}", [1])), "{}", 0, True),
        ((200, {"choices": [], "usage": USED}), None, 0.0007, False),
        ((200, completion([3], USED)), None, 0.0007, False),
        ((200, {"choices": []}), None, 0, True),
        ((200, b"[" * 200000), None, 0, True),
        ((200, b'{"choices": '), None, 0, True),
        ((200, b'"a page"'), None, 0, True),
    ],
)
def test_a_reply_of_another_shape_is_read_or_not_asked_again(
    tmp_path, said, content, spent, reserved
):
    """What it cost, as far as the endpoint tells, counts; the replies in flight beside it are
    kept."""
    client, seen, stop = run_scripted(
        tmp_path, lambda prompt, *_: said if prompt.endswith("气2") else "{}", *PRICES, count=4
    )
    assert seen == 4 and stop is None and len(client.replies) == 3 + (content is not None)
    assert (client.replies.get("item 2") or {"content": None})["content"] == content
    assert (
        client.spent == pytest.approx(3 * 0.0007 + spent) and (client.reserved > 0.004) == reserved
    )
    client.replies.file.close()
    D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1"))  # the file can be read again


def test_an_error_of_ours_loses_no_reply_in_flight(tmp_path, monkeypatch):
    stored = D.Client.store

    def store(self, key, *more):
        if key == "item 0":
            raise RuntimeError("a bug")
        stored(self, key, *more)

    monkeypatch.setattr(D.Client, "store", store)
    with Running("--latency", "0.2") as server:
        client = D.Client(tmp_path / "r.jsonl", options(server.url, "--concurrency", "8"))
        client.ask(jobs(8))
        assert len(lines(tmp_path / "r.jsonl")) == 7 and pytest.raises(RuntimeError, client.end)


@pytest.mark.parametrize(
    "said, most", [("nan", 31), ("-5", 31), ("soon", 31), ("2", 3), ("inf", 3601), ("1e9", 3601)]
)
def test_what_an_endpoint_asks_to_wait_is_bounded(said, most):
    """Retry-After: nan was an hour, for it is not below one."""
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": said}))
    assert not D.outcome_of(error, 9)[1] > most


def test_leaving_out_a_parameter_is_no_try(tmp_path):
    with Running("--refuse", "temperature", "response_format", "max_completion_tokens") as server:
        client = D.Client(
            tmp_path / "r.jsonl", options(server.url, "--retries", "0", "--concurrency", "1")
        )
        ask(client, jobs(5))
        assert len(client.replies) == 5 and server.stats()["requests"] == 5 + 3


def test_a_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    with Running() as server:
        D.Client(path, options(server.url)).ask(jobs(3))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert (
            len(D.Client(path, options(server.url, "--dry_run")).replies) == 3
            and path.read_bytes() == whole[:-1]
        )
        client = D.Client(path, options(server.url))
        assert path.read_bytes() == whole and len(client.replies) == 3
        client.ask(jobs(4))
        assert server.stats()["requests"] == 4 and [
            client.replies.get(f"item {i}")["key"] for i in range(4)
        ] == [f"item {i}" for i in range(4)]


def test_most_is_a_bound_for_any_tokenizer(tmp_path):
    """A rare character is three tokens to a tokenizer that falls back to bytes."""
    tokenizer = D.load_tokenizer(G.DATA / "tiny")
    client = D.Client(tmp_path / "r.jsonl", options("http://127.0.0.1:9/v1", "--dry_run"))
    for text in ("龘靐齉爩鱻麤䨻" * 60, "𠮷𠀋", "黄芪的功效", "", "a b"):
        assert client.bound([[{"content": text}]])["prompt_tokens"] >= len(
            tokenizer.encode(text, bos=True)
        )


def test_dropped_connections_are_as_dear_as_they_may_be(tmp_path):
    """Those that the endpoint may have answered; not those that were never made."""
    more = (*PRICES, "--max_cost", "0.01", "--concurrency", "2")
    client, seen, stop = run_scripted(tmp_path, lambda *_: None, "--retries", "3", *more, count=50)
    assert (
        seen == 2
        and "max_cost" in str(stop)
        and client.reserved == pytest.approx(2 * client.cost(client.bound(jobs(1).values()), False))
    )
    client = D.Client(
        tmp_path / "s.jsonl", options("http://127.0.0.1:9/v1", "--retries", "1", *more)
    )
    with pytest.raises(ValueError, match="in a row"):
        ask(client, jobs(50))
    assert client.reserved == pytest.approx(0)


def test_recorded_parameters_are_those_sent(tmp_path):
    """item 0 is answered late, after another has found out that the temperature is refused."""

    def reply(prompt, body, number):
        if prompt.endswith("气0"):
            time.sleep(0.8)
        elif "temperature" in body:
            return 400, {
                "error": {"message": "Unsupported parameter: 'temperature'", "param": "temperature"}
            }
        return "{}"

    client, *_ = run_scripted(tmp_path, reply, count=2)
    assert (
        client.replies.get("item 0")["params"]["temperature"] == 1.0
        and "temperature" not in client.replies.get("item 1")["params"]
    )


def test_an_exhausted_quota_is_not_tried_again(tmp_path):
    """It comes as a 429, which otherwise asks for patience."""
    error = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    more = ("--concurrency", "1", "--retries", "6")
    client, seen, stop = run_scripted(tmp_path, lambda *_: (429, error), *more)
    assert seen == 1 and "You exceeded your quota" in str(stop)


@pytest.mark.parametrize("retries", [0, 1, 6])
def test_max_cost_bounds_what_may_be_billed(tmp_path, retries):
    """Each try that times out may be billed in full: all tries together stay under the cap."""
    cap = ("--max_cost", "0.004", "--max_tokens", "400", "--retries", str(retries))
    with Running("--faults", '{"hang": 1}') as server:
        more = (*PRICES, *cap, "--timeout", "0.5", "--concurrency", "3")
        client = D.Client(tmp_path / "r.jsonl", options(server.url, *more))
        client.ask(jobs(50))
        dearest = client.cost(client.bound(jobs(1).values()), batch=False)
        assert server.stats()["requests"] * dearest <= 0.004 < client.reserved + dearest
        assert "max_cost" in str(client.stop)


def test_a_batch_interrupted_twice_keeps_its_note(tmp_path):
    """The second run finds a note and is stopped while it waits: it sends no other batch."""
    path, notes = tmp_path / "r.batches.json", []

    def interrupted_run(url):
        client = D.Client(tmp_path / "r.jsonl", options(url, "--batch"))

        async def pause(_):
            client.stop = D.Stopped("interrupted")

        client.pause = pause
        client.ask(jobs(3))
        client.replies.file.close()
        notes.append(json.loads(path.read_text()))

    with Running("--batch_delay", "60") as server:
        for _ in range(2):
            interrupted_run(server.url)
        assert notes[0] == notes[1] and notes[0]["batch"] == "batch_0"
        assert server.stats()["batches"] == 1


def test_half_a_character_costs_no_other_reply(tmp_path):
    """A lone surrogate, as models write an emoji that was cut, escaped in JSON: that reply and the
    others stand on the disk, and what is in memory is what a later run reads there."""

    def reply(prompt, *_):
        data = json.dumps(completion("甲\ud83d" if prompt.endswith("气2") else "乙"))
        return 200, data.encode()

    client, seen, stop = run_scripted(tmp_path, reply)
    assert (seen, stop, len(client.replies)) == (12, None, 12)
    kept = dict(client.replies)
    assert kept["item 2"]["content"].startswith("甲") and kept["item 3"]["content"] == "乙"
    json.dumps(kept, ensure_ascii=False).encode()
    client.replies.file.close()
    assert dict(D.Replies(tmp_path / "r.jsonl", read_only=True)) == kept


@pytest.mark.parametrize("where", ["content", "model", "finish_reason", "error"])
def test_a_key_that_comes_back_is_kept_nowhere(tmp_path, where):
    said = completion(f"你的密钥是{KEY}。" if where == "content" else "{}")
    if where == "model":
        said["model"] = f"m {KEY}"
    if where == "finish_reason":
        said["choices"][0]["finish_reason"] = [KEY]
    answer = (400, {"error": {"message": [KEY], "code": {KEY: KEY}}})
    client, *_ = run_scripted(tmp_path, lambda *_: answer if where == "error" else (200, said))
    assert (len(client.failed) == 12) == (where == "error")
    assert KEY not in str(client.replies) + str(client.failed)
    assert KEY not in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_a_bad_line_of_a_batch_costs_that_line(tmp_path, capsys):
    def spoil(server, id):
        batch = Server.batch(server, id)
        if "output_file_id" in batch:
            lines = server.files[batch["output_file_id"]].splitlines()
            bad = [b"{", b"[]", b"null", b'{"custom_id": 3}', b'{"custom_id": "a"}', b"\xff"]
            bad.append(b"[" * 100000)
            server.files[batch["output_file_id"]] = b"\n".join([*bad, *lines[1:]])
        return batch

    with local(spoil) as url:
        client = D.Client(tmp_path / "r.jsonl", options(url, "--batch", "--poll", "0.05"))
        ask(client, jobs(9))
    assert len(client.replies) == 8
    assert capsys.readouterr().out.count("no result: ") == 7


@pytest.mark.parametrize("batch", [None, [], "a", {"id": 3}, {"id": "b", "status": "failed"}, 7])
def test_a_batch_of_another_kind_is_one_line(tmp_path, batch):
    """What the Batch API gives may be anything: it is said in one line, and no traceback."""
    with local(lambda server, id: batch) as url:
        args = options(url, "--batch", "--poll", "0.01", "--retries", "0")
        client = D.Client(tmp_path / "r.jsonl", args)
        threading.Timer(3, setattr, (client, "stop", D.Stopped("enough"))).start()
        client.ask(jobs(2))
    assert isinstance(client.stop, D.Stopped | ValueError)


@contextlib.contextmanager
def local(batch):
    """The address of fake_openai.Server in a thread, with its `batch` replaced."""
    given = argparse.Namespace(
        model="fake",
        key="",
        latency=0,
        batch_delay=0,
        lose_batch=False,
        faults="{}",
        refuse=[],
        seed=0,
        judge="longer",
    )
    server = Server(given)
    server.batch = lambda id: batch(server, id)

    async def made():
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)

    with listening(made()) as url:
        yield url


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


def bomb(send):
    """Half a GiB in half a MiB, packed although nobody asked for it: one block of deflate (RFC
    1951), again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = block * 512
    send(HEAD + b"Content-Encoding: deflate\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


def flood(send):
    send(HEAD + b"\r\n")
    for _ in range(10**6):
        send(b" " * 65536)


def flood_of_errors(send):
    send(HEAD.replace(b"200 OK", b"400 Bad Request") + b"\r\n")
    for _ in range(10**6):
        send(b" " * 65536)


def drip(send):
    send(HEAD + b"\r\n")
    while True:
        time.sleep(0.1)
        send(b" ")


@pytest.mark.parametrize("act", [bomb, flood, flood_of_errors, drip])
def test_a_reply_has_a_size_and_an_end(tmp_path, act):
    """One prompt of four meets it; the others are answered, memory stays."""
    sent = []

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            data = b""
            while "补气" not in data.decode("utf-8", "replace"):
                data += connection.recv(65536)

            def send(data):
                connection.sendall(data)
                sent.append(len(data))

            if "补气2" in data.decode("utf-8", "replace"):
                act(send)
            else:
                body = json.dumps(completion("{}")).encode()
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    listening = socket.create_server(("127.0.0.1", 0))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    seconds = "1.5" if act is drip else "60"
    args = options(url, "--timeout", seconds, "--retries", "0", "--concurrency", "4", *PRICES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    client = D.Client(tmp_path / "r.jsonl", args)
    client.ask(jobs(4))
    listening.close()
    assert client.stop is None and sorted(client.replies) == ["item 0", "item 1", "item 3"]
    assert list(client.failed) == ["item 2"] and time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert sum(sent) < 40 << 20  # 8 MiB, and what the kernel's buffers hold
    # Nobody said what it cost.
    assert client.reserved > 0


@pytest.mark.parametrize("flight", [1, 16, 64, 256])
def test_no_more_is_billed_than_the_cap_and_one_request(tmp_path, flight):
    """An endpoint that bills each request it gets in full, and then answers, hangs up, fails with
    a 500, or answers too late."""
    bills, dice = [], random.Random(flight)
    prices = (1e-6, 2e-6)

    def reply(prompt, body, number):
        used = {"prompt_tokens": len(prompt.encode()), "completion_tokens": 400}
        bills.append(prices[0] * used["prompt_tokens"] + prices[1] * 400)
        fate = dice.choices(["answer", "drop", "500", "502", "late"], (9, 3, 3, 2, 1))[0]
        if fate == "late":
            time.sleep(2.5)
        if fate == "drop":
            return None
        if fate in ("500", "502"):
            return int(fate), {"error": {"message": "overloaded"}}
        return 200, completion("{}", used)

    cap = ("--max_cost", "0.05", "--max_tokens", "400", "--concurrency", str(flight))
    more = (*PRICES, *cap, "--timeout", "2", "--retries", "1")
    client, seen, stop = run_scripted(tmp_path, reply, *more, count=300)
    assert "max_cost" in str(stop)
    assert 0.01 < sum(bills) <= 0.05 + max(bills), (sum(bills), seen)


def test_a_client_that_goes_lets_go_of_its_replies(tmp_path):
    """The lock on the file goes with the client at once: no cycle holds it for the collector."""
    gc.disable()
    try:
        with Running() as server:
            for _ in range(2):
                D.Client(tmp_path / "r.jsonl", options(server.url)).ask(jobs(2))
    finally:
        gc.enable()


def test_a_run_that_was_stopped_lets_go_of_its_replies(tmp_path):
    """At its end, though what stopped it holds all that it was raised in."""
    gc.disable()
    try:
        with Running() as server:
            for _ in range(2):
                capped = options(server.url, "--max_requests", "1")
                ask(D.Client(tmp_path / "r.jsonl", capped), jobs(4))
    finally:
        gc.enable()
    assert len(lines(tmp_path / "r.jsonl")) == 2
