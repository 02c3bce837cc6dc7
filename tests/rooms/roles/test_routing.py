import dataclasses

import pytest
from world import policy, prompts, rollouts, world  # pyright: ignore[reportMissingImports]

from surpass.roles.role import Role, route

SHARED = policy(1)


def asked(domains: list[str]):
    named = [dataclasses.replace(p, domain=d) for p, d in zip(prompts(len(domains)), domains)]
    return rollouts(world(), [[0]] * len(domains), named)


def teachers(*domains: str) -> dict[str, Role]:
    return {domain: Role(f"teacher/{domain}", SHARED) for domain in domains}


def routed(known: dict[str, Role], domains: list[str]) -> list[tuple[str, list[int]]]:
    return [(role.name, rows) for role, rows in route(known, asked(domains))]


def test_every_sequence_goes_to_the_teacher_of_its_domain_once():
    found = routed(teachers("math", "code"), ["code", "math", "code", "math", "math"])
    assert found == [("teacher/math", [1, 3, 4]), ("teacher/code", [0, 2])]


def test_a_teacher_without_a_sequence_is_not_asked():
    assert routed(teachers("math", "code", "law"), ["code", "code"]) == [("teacher/code", [0, 1])]


def test_a_single_default_teacher_speaks_on_every_domain():
    assert routed(teachers("default"), ["code", "math", "x"]) == [("teacher/default", [0, 1, 2])]


@pytest.mark.parametrize("known", [("math", "code"), ("code",), ("default", "math")], ids=str)
def test_an_unknown_domain_is_an_error_that_lists_the_known_ones(known):
    with pytest.raises(ValueError, match="'p1' has domain 'law'") as error:
        route(teachers(*known), asked([known[-1], "law"]))
    assert str(sorted(known)) in str(error.value)
