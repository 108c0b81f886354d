"""Gangs in a seeded simulation: several streams, random speeds, stalls, idling, joins, losses, restarts; invariants."""

from functools import partial

import pytest

from tests.sim.gang_world import World

SEEDS = range(4)


@pytest.mark.parametrize("num_ffn", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_speeds_stalls_and_idling(seed, num_ffn):
    world = World(seed, 1 + seed % 4, num_ffn, 1 + seed % 3, trouble=0.002)
    world.run(1.0)
    world.check()
    assert all(step.num_done > 20 for worker in world.workers.values() for step in worker.steps), "one stands still"


@pytest.mark.parametrize("num_ffn", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_without_trouble_everybody_ends_up_in_one_gang(seed, num_ffn):
    """Workers join at any time, so that epochs overlap; then each stream's gang holds them all, on every rank."""
    world = World(seed, 2, num_ffn, 2)
    for rank in (2, 3, 4):
        world.at(world.random.uniform(0.05, 0.2), partial(world.join, rank))
    world.run(0.6)
    world.check()
    assert [step.size for worker in world.workers.values() for step in worker.steps] == [5] * 10
    stragglers = [table.num_stragglers for table in world.tables]
    assert not any(stragglers), "two live epochs made somebody wait"
    assert world.longest_s < 0.02


@pytest.mark.parametrize("num_ffn", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_attention_workers_come_and_go(seed, num_ffn):
    world = World(seed, 4, num_ffn, 2, trouble=0.0005)
    for turn in range(6):
        rank = world.random.randrange(4)
        world.at(0.1 + 0.15 * turn, partial(lose_and_return, world, rank))
    world.run(1.3)
    world.check()
    assert world.num_lost == 6
    assert all(step.num_done > 5 for worker in world.workers.values() for step in worker.steps)


def lose_and_return(world: World, rank: int) -> None:
    world.lose(rank)
    world.after(0.001, 0.05, partial(world.join, rank))


@pytest.mark.parametrize("num_ffn", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_ffn_ranks_restart_with_gangs_under_way(seed, num_ffn):
    world = World(seed, 3, num_ffn, 3, trouble=0.0005)
    for turn in range(4):
        away_s = world.random.uniform(0.005, 0.05)
        world.at(0.1 + 0.2 * turn, partial(world.restart_ffn, world.random.randrange(num_ffn), away_s))
    world.run(0.95)
    world.trouble = 0.0
    world.run(1.2)
    before = [step.num_done for worker in world.workers.values() for step in worker.steps]
    world.run(1.4)
    world.check()
    after = [step.num_done for worker in world.workers.values() for step in worker.steps]
    assert all(now > then + 20 for then, now in zip(before, after, strict=True)), "one did not come back"
