"""A client cannot tell whether its server runs ahead: tokens, errors and messages are those without."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import genie
from genie.errors import ConfigError, RemoteOpError
from tests.frontend import models
from tests.runtime import pools
from tests.server.programs import TOKEN

NEW = 24


@pytest.fixture(scope="module")
def model():
    return models.gpt2(layers=2)


def prompt(seed=0, length=9, batch=1):
    return torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class Seen:
    """What one client saw of one server."""

    outputs: list
    receipts: list[tuple]  # without times and counters
    ahead: int
    missed: int
    bytes_out: int
    bytes_in: int
    round_trips: int
    replies: int


def seen(server, model, run, *, run_ahead, replay=False) -> Seen:
    """``run(model)`` on a session, twice: the second time all programs are known."""
    with genie.connect(server.address, TOKEN, replay=replay, run_ahead=run_ahead) as session, torch.no_grad():
        link = session.executor.link
        remote = copy.deepcopy(model).to("genie")
        for request in range(2):
            link.begin(f"{request:016d}")
            outputs = run(remote)
        out, into, trips, *_ = link.traffic()
        receipts = link.usage.receipts
        return Seen(
            outputs,
            [(r.nonce, r.ops, r.digest, r.counters.get("replayed")) for r in receipts],
            sum(r.counters.get("ahead", 0) for r in receipts),
            sum(r.counters.get("ahead_missed", 0) for r in receipts),
            out,
            into,
            trips,
            len(receipts),
        )


def compare(server, model, run, **options) -> Seen:
    """Runs it with and without; returns what was seen with."""
    without = seen(server, model, run, run_ahead=0, **options)
    ahead = seen(server, model, run, run_ahead=1, **options)
    assert len(ahead.outputs) == len(without.outputs)
    for one, other in zip(ahead.outputs, without.outputs, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)
    assert ahead.receipts == without.receipts
    assert (without.ahead, without.missed) == (0, 0)
    assert (ahead.bytes_out, ahead.round_trips) == (without.bytes_out, without.round_trips)
    # Times are written as short as they are: 3 or 5 bytes each; and the counters are there.
    assert abs(ahead.bytes_in - without.bytes_in) <= 8 * ahead.replies + 16 * ahead.round_trips
    return ahead


def generate(model, ids=None, **options):
    ids = prompt() if ids is None else ids
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids.to("genie"), attention_mask=torch.ones_like(ids).to("genie"), **options).cpu()


@pytest.mark.parametrize("replay", [False, True], ids=["lazy", "replay"])
def test_greedy_generation(server, model, replay):
    ahead = compare(server, model, lambda m: [generate(m)], replay=replay)
    assert ahead.ahead
    expected = model.generate(
        prompt(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ahead.outputs[0], expected)


def test_a_token_costs_as_many_bytes_out(server, model):
    """Of each of the last tokens, in steady state: out and round trips the same, in but for one counter."""
    from transformers import LogitsProcessor

    class Mark(LogitsProcessor):
        def __init__(self, connection):
            self.connection, self.marks = connection, []

        def __call__(self, input_ids, scores):
            c = self.connection
            self.marks.append((c.bytes_out, c.bytes_in, c.round_trips))
            return scores

    costs = []
    for run_ahead in (0, 1):
        with (
            genie.connect(server.address, TOKEN, replay=True, run_ahead=run_ahead) as session,
            torch.no_grad(),
        ):
            remote = copy.deepcopy(model).to("genie")
            for _ in range(2):
                mark = Mark(session.executor.link.connection)
                generate(remote, logits_processor=[mark])
            steady = torch.tensor(mark.marks[-10:]).diff(dim=0)
            costs.append(steady.double().mean(dim=0).tolist())
    (out, into, trips), (out_ahead, into_ahead, trips_ahead) = costs
    assert (out_ahead, trips_ahead) == (out, trips) == (out, 1.0)
    assert into_ahead <= into + 16


def stops_early(m):
    whole = generate(m)
    end = int(whole[0, -8])
    return [generate(m, min_new_tokens=0, eos_token_id=end), generate(m)]


def second_prompt(m):
    return [generate(m), generate(m, prompt(1, 14)), generate(m, prompt(2, 9, batch=2)), generate(m)]


def then_samples(m):
    outputs = [generate(m)]
    for seed in (3, 4):
        torch.manual_seed(seed)
        outputs.append(generate(m, do_sample=True, top_k=20))
    return [*outputs, generate(m)]


def loop(m, steps, act=None, ids=None):
    """Greedy decoding by hand; ``act(step, cache, token)`` may return another token."""
    from transformers import DynamicCache

    cache = DynamicCache()
    token = (prompt() if ids is None else ids).to("genie")
    tokens = []
    for step in range(steps):
        token = m(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens.append(token.cpu())
        if act is not None:
            token = act(step, cache, token)
    return torch.cat(tokens, dim=1)


def other_ids_in_between(m):
    def act(step, cache, token):
        return torch.tensor([[17]]).to("genie") if step in (12, 20) else token

    return [loop(m, 28, act)]


def cache_is_read_in_between(m):
    read = []

    def act(step, cache, token):
        if step in (12, 20):
            read.append(cache.layers[1].keys.cpu())
        return token

    return [loop(m, 28, act), *read]


def cache_is_written_in_between(m):
    def act(step, cache, token):
        if step in (12, 20):
            cache.layers[0].values.mul_(0.5)
        return token

    return [loop(m, 28, act)]


def draws_in_between(m):
    torch.manual_seed(5)

    def act(step, cache, token):
        if 10 <= step < 14 or step == 20:
            return torch.randint(3, 512, (1, 1), device="genie")
        return token

    return [loop(m, 28, act), torch.rand(4, device="genie").cpu()]


def two_of_the_same_start(m):
    return [loop(m, 16), loop(m, 20), loop(m, 16, ids=prompt(3))]


@pytest.mark.parametrize(
    "run",
    [
        stops_early, second_prompt, then_samples, other_ids_in_between, cache_is_read_in_between,
        cache_is_written_in_between, draws_in_between, two_of_the_same_start,
    ],
)  # fmt: skip
def test_a_client_that_goes_on_otherwise(server, model, run):
    assert compare(server, model, run).ahead


def test_an_error_comes_where_it_is_due(server):
    """The model's last position: what ran ahead of it is the client's error only once it asks for it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=24, vocab_size=64, bos_token_id=0, eos_token_id=63
    )
    small = GPT2LMHeadModel(config).eval()
    ids = torch.arange(4).view(1, 4)

    def run(m):
        told = [loop(m, 21, ids=ids)]
        steps = []
        with pytest.raises(RemoteOpError) as raised:
            loop(m, 30, lambda step, cache, token: (steps.append(step), token)[1], ids=ids)
        told += [str(raised.value).split("--- server log ---")[0], str(steps)]
        return [*told, loop(m, 21, ids=ids)]

    ahead = compare(server, small, run)
    assert ahead.ahead
    assert "index out of range" in ahead.outputs[1]


def test_options_that_there_are_not_are_refused(server):
    with pytest.raises(ConfigError, match="no engine warp: choose from graph, compiled"):
        genie.connect(server.address, TOKEN, engines=["warp"])
    with pytest.raises(ConfigError, match="run_ahead=3: a server runs 0 to 1 windows ahead"):
        genie.connect(server.address, TOKEN, run_ahead=3)


def test_a_pool_runs_ahead_on_each_server(trio, model):
    with torch.no_grad():
        expected = model.generate(
            prompt(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        addresses = [s.address for s in trio[:2]]
        with genie.connect(addresses, pools.TOKEN, run_ahead=1, calibrate=False) as session:
            remote = copy.deepcopy(model).to("genie")
            for _ in range(2):
                for link in session.executor.links:
                    link.begin("0" * 16)
                assert torch.equal(generate(remote), expected)
            for link in session.executor.links:
                link.traffic()
            counted = [r.counters.get("ahead", 0) for k in session.executor.links for r in k.usage.receipts]
    assert sum(counted)
