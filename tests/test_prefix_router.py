"""Where prompts go: properties over many random histories, without a cluster."""

import json
import random
from collections import Counter

import pytest

from moe_ray.serving.affinity.chain import CHUNK_BYTES, FIELDS, MAX_LINKS, prefix_chain
from moe_ray.serving.affinity.router import Choice, PrefixRouter, Report

NAMES = [f"replica-{number}" for number in range(5)]
SEEDS = range(20)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def idle(name, capacity=10_000):
    return Report(name, f"{name}:1", 0.0, capacity)


def make_router(names=NAMES, capacity=10_000):
    clock = Clock()
    router = PrefixRouter(clock)
    for name in names:
        router.report(idle(name, capacity))
    return router, clock


def ask(router, chain, asker=NAMES[0], ends=True):
    choice = router.choose(idle(asker), chain)
    if ends:
        router.finish(asker, choice)
    return choice


def conversation(rng, turns=6):
    """Chains of its turns, each of which goes on from the one before."""
    chain = [rng.getrandbits(64) for _ in range(rng.randrange(6, 30))]
    for _ in range(turns):
        yield tuple(chain)
        chain += [rng.getrandbits(64) for _ in range(rng.randrange(1, 5))]


def body(messages, **fields):
    return json.dumps({"model": "m", **fields, "messages": messages, "stream": True}).encode()


def test_chain_of_a_conversation():
    messages = [{"role": "user", "content": "how many cats are there? " * 40}]
    first = prefix_chain(body(messages), FIELDS["/v1/chat/completions"])
    assert len(first) == len(json.dumps(messages)) // CHUNK_BYTES
    messages += [{"role": "assistant", "content": "two " * 100}, {"role": "user", "content": "and dogs? " * 50}]
    second = prefix_chain(body(messages, temperature=0.5), FIELDS["/v1/chat/completions"])
    assert second[: len(first)] == first
    assert len(second) > len(first)
    other = [{"role": "user", "content": "How many cats are there? " * 40}]
    assert not set(first) & set(prefix_chain(body(other), FIELDS["/v1/chat/completions"]))


def test_chain_tells_what_came_before():
    same = b"x" * CHUNK_BYTES
    chain = prefix_chain(b'"prompt"' + same * 4, b'"prompt"')
    assert len(set(chain)) == len(chain) == 4


@pytest.mark.parametrize("text", [b"", b"{}", b'{"prompt": "short"}', b"\xff" * 5000, b'{"messages": []}'])
def test_no_chain(text):
    assert prefix_chain(text, b'"prompt"') == ()


def test_chain_is_bounded():
    assert len(prefix_chain(b'"prompt"' + b"x" * (MAX_LINKS + 9) * CHUNK_BYTES, b'"prompt"')) == MAX_LINKS


@pytest.mark.parametrize("seed", SEEDS)
def test_all_turns_but_the_first_meet_their_cache(seed):
    rng = random.Random(seed)
    router, _ = make_router()
    open_ones = [conversation(rng) for _ in range(30)]
    homes, lengths = {}, {}
    while open_ones:
        one = rng.choice(open_ones)
        chain = next(one, None)
        if chain is None:
            open_ones.remove(one)
            continue
        choice = ask(router, chain, rng.choice(NAMES))
        assert choice.replica == homes.setdefault(one, choice.replica)
        assert choice.known == lengths.get(one, 0)
        lengths[one] = len(chain)


@pytest.mark.parametrize("seed", SEEDS)
def test_as_long_a_prefix_as_there_is_when_nobody_is_busy(seed):
    """Against a plain list of what each replica was given, over a tree of prompts that fork."""
    rng = random.Random(seed)
    router, _ = make_router()
    prompts, given = [()], {name: [] for name in NAMES}
    for _ in range(200):
        start = rng.choice(prompts)
        chain = start[: rng.randrange(len(start) + 1)] + tuple(
            rng.getrandbits(64) for _ in range(rng.randrange(1, 9))
        )
        asker = rng.choice(NAMES)
        known = {name: max((common(chain, old) for old in given[name]), default=0) for name in NAMES}
        choice = ask(router, chain, asker)
        assert choice.known == known[choice.replica]
        # For a few chunks no hop is made.
        assert choice.known == max(known.values()) or known[asker] == choice.known >= max(known.values()) - 4
        given[choice.replica].append(chain)
        prompts.append(chain)


def common(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("length", [2, 20, 200])
def test_a_hot_prefix_spreads_under_load(length):
    """Requests that share all but their end and come at once end up as evenly as strangers would."""
    router, _ = make_router()
    rng = random.Random(length)
    hot = tuple(rng.getrandbits(64) for _ in range(length))
    count = 40 * length + 200
    choices = [ask(router, (*hot, rng.getrandbits(64)), rng.choice(NAMES), ends=False) for _ in range(count)]
    load = Counter()
    for choice in choices:
        load[choice.replica] += choice.work
    assert set(load) == set(NAMES)
    # No replica is ever further ahead than the work that its cache saved.
    assert max(load.values()) - min(load.values()) <= length + 10
    # And the prefix was computed once by each, not by each request.
    assert sum(choice.known == 0 for choice in choices) == len(NAMES)


def test_a_hot_prefix_stays_while_nobody_waits():
    router, _ = make_router()
    rng = random.Random(0)
    hot = tuple(rng.getrandbits(64) for _ in range(20))
    homes = {ask(router, (*hot, rng.getrandbits(64)), rng.choice(NAMES)).replica for _ in range(200)}
    assert len(homes) == 1


def test_reported_load_counts_as_given_load_does():
    router, _ = make_router()
    chain = tuple(range(1, 21))
    home = ask(router, chain, NAMES[1]).replica
    assert home == NAMES[1]
    router.report(Report(home, "", 15.0, 10_000))
    assert ask(router, chain).replica == home
    router.report(Report(home, "", 25.0, 10_000))
    assert ask(router, chain).replica != home


@pytest.mark.parametrize("seed", SEEDS)
def test_replicas_come_and_go(seed):
    """Conversations whose replica stays do not move, whatever happens to the others."""
    rng = random.Random(seed)
    router, _ = make_router()
    alive, homes = list(NAMES), {}
    chains = [next(conversation(rng)) for _ in range(40)]
    for chain in chains:
        homes[chain] = ask(router, chain, rng.choice(alive)).replica
    for number in range(6):
        if rng.random() < 0.5 and len(alive) > 1:
            gone = alive.pop(rng.randrange(len(alive)))
            router.remove(gone)
        else:
            alive.append(f"new-{number}")
            router.report(idle(alive[-1]))
        for chain in chains:
            choice = ask(router, chain, rng.choice(alive))
            assert choice.replica in alive
            if homes[chain] in alive:
                assert (choice.replica, choice.known) == (homes[chain], len(chain))
            homes[chain] = choice.replica


def test_the_silent_are_forgotten_with_their_work():
    router, clock = make_router(NAMES[:3])
    chain = tuple(range(1, 11))
    silent, asker, other = NAMES[0], NAMES[1], NAMES[2]
    assert ask(router, chain, silent).replica == silent
    # What the silent one had given to another no longer counts there.
    stranger = tuple(range(100, 200))
    assert ask(router, stranger, other).replica == other
    assert ask(router, stranger, silent, ends=False).replica == other
    clock.now += 6.0
    router.report(idle(other))
    clock.now += 6.0
    assert ask(router, chain, asker).replica != silent
    assert ask(router, stranger, asker).replica == other
    # Back, but with an empty cache.
    router.report(idle(silent))
    assert ask(router, chain, silent).replica == asker


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_is_bounded_and_the_oldest_ends_go_first(seed):
    rng = random.Random(seed)
    capacity = 50
    router, _ = make_router(NAMES[:1], capacity)
    model = []
    for _ in range(100):
        old = rng.choice(model)[: rng.randrange(1, 20)] if model and rng.random() < 0.5 else ()
        chain = old + tuple(rng.getrandbits(64) for _ in range(rng.randrange(1, 15)))
        choice = router.choose(idle(NAMES[0], capacity), chain)
        router.finish(NAMES[0], choice)
        assert choice.known == expected(model, chain, capacity)
        model.append(chain)


def expected(model, chain, capacity):
    """What of a chain is in a least recently used cache, where ends of prompts are older than their beginnings."""
    recent = {}
    for old in model:
        for link in reversed(old):
            recent.pop(link, None)
            recent[link] = None
    held = set(list(recent)[-capacity:])
    return next((n for n, link in enumerate(chain) if link not in held), len(chain))


def test_who_answers_for_a_lost_replica_is_asked_next():
    router, _ = make_router()
    chain = tuple(range(10))
    choice = ask(router, chain, NAMES[1], ends=False)
    assert choice.replica == NAMES[1]
    router.keep(idle(NAMES[2]), choice, chain)
    router.finish(NAMES[2], choice)
    assert ask(router, chain, NAMES[3]) == choice_of(NAMES[2], known=10)
    # The lost one may be found again.
    router.report(idle(NAMES[1]))
    assert ask(router, tuple(range(50, 60)), NAMES[1]).replica == NAMES[1]


def choice_of(name, known):
    return Choice(name, f"{name}:1", known, work=4.0)


def test_finishing_twice_or_unknown_is_harmless():
    router, _ = make_router()
    choice = ask(router, (1, 2, 3), NAMES[1])
    router.finish(NAMES[1], choice)
    router.finish("unknown", choice)
    router.remove(choice.replica)
    router.finish(NAMES[1], choice)
    assert ask(router, (1, 2, 3), NAMES[2]).known == 0
