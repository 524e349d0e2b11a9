"""One host for the run, one driver for each language, started when first needed and again when it died."""

import json
import os
from pathlib import Path

import pytest

from drivers import Driver, DriverError, Host, languages


@pytest.fixture(scope="session")
def host():
    host = Host()
    yield host
    assert host.stop() == 0, "the host did not end cleanly"


@pytest.fixture(scope="session")
def plugin_host():
    """Starts a host with one of the test plugins, whose kernel is called `k`."""
    hosts = {}

    def start(name):
        directory = os.environ.get("STRAIT_TEST_PLUGINS")
        if not directory:
            pytest.skip("STRAIT_TEST_PLUGINS is not set")
        if name not in hosts:
            hosts[name] = Host([Path(directory) / f"{name}.wasm"])
        return hosts[name]

    yield start
    for host in hosts.values():
        assert host.stop() == 0, "a host did not end cleanly"


class Drivers:
    def __init__(self, host):
        self._host = host
        self._known = {}
        self._failed = {}

    def __getitem__(self, language):
        """The language's driver, running and connected to the host of the run."""
        if language in self._failed:
            pytest.fail(self._failed[language], pytrace=False)
        driver = self._known.get(language)
        if driver is None:
            driver = Driver(languages()[language])
            try:
                driver.build()
            except DriverError as error:
                self._failed[language] = str(error)
                pytest.fail(str(error), pytrace=False)
            self._known[language] = driver
        if not driver.alive:
            driver.start()
            hello = driver.do("hello")
            assert hello["language"] == language and hello["fork"] in ("refused", "unsupported"), hello
            driver.fork = hello["fork"]
            driver.has_channels = hello.get("channels", False)
            driver.address = None
        connect(driver, self._host)
        return driver

    def stop(self):
        return {language: driver.stop() for language, driver in self._known.items()}


def connect(driver, host, renew=True):
    """Connects unless it is already: connections are cheap, but the cases are many."""
    wanted = (host.address, renew)
    if driver.address != wanted:
        driver.address = None
        driver.welcome = driver.do("connect", address=driver.address_of(host), renew=renew)
        driver.address = wanted


@pytest.fixture(scope="session")
def drivers(host):
    yield from running(host)


@pytest.fixture(scope="session")
def readers(host):
    """A second process of each language, for what another one writes meanwhile."""
    yield from running(host)


def running(host):
    drivers = Drivers(host)
    yield drivers
    codes = drivers.stop()
    assert all(code in (0, None) for code in codes.values()), f"exit codes of drivers: {codes}"


NOT_FAR = json.loads((Path(__file__).parent / "far.json").read_text())


@pytest.fixture(autouse=True)
def what_cannot_be_far(request):
    """Skips a case that far.json names, for a language that reaches the host from afar."""
    languages = [request.node.callspec.params.get(name, "") for name in ("language", "producer", "consumer")] if hasattr(request.node, "callspec") else []
    for language in languages:
        why = NOT_FAR.get(request.node.originalname, {})
        for key in ("far", language) if language.endswith("-far") else ():
            if key in why:
                pytest.skip(f"not from afar: {why[key]}")


@pytest.fixture
def driver(drivers, language):
    return drivers[language]


def pytest_generate_tests(metafunc):
    for name in ("language", "producer", "consumer"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(languages()))
