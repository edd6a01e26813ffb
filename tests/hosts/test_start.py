"""What hosts must have in common when they start."""

import pytest

from omnifusion_jax import hosts
from omnifusion_jax.config import TrainConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.hosts.company import Alone
from omnifusion_jax.run import same_start


class Two(Alone):
    """This host and another, which answers what it is told to."""

    def __init__(self, other):
        super().__init__(0, 2)
        self.other = other

    def gather(self, thing, about):
        return [thing, self.other(thing)]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "lock").touch()
    return tmp_path


def test_hosts_that_were_started_alike_go_on(workdir, monkeypatch):
    compared = []
    monkeypatch.setattr(hosts, "here", Two(lambda thing: compared.append(thing) or thing))
    same_start(TrainConfig(), workdir)
    (digest, where), sees = compared
    same_start(TrainConfig(seed=1), workdir)
    assert where == str(workdir) and sees is True and compared[2][0] != digest


def test_a_host_with_another_config_is_named(workdir, monkeypatch):
    other = Two(lambda thing: ["of another config", thing[1]] if isinstance(thing, list) else thing)
    monkeypatch.setattr(hosts, "here", other)
    with pytest.raises(ConfigError, match="host 1 was started with another config or --workdir than host 0"):
        same_start(TrainConfig(), workdir)


def test_a_host_that_does_not_see_the_workdir_is_named(workdir, monkeypatch):
    monkeypatch.setattr(hosts, "here", Two(lambda thing: False if thing is True else thing))
    with pytest.raises(ConfigError, match=r"host 1 does not see .* Give a --workdir that all hosts share"):
        same_start(TrainConfig(), workdir)


def test_what_the_first_finds_all_get():
    assert hosts.by_first(lambda: {"steps": 3}) == {"steps": 3} and hosts.first() and hosts.count() == 1
    with pytest.raises(ConfigError, match="as it is"):
        hosts.by_first(lambda: (_ for _ in ()).throw(ConfigError("as it is")))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ConfigError("as it is")])
def test_whatever_ends_a_host_is_told_to_the_others(monkeypatch, error):
    told = []

    class Spoken(Two):
        begin = aborted = staticmethod(lambda: None)
        end = staticmethod(lambda error: told.append(error) or error)

    instead = {"arguments": lambda *_: {}, "connect": lambda *_: None, "before_abort": lambda _: None}
    instead |= {"Store": lambda: None, "Company": lambda *_: Spoken(None), "here": hosts.here}
    for name, thing in instead.items():
        monkeypatch.setattr(hosts, name, thing)
    with pytest.raises(type(error)), hosts.started("", None, None, 60.0):
        raise error
    assert told == [error]
