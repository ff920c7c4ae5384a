"""Ratings of answers, as the page sends them, and what the page is told of the server."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import generate as G

import pytest
from conftest import run_command
from scripted import scripted


def reply(messages, adapted):
    return "好"


def pair(prompt="黄芪？", chosen="补气", rejected="泻下", **more):
    """A rating; a side that is None was not judged."""

    def say(role, text):
        return [] if text is None else [{"role": role, "content": text}]

    sides = {"chosen": say("assistant", chosen), "rejected": say("assistant", rejected)}
    return {"prompt": say("user", prompt), **sides, **more}


def fetch(url, content=None, **headers):
    """(status, JSON) of a GET, or of a POST of content."""
    try:
        with urlopen(Request(url, content, headers), timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def rate(address, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(f"{address}v1/ratings", content, **headers)


def test_ratings_are_lines_of_preference_pairs(tmp_path):
    """In TRL's form, behind what is there, each line whole whoever else writes."""
    path = tmp_path / "ratings.jsonl"
    path.write_text(json.dumps(pair("旧")) + "\n")
    said = [pair(f"问{n}", "长" * 9000, None if n % 2 else "短", models={}) for n in range(40)]
    with scripted(reply, ratings=str(path)) as address:
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda each: rate(address, each), said)]
        assert answers == [(200, {})] * len(said)
        # What was said is in the file while the server runs.
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines[0] == pair("旧")
    assert sorted(lines[1:], key=str) == sorted(said, key=str)


BAD = {
    "no prompt": {"chosen": [], "rejected": []},
    "no chosen": {"prompt": pair()["prompt"], "rejected": []},
    "prompt a text": {**pair(), "prompt": "黄芪？"},
    "chosen a text": {**pair(), "chosen": "补气"},
    "chosen null": {**pair(), "chosen": None},
    "chosen of a user": {**pair(), "chosen": pair()["prompt"]},
    "two answers": {**pair(), "chosen": pair()["chosen"] * 2},
    "no text": {**pair(), "rejected": [{"role": "assistant", "content": 1}]},
    "an unknown role": {**pair(), "prompt": [{"role": "root", "content": "a"}]},
    "a list": [pair()],
    "half a character": json.dumps({**pair(), "note": "\ud800"}).encode(),
    "no JSON": b"{",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("ratings") / "ratings.jsonl"
    with scripted(reply, ratings=str(path)) as address:
        yield address, path


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_pair_is_refused(kept, name):
    address, path = kept
    status, answer = rate(address, BAD[name])
    assert status == 400 and answer["error"]["message"]
    assert path.read_bytes() == b""


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    """Without --ratings no rating is taken; with a key only who has it may rate."""
    monkeypatch.chdir(tmp_path)
    with scripted(reply) as address:
        status, answer = rate(address, pair())
        assert status == 400 and "--ratings" in answer["error"]["message"]
    path = tmp_path / "r.jsonl"
    with scripted(reply, ratings=str(path), api_key="key") as address:
        assert rate(address, pair())[0] == 401 and path.read_bytes() == b""
        assert rate(address, pair(), Authorization="Bearer key")[0] == 200
        assert fetch(f"{address}v1/ratings")[0] == 405
    assert [*tmp_path.iterdir()] == [path] and len(path.read_text("utf-8").splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_told():
    with scripted(reply, ratings="/dev/full") as address:
        status, answer = rate(address, pair())
        assert status == 400 and "No space" in answer["error"]["message"]
        assert fetch(f"{address}health")[0] == 200


def test_the_page_is_told_how_the_server_was_started(tmp_path):
    all_set = {"single_or_multi": "multi", "ratings": str(tmp_path / "r.jsonl")}
    for options, memory, ratings in (({}, False, False), (all_set, True, True)):
        with scripted(reply, temperature=0.5, **options) as address:
            cards = fetch(f"{address}v1/models")[1]["data"]
        assert [card["id"] for card in cards] == ["tuned", "base"]
        for card in cards:
            assert (card["memory"], card["ratings"]) == (memory, ratings)
            assert card["defaults"]["temperature"] == 0.5 and "data/tiny" in card["about"]


@pytest.mark.parametrize("way", [["黄芪"], ["--instruct_dir", "-"], []])
def test_only_a_server_takes_ratings(way, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert run_command(G.main, *way, "--ratings", path) == 2
    assert "ratings" in capsys.readouterr().err and not path.exists()


def test_a_file_that_cannot_be_written_is_met_at_the_start(tmp_path, base, capsys):
    path = tmp_path / "no folder" / "r.jsonl"
    options = ("--base_model", base, "--use_lora", "False", "--port", 0, "--context", 300)
    assert run_command(G.main, "--serve", "--ratings", path, *options) == 2
    assert "no folder" in capsys.readouterr().err
