"""What allowed_hosts means, and what it refuses to mean."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation.hosts import HOST_NAME, AllowedHosts, NotAllowedError, canonical_host


@pytest.mark.parametrize(
    ("entry", "host", "port", "allowed"),
    [
        ("example.org", "example.org", 443, True),
        ("example.org", "example.org", 80, True),
        ("example.org", "example.org", 8080, False),
        ("example.org", "www.example.org", 443, False),
        ("example.org", "evilexample.org", 443, False),
        ("example.org", "example.org.evil.test", 443, False),
        ("EXAMPLE.org.", "example.org", 443, True),
        ("*.example.org", "www.example.org", 443, True),
        ("*.example.org", "a.b.example.org", 443, True),
        ("*.example.org", "example.org", 443, False),
        ("*.example.org", "evilexample.org", 443, False),
        ("*.example.org:8080", "www.example.org", 8080, True),
        ("*.example.org:8080", "www.example.org", 443, False),
        ("example.org:*", "example.org", 22, True),
        ("example.org:08080", "example.org", 8080, True),
        ("bücher.example", "xn--bcher-kva.example", 443, True),
        ("xn--bcher-kva.Example", "xn--bcher-kva.example", 443, True),
        ("a_b.example.org", "a_b.example.org", 443, True),
        ("192.0.2.7", "192.0.2.7", 443, True),
        ("192.0.2.7", "192.0.2.8", 443, False),
        ("192.0.2.7:5432", "192.0.2.7", 5432, True),
        ("192.0.2.7:5432", "192.0.2.7", 443, False),
        ("10.0.0.0/8", "10.255.0.1", 443, True),
        ("10.0.0.0/8", "11.0.0.1", 443, False),
        ("10.0.0.0/8:5432", "10.0.0.1", 5432, True),
        ("2001:db8::1", "2001:db8::1", 443, True),
        ("[2001:db8::1]:8443", "2001:db8::1", 8443, True),
        ("[2001:db8::1]:8443", "2001:db8::1", 443, False),
        ("2001:db8::/32", "2001:db8:1::1", 80, True),
        ("[fd00::/8]:*", "fd00::1", 22, True),
        ("::ffff:192.0.2.7", "192.0.2.7", 443, True),
        (f"{HOST_NAME}:8080", HOST_NAME, 8080, True),
        (f"{HOST_NAME}:8080", HOST_NAME, 80, False),
        (f"{HOST_NAME}:8080", f"x.{HOST_NAME}", 8080, False),
        ("*.sandbox.internal:*", HOST_NAME, 8080, False),
        ("*.internal", HOST_NAME, 80, False),
        ("localhost:8080", "localhost", 8080, False),
        ("localhost", "127.0.0.1", 80, False),
        ("127.0.0.1", "127.0.0.1", 80, False),
        ("127.0.0.0/8:*", "127.0.0.1", 22, False),
        ("[::1]:8080", "::1", 8080, False),
        ("app.localhost", "app.localhost", 80, False),
    ],
)
def test_an_entry_allows(entry: str, host: str, port: int, allowed: bool) -> None:
    assert AllowedHosts([entry]).allows_name(host, port) is allowed


def test_only_no_entry_at_all_allows_nothing_on_purpose() -> None:
    assert AllowedHosts([]).is_empty
    assert not AllowedHosts(["localhost"]).is_empty


def test_a_port_is_named_by_an_entry_that_has_one() -> None:
    hosts = AllowedHosts(["example.org", "named.example:443", "any.example:*"])

    assert not hosts.names_port("example.org", 443)
    assert hosts.names_port("named.example", 443)
    assert hosts.names_port("any.example", 443)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        ".",
        "*",
        "*.",
        "*.*.example.org",
        "w*.example.org",
        "example.*",
        "https://example.org",
        "example.org/path",
        "example.org:",
        "example.org:0",
        "example.org:65536",
        "example.org:http",
        "example.org:+80",
        "example.org:8\uff10",
        "example.org:80:80",
        "example..org",
        ".example.org",
        "example.org..",
        "-example.org",
        "example-.org",
        "exam ple.org",
        "example.org\n",
        "example.org\0",
        "example.org\0.evil.test",
        "exa%6dple.org",
        "user@example.org",
        "example.org#x",
        "example.org?x",
        "example.org\\x",
        "a" * 64 + ".org",
        ".".join(["a" * 60] * 5),
        "a" * 5000,
        "straße.example",
        "faß.example",
        "\uff11\uff12\uff17.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "10.0.0.256",
        "10.0.0.1.2",
        "1.2.3.4.",
        "[1.2.3.4]:80",
        "[example.org]:80",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/",
        "fe80::1%eth0",
        "[fe80::1%25eth0]:80",
        "2001:db8::1/32",
        "2001:db8:::1",
        "[2001:db8::1]80",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        HOST_NAME,
        f"{HOST_NAME}:*",
        f"*.{HOST_NAME}:80",
        17,
        None,
    ],
)
def test_an_entry_that_cannot_be_meant_is_named(entry: str) -> None:
    with pytest.raises(SandboxConfigurationError, match="allowed_hosts: cannot understand"):
        AllowedHosts(["example.org", entry])


def test_a_single_string_is_no_list() -> None:
    with pytest.raises(SandboxConfigurationError, match=r"\['example.org'\]"):
        AllowedHosts("example.org")


def test_the_error_says_what_is_wrong_with_which_entry() -> None:
    with pytest.raises(SandboxConfigurationError) as caught:
        AllowedHosts(["10.0.0.1/8"])

    assert "'10.0.0.1/8': the network of that size that it is in is 10.0.0.0/8" in str(caught.value)


@given(st.text())
def test_any_text_is_an_entry_or_a_configuration_error(text: str) -> None:
    try:
        AllowedHosts([text])
    except SandboxConfigurationError:
        return


@given(st.text(alphabet="0123456789abcdefx.:[]%*-_@/\\é\0 "))
def test_any_host_is_canonical_or_refused(text: str) -> None:
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(f"[{host}]" if ":" in host else host) == host


GLOBAL = ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
PRIVATE = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "198.18.0.1",
    "192.88.99.1",
    "240.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b:1::a00:1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "2001:db8::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2002:5db8:d822::1",
    "::10.0.0.1",
]
NEVER = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "0.1.2.3",
    "255.255.255.255",
    "224.0.0.1",
    "::",
    "::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:0.0.0.0",
    "64:ff9b::7f00:1",
    "2002:7f00:1::1",
]
ODD = ["fe80::1%eth0", "fe80::1%1", "example.org", "", "1.2.3"]


@pytest.mark.parametrize("address", GLOBAL)
def test_a_global_address_of_an_allowed_name_may_be_connected_to(address: str) -> None:
    AllowedHosts(["example.org"]).check_address("example.org", address, 443)


@pytest.mark.parametrize("address", [*PRIVATE, *NEVER, *ODD])
def test_any_other_address_of_an_allowed_name_may_not(address: str) -> None:
    with pytest.raises(NotAllowedError, match=r"example\.org is at "):
        AllowedHosts(["example.org:*"]).check_address("example.org", address, 443)


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("everything", ["0.0.0.0/0:*", "[::/0]:*", "[::/1]:*", "0.0.0.0/1:*"])
def test_a_network_that_has_global_addresses_too_does_not_name_private_ones(
    everything: str, address: str
) -> None:
    with pytest.raises(NotAllowedError):
        AllowedHosts([everything]).check_address("example.org", address, 443)


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("entry", ["0.0.0.0/0:*", "[::/0]:*", "127.0.0.1:*", "[::1]:*", "[2002::/16]:*"])
def test_loopback_is_never_reached_whatever_is_listed(entry: str, address: str) -> None:
    with pytest.raises(NotAllowedError, match="never allowed"):
        AllowedHosts([entry]).check_address("example.org", address, 443)


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("10.0.0.0/8", "10.1.2.3"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.3", "::ffff:10.1.2.3"),
        ("10.1.2.3:443", "64:ff9b::a01:203"),
        ("169.254.169.254:*", "169.254.169.254"),
        ("fd00::/8", "fd12::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
    ],
)
def test_a_private_address_may_be_connected_to_where_it_is_named(entry: str, address: str) -> None:
    AllowedHosts([entry]).check_address("example.org", address, 443)

    with pytest.raises(NotAllowedError, match="not a global address; add "):
        AllowedHosts([entry.replace(":*", ":443")]).check_address("example.org", address, 8443)


def test_an_address_of_this_machine_has_to_be_named_by_itself() -> None:
    for entry in ("example.org", "10.0.0.0/8", "0.0.0.0/0"):
        with pytest.raises(NotAllowedError):
            AllowedHosts([entry]).check_address("example.org", "10.1.2.3", 443, is_own=True)
    with pytest.raises(NotAllowedError, match=f"{HOST_NAME}:443"):
        AllowedHosts(["example.org"]).check_address("example.org", "93.184.216.34", 443, is_own=True)

    AllowedHosts(["10.1.2.3"]).check_address("example.org", "10.1.2.3", 443, is_own=True)


def test_reading_allowed_hosts_needs_no_network_and_no_event_loop() -> None:
    program = "import sys, code_sandboxes.isolation.hosts; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert not {"asyncio", "ssl", "urllib.request", "http.client"} & set(loaded.stdout.split())
